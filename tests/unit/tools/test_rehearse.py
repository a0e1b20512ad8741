"""The sums of a rehearsal. Catches a process that is not counted, traffic of groups mixed up, a failure reported as
success, another Python than this one, and an environment that stays changed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.tools import rehearse as rehearsing
from lightning_npu_tp.tools.commands.rehearse_command import exit_code, tables, verdict
from lightning_npu_tp.tools.rehearse import ProcessReport, Rehearsal, read_reports


def report(folder: Path, pid: int, rank: str | None, waits: dict[str, int] | None = None, **counters: int) -> None:
    names = {name.replace("__", "."): value for name, value in counters.items()}
    content = {"pid": pid, "rank": rank, "counters": names, "synchronisations": waits or {}}
    (folder / f"{pid}.json").write_text(json.dumps(content))


def hccl(group: str, calls: int, nbytes: int) -> dict[str, int]:
    name = f"hccl.HcclAllReduce[{group}]"
    return {f"{name}.calls": calls, f"{name}.bytes": nbytes, "hccl.HcclAllReduce.calls": calls}


def test_reports_of_all_processes_are_added_by_rank_operation_and_group(tmp_path):
    report(tmp_path, 12, "1", {"aclrtSynchronizeStream a.py:3": 2}, memory__peak__1=2048, **hccl("tensor", 3, 100))
    report(
        tmp_path,
        13,
        "0",
        {"aclrtSynchronizeStream a.py:3": 1, "aclrtMemcpy b.py:4": 5},
        memory__peak__0=4096,
        fallback__mode=7,
        stream_misuse=1,
        **{**hccl("tensor", 4, 50), "hccl.HcclAllReduce[data [0]].calls": 1, "hccl.HcclAllReduce[data [0]].bytes": 8},
    )
    report(tmp_path, 11, None, memory__peak__0=0, fallback__mode=100)
    (tmp_path / "14.json").write_text('{"pid": 1')

    found = Rehearsal(0, read_reports(tmp_path))

    assert [(p.rank, p.peaks) for p in found.processes] == [("0", {0: 4096}), ("1", {1: 2048})]
    assert found.traffic == {("HcclAllReduce", "tensor"): [7, 150], ("HcclAllReduce", "data [0]"): [1, 8]}
    assert found.fallbacks == {"mode": 7}
    assert found.waits == {"aclrtSynchronizeStream a.py:3": 3, "aclrtMemcpy b.py:4": 5}
    assert found.misuses == 1
    assert json.loads(json.dumps(found.as_json()))["traffic"][1] == {
        "operation": "HcclAllReduce",
        "group": "tensor",
        "calls": 7,
        "bytes": 150,
    }
    assert "7 operators fell back to the CPU, 8 host waits, 1 unordered" in verdict(found)
    assert len(tables(found, top=1)) == 4 and tables(found, top=1)[3].row_count == 1


def test_places_are_shown_without_what_is_the_same_for_all():
    waits = {"aclrtMemcpy /env/site-packages/lightning/a.py:1": 3, f"aclrtMemcpy {Path.cwd()}/train.py:7": 2}
    process = ProcessReport(1, None, peaks={0: 2**20}, waits=Counter(waits))
    memory, places = tables(Rehearsal(0, [process]), top=5)
    assert list(places.columns[1].cells) == ["lightning/a.py:1", "train.py:7"]
    assert list(memory.columns[0].cells) == ["main process (pid 1)"] and list(memory.columns[2].cells) == ["1.0"]


@pytest.mark.parametrize(
    ("code", "peak", "counters", "strict", "expected"),
    [
        (0, 1, {}, True, 0),
        (3, 1, {}, False, 3),
        (0, 0, {}, False, 1),
        (0, 1, {"fallback.mode": 1}, False, 0),
        (0, 1, {"fallback.mode": 1}, True, 1),
        (0, 1, {"stream_misuse": 1}, False, 1),
    ],
)
def test_the_exit_code_is_the_runs_own_unless_something_was_not_as_on_a_card(code, peak, counters, strict, expected):
    process = ProcessReport.read(
        {"pid": 1, "rank": "0", "synchronisations": {}, "counters": {"memory.peak.0": peak, **counters}}
    )
    found = Rehearsal(code, [process] if process.used_a_card else [])
    assert exit_code(found, strict) == expected
    assert (("trainer.accelerator=npu" in verdict(found)) is True) == (not peak)


@pytest.fixture
def card(monkeypatch):
    """A stand-in for ascend_sim that notes what it was asked for; the real one needs torch_npu and a compiler."""
    asked = []

    def install(devices, memory_gib, soc, *, float64):
        asked.append((devices, memory_gib, soc, float64, os.environ.get("ASCEND_SIM_FAULTS")))
        os.environ["ASCEND_SIM_DEVICES"] = str(devices)

    stand_in = SimpleNamespace(install=install, BuildError=RuntimeError, SimulatorError=KeyError)
    monkeypatch.setitem(sys.modules, "ascend_sim", stand_in)
    return asked


def child(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_the_command_runs_with_the_card_and_this_process_stays_without(card, tmp_path):
    text = (
        "import json, os; folder = os.environ['ASCEND_SIM_REPORT_DIR']; "
        "content = {'pid': 1, 'rank': '0', 'synchronisations': {}, "
        "'counters': {'memory.peak.0': int(os.environ['ASCEND_SIM_DEVICES'])}}; "
        "open(folder + '/1.json', 'w').write(json.dumps(content)); raise SystemExit(5)"
    )
    before = dict(os.environ)
    found = rehearsing.rehearse(child(text), devices=3, faults=["A:code=1", "B:code=2"], report_dir=tmp_path)
    assert dict(os.environ) == before
    assert card == [(3, None, None, None, "A:code=1;B:code=2")]
    assert (found.exit_code, found.processes[0].peaks) == (5, {0: 3})
    with pytest.raises(ConfigError, match="holds reports of another run"):
        rehearsing.rehearse(child("pass"), devices=3, report_dir=tmp_path)


def test_python_is_this_one_though_its_environment_is_not_activated(card, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    text = f"import sys; sys.exit(int(sys.executable != {sys.executable!r}))"
    assert rehearsing.rehearse(["python", "-c", text], devices=1).exit_code == 0


def test_a_signal_is_handed_on_and_told_as_an_exit_code(card):
    # The rehearsal is told to end as soon as its child stands ready.
    text = (
        "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(7)); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)"
    )
    assert rehearsing.rehearse(child(text), devices=1).exit_code == 7
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert rehearsing.rehearse(child(killed), devices=1).exit_code == 128 + signal.SIGKILL


@pytest.mark.parametrize("command", [[], ["no-such-program-here"]])
def test_a_command_that_is_none_is_told(card, command):
    with pytest.raises(ConfigError, match="behind"):
        rehearsing.rehearse(command, devices=1)


def test_the_command_line_takes_the_command_behind_two_dashes(card, monkeypatch, capfd):
    from lightning_npu_tp.tools.cli import app

    done = CliRunner().invoke(app, ["rehearse", "-n", "2", "--", *child("print('options of the run', '--json')")])
    assert done.exit_code == 1 and "no process used a simulated card" in done.output
    assert "options of the run --json" in capfd.readouterr().out
    done = CliRunner().invoke(app, ["rehearse", "-n", "2", "--float64", "--", *child("pass")])
    assert card == [(2, None, None, None, None), (2, None, None, True, None)], done.output

    def refuse(devices, memory_gib, soc, *, float64):
        raise KeyError(f"devices={devices} cannot be simulated")

    monkeypatch.setattr(sys.modules["ascend_sim"], "install", refuse)
    done = CliRunner().invoke(app, ["rehearse", "-n", "99", "--", "true"])
    assert done.exit_code == 2 and "devices=99 cannot be simulated" in done.stderr
