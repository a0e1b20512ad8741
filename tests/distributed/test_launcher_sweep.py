"""Hydra jobs and sweeps: catches ranks with another config than rank 0, jobs that run twice, leak or end the sweep."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from scripts_launcher.runs import SCRIPTS, Run

from lightning_npu_tp.launch import launcher
from lightning_npu_tp.launch.hydra_job import quote

NAME = "out, a=b 'c' \"d\" [e] ü"


@pytest.fixture
def light(tmp_path):
    """Starts the script that needs no Torch, with a copy of its config to write on."""
    runs = []

    def light(*arguments, script=SCRIPTS / "hydra_light.py"):
        folder = tmp_path / f"run{len(runs)}"
        conf = shutil.copytree(SCRIPTS / "conf_light", folder / "conf")
        script = (script,) if isinstance(script, os.PathLike) else script
        runs.append(Run(*script, "-cp", conf, "-cn", "config", *arguments, folder=folder, CONF=str(conf)))
        return runs[-1]

    yield light
    for run in runs:
        run.kill()


@pytest.fixture
def heavy(tmp_path):
    runs = []

    def heavy(*arguments):
        runs.append(Run(SCRIPTS / "hydra_heavy.py", *arguments, folder=tmp_path / f"run{len(runs)}"))
        return runs[-1]

    yield heavy
    for run in runs:
        run.kill()


def jobs(run):
    """What each process of each job said: {(learning rate, rank): (process, config)}."""
    said = [json.loads(line) for line in run.said("JOB")]
    found = {(lr, rank): (pid, config) for lr, rank, pid, config in said}
    assert len(found) == len(said), f"a job ran twice\n{run}"
    return found


def test_each_job_of_a_sweep_runs_once_in_its_own_processes_with_its_own_config(light):
    run = light("-m", "lr=1,2,3")
    assert run.end(120) == 1, run
    found = jobs(run)
    assert sorted(found) == [(lr, rank) for lr in (1, 2, 3) for rank in (0, 1)], run
    assert len({pid for pid, _ in found.values()} | {run.process.pid}) == 7, run
    for number, lr in enumerate((1, 2, 3)):
        folder = run.folder / NAME / f"{number} lr={lr}"
        (_, first), (_, second) = found[lr, 0], found[lr, 1]
        assert first == second, run
        assert first["lr"] == lr and first["follows"] == 2 and first["choice"] == "first", run
        assert first["folder"] == first["cwd"] == str(folder) and first["from"] == str(run.folder), run
        # Rank 0 writes its log where Hydra puts it, other ranks beside it; what the sweep saved stays.
        assert {path.name for path in folder.iterdir()} == {".hydra", "hydra_light.log"}
        assert yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text()) == [f"lr={lr}"]
    # The config files were edited after the first job had been composed.
    assert found[1, 1][1]["group"] == {"name": "original"}, run
    # The second job fails; the process that runs the sweep goes on, gets the other values and says what happened.
    assert run.said(f"VALUE {run.process.pid}") == ['{"loss": 0.5}', '{"loss": 1.5}'], run
    report = run.stderr[run.stderr.index("RankFailure: Job 1 of the sweep, in") :]
    assert "ended with exit code 1" in report and "ValueError: a learning rate of 2" in report, run


def test_the_ranks_of_a_single_job_share_its_config_and_its_clock(light):
    run = light("lr=4")
    assert run.end(30) == 0, run
    (_, first), (_, second) = (jobs(run)[4, rank] for rank in (0, 1))
    assert first == second, run
    assert first["folder"] == str(run.folder / NAME / first["stamp"]), run


@pytest.mark.parametrize("script", [SCRIPTS / "hydra_light.py", ("-m", "hydra_light")], ids=["script", "module"])
def test_a_job_that_saves_no_config_is_composed_again_for_its_ranks(light, script):
    settings = ("hydra.output_subdir=null", "hydra.job.chdir=false", "hydra/job_logging=none")
    run = light(*settings, "lr=7", "+more=[1,{a: 'x, y=z'}]", script=script)
    assert run.end(30) == 0, run
    (_, first), (_, second) = (jobs(run)[7, rank] for rank in (0, 1))
    # No log of rank 1 either: the job's own settings of Hydra apply to it.
    assert list(Path(first["folder"]).iterdir()) == []
    for config in first, second:
        # Composed from the files as they are now, at another time.
        del config["group"], config["stamp"]
    assert first == second, run
    assert first["more"] == [1, {"a": "x, y=z"}] and first["cwd"] == str(run.folder), run


@pytest.mark.parametrize("target", ["the sweep", "its job"])
def test_sigterm_ends_a_sweep_with_its_job(light, target):
    run = light("-m", "lr=1,2", "then=wait").until("JOB")
    job = next(iter(jobs(run).values()))[0]
    os.kill(run.process.pid if target == "the sweep" else job, signal.SIGTERM)
    assert run.end(5) == 143, run
    assert len(jobs(run)) == 1, run


def test_a_job_of_a_sweep_has_the_time_to_save_that_its_strategy_sets(light):
    run = light("-m", "lr=1,2", "then=save").until("WAITS")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end(25) == 143 and len(run.said("SAVED")) == 1, run


def test_the_sweep_is_told_of_the_time_that_a_strategy_sets(monkeypatch):
    told = []
    channel = SimpleNamespace(send=lambda event, **details: told.append((event, details)))
    monkeypatch.setattr(launcher, "parent_channel", lambda: channel)
    own = launcher.ProcessLauncher(LightningEnvironment(), 1, 1)
    own.watch_signals(grace_seconds=33.0)
    own._watch.close(unwinding=False)
    assert told == [("grace", {"seconds": 33.0})]


def test_the_first_job_of_a_sweep_may_fail_on_two_devices_and_the_second_trains_on_one(heavy):
    run = heavy("-m", "devices=2,1", "fails=true")
    assert run.end(240) == 1, run
    assert [line.split()[:3] for line in run.said("JOB")] == [["1", "0", "1"]], run
    # A tensor in the job, a number in the process that runs the sweep.
    assert run.said("VALUE") == ["Tensor", "float"], run
    report = run.stderr[run.stderr.rindex("RankFailure: Job 0 of the sweep, in") :]
    assert "ValueError: rank 1 came to grief" in report, run
    # In the job the traceback comes once more after what Hydra adds to an error.
    assert "for a complete stack trace.\n\nRank 1 (process" in run.stderr, run


def test_a_sweep_in_one_process_gives_each_job_its_own_ranks_and_leaks_nothing(heavy):
    run = heavy("-m", "fresh=false", "devices=2,1", "fails=true,false")
    assert run.end(240) == 1, run
    lines = [line.split() for line in run.said("JOB")]
    assert sorted(line[:3] for line in lines) == [["1", "0", "1"], ["1", "0", "1"], ["2", "0", "2"], ["2", "1", "2"]], (
        run
    )
    assert {line[3] for line in lines if line[1] == "0"} == {str(run.process.pid)}, run
    assert {line[4] for line in lines if line[1] == "0"} == {"0"}, run
    assert "RankFailure: Rank 1 (process" in run.stderr and "ValueError: rank 1 came to grief" in run.stderr, run


@pytest.mark.parametrize("value", ["plain", 'a "b"', "ends in \\", 'slash \\" quote', "a,b=c [d] {e} 'f' ü"])
def test_a_quoted_value_is_read_back_unchanged(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    assert str(parser.parse_override(f"key={quote(value)}").value()) == value
