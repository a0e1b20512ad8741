"""The doctor, with stand-ins for npu-smi, nvidia-smi, ssh, the torch_npu wheel and CANN's folder. Catches: a card
that is ill or in use shown as well, versions that do not belong together, a variable that nobody reads, torch_npu
imported into the doctor itself, a check that hangs or takes the others down, an exit code that does not say
what was found.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from lightning_npu_tp.devices import device
from lightning_npu_tp.tools import doctor, doctor_ascend
from lightning_npu_tp.tools.commands.doctor_command import doctor as command
from lightning_npu_tp.tools.doctor_lines import Line, answer_of

ROOT = Path(__file__).parents[3]
OURS = ".".join(torch.__version__.split(".")[:2])
SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.2                   Version: 25.5.2                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 2     910B3               | OK            | 89.9        39                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3389 / 65536         |
+===========================+===============+====================================================+
| 5     910B3               | Alarm         | 93.6        40                0    / 0             |
| 0                         | 0000:41:00.0  | 0           0    / 0          3380 / 65536         |
+===========================+===============+====================================================+
| 6     910B3               | OK            | 93.6        40                0    / 0             |
| 0                         | 0000:42:00.0  | 0           0    / 0          41697/ 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 2                                                            |
| 6       0                 | 3536113       | python                   | 38000                   |
+===========================+===============+====================================================+
"""
TWO_CHIPS = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
| 0     Ascend910           | OK            | 178.5       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3416 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | Warning       | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3195 / 65536         |
| 0       1                 | 77            | python                   | 38000                   |
"""
OLD = """\
| 0       310P3     | OK              | 16.2         42                0    / 0              |
| 0       0         | 0000:86:00.0    | 0            994  / 21534                            |
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`programs(name, script)` puts a shell script on a PATH that has nothing else but the system's own programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def add(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return add


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """`wheel(version, source)` installs a stand-in for torch_npu, with metadata, for this process and its children."""

    def install(version: str, source: str) -> None:
        site = tmp_path / "site"
        (site / "torch_npu").mkdir(parents=True)
        (site / "torch_npu/__init__.py").write_text(source)
        (site / f"torch_npu-{version}.dist-info").mkdir()
        (site / f"torch_npu-{version}.dist-info/METADATA").write_text(f"Name: torch_npu\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("PYTHONPATH", str(site))

    return install


@pytest.fixture
def cann(tmp_path):
    """`cann(version, driver)` makes a folder as CANN's installer does."""
    root = tmp_path / "Ascend"

    def make(version: str | None, driver: str | None) -> Path:
        if version is not None:
            home = root / "ascend-toolkit/latest/aarch64-linux"
            home.mkdir(parents=True)
            (home / "ascend_toolkit_install.info").write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\n")
        if driver is not None:
            (root / "driver").mkdir(parents=True)
            (root / "driver/version.info").write_text(f"Version={driver}\nascendhal_version=7.35\n")
        return root

    return make


def by_name(lines: list[Line]) -> dict[str, Line]:
    return {line.name: line for line in lines}


def environ(**more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **more}


# --- cards --------------------------------------------------------------------------------------------


def test_cards_are_read_with_health_free_memory_and_who_uses_them(programs) -> None:
    programs("npu-smi", f"cat <<'EOF'\n{SMI}EOF")
    lines = doctor_ascend.cards(environ())
    assert [(line.name, line.status) for line in lines] == [("card 0", "ok"), ("card 1", "fail"), ("card 2", "warn")]
    assert lines[0].detail == "910B3, OK, 62,147 of 65,536 MB free"
    assert "Alarm" in lines[1].detail and "ASCEND_RT_VISIBLE_DEVICES" in lines[1].fix
    assert "used by python (3536113)" in lines[2].detail


def test_memory_that_nobody_owns_up_to_is_told(programs) -> None:
    # In a container the processes of others are not listed.
    programs("npu-smi", f"cat <<'EOF'\n{SMI.split('No running')[0]}\nEOF")
    assert [line.status for line in doctor_ascend.cards(environ())] == ["ok", "fail", "warn"]


def test_both_chips_of_a_card_and_older_tables_are_read() -> None:
    found, processes = doctor_ascend.parse_npu_smi(TWO_CHIPS)
    assert [(card.name, card.health, card.used) for card in found] == [
        ("Ascend910", "OK", 3416),
        ("Ascend910", "Warning", 3195),
    ]
    assert processes == {1: ["python (77)"]}
    ((old,), _) = doctor_ascend.parse_npu_smi(OLD)
    assert (old.name, old.used, old.total) == ("310P3", 994, 21534)
    assert doctor_ascend.parse_npu_smi("no such table\n| a | b |\n") == ([], {})


def test_a_driver_that_hangs_or_fails_is_told_in_time(programs, monkeypatch) -> None:
    monkeypatch.setattr(doctor_ascend, "_SMI_SECONDS", 0.3)
    programs("npu-smi", "exec sleep 30")
    start = time.monotonic()
    (line,) = doctor_ascend.cards(environ())
    assert time.monotonic() - start < 5 and line.status == "fail" and "did not answer within 0.3 s" in line.detail
    programs("npu-smi", "echo 'dcmi module initialize failed. ret is -8005' >&2; exit 1")
    (line,) = doctor_ascend.cards(environ())
    assert line.status == "fail" and "ret is -8005" in line.detail
    programs("npu-smi", "echo '| nothing |'")
    assert doctor_ascend.cards(environ())[0].status == "warn"
    assert doctor_ascend.cards({"PATH": "/nowhere"}) == []


# --- versions -----------------------------------------------------------------------------------------


def test_a_machine_without_ascend_is_well(tmp_path) -> None:
    (line,) = doctor_ascend.versions({}, tmp_path)
    assert line.status == "ok" and doctor_ascend.import_of_torch_npu({}) == []


def test_versions_that_belong_together_are_ok(wheel, cann) -> None:
    wheel(f"{OURS}.0", "")
    lines = by_name(doctor_ascend.versions({}, cann("9.0.RC1", "25.5.2")))
    assert {name: line.status for name, line in lines.items()} == {"torch_npu": "ok", "CANN": "ok", "driver": "ok"}
    assert (lines["CANN"].detail, lines["driver"].detail) == ("9.0.RC1", "25.5.2")


def test_versions_that_do_not_belong_together_are_told(wheel, cann) -> None:
    wheel("2.1.0", "")
    lines = by_name(doctor_ascend.versions({}, cann(None, None)))
    assert {name: line.status for name, line in lines.items()} == {
        "torch_npu": "fail",
        "CANN": "fail",
        "driver": "warn",
    }
    assert lines["torch_npu"].fix == f"`pip install torch_npu=={OURS}.*`"
    assert "set_env.sh" in lines["CANN"].fix


def test_an_old_cann_is_told_and_the_sourced_one_wins(wheel, cann, tmp_path) -> None:
    wheel("2.13.0", "")
    root = cann("8.1.RC1", "24.1")
    assert by_name(doctor_ascend.versions({}, root))["CANN"].status == "warn"
    sourced = tmp_path / "sourced"
    sourced.mkdir()
    (sourced / "version.cfg").write_text("# comment\nruntime_running_version=[1]\nversion=[8.3.RC1:8.3.RC1]\n")
    line = by_name(doctor_ascend.versions({"ASCEND_HOME_PATH": str(sourced)}, root))["CANN"]
    assert (line.status, line.detail) == ("ok", "8.3.RC1")


def test_cann_without_torch_npu_is_a_hint(cann) -> None:
    line = by_name(doctor_ascend.versions({}, cann("9.0", "25")))["torch_npu"]
    assert line.status == "warn" and "lightning-npu-tp[npu]" in line.fix


# --- importing torch_npu -------------------------------------------------------------------------------


def test_torch_npu_without_cann_is_told_without_importing_it(wheel, monkeypatch) -> None:
    wheel(f"{OURS}.0", "raise SystemExit('imported')")
    monkeypatch.setattr(device, "_CANN_LIBRARIES", ("libdoes_not_exist.so",))
    (line,) = doctor_ascend.import_of_torch_npu(environ())
    assert line.status == "fail" and "CANN's libdoes_not_exist.so cannot be loaded" in line.detail
    assert "torch_npu" not in sys.modules


FAKE = """
import torch
class Npu:
    def is_available(self): return {count} > 0
    def device_count(self): return {count}
torch.npu = Npu()
"""


def tried(monkeypatch, seconds: float = 60.0) -> Line:
    monkeypatch.setattr(device, "_CANN_LIBRARIES", ())
    monkeypatch.setattr(doctor_ascend, "_IMPORT_SECONDS", seconds)
    (line,) = doctor_ascend.import_of_torch_npu(dict(os.environ))
    assert "torch_npu" not in sys.modules, "the doctor imported torch_npu into its own process"
    return line


def test_torch_npu_is_tried_in_another_process(wheel, monkeypatch) -> None:
    wheel(f"{OURS}.0", FAKE.format(count=4))
    line = tried(monkeypatch)
    assert (line.status, line.detail) == ("ok", "works, 4 devices")


def test_an_import_that_fails_sees_nothing_or_hangs_is_told(wheel, monkeypatch, tmp_path) -> None:
    wheel(f"{OURS}.0", FAKE.format(count=0))
    source = tmp_path / "site/torch_npu/__init__.py"
    assert tried(monkeypatch).status == "warn"
    source.write_text("raise ImportError('libhccl.so: undefined symbol: HcclX')")
    line = tried(monkeypatch)
    assert line.status == "fail" and "undefined symbol: HcclX" in line.detail
    source.write_text("import time; time.sleep(60)")
    line = tried(monkeypatch, 4.0)
    assert line.status == "fail" and "did not answer within 4 s" in line.detail


# --- exported settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "status", "says"),
    [
        ("TORCH_NPU_ALLOC_CONF", "max_split_size_mb:128", "warn", "PYTORCH_NPU_ALLOC_CONF"),
        ("NPU_FUSION_ENABLE", "1", "warn", "strategy.kernels"),
        ("HCCL_CONNECT_TIMEOUT", "9000", "fail", "120 to 7200"),
        ("HCCL_BUFFSIZE", "big", "fail", "strategy.hccl.buffer_mb"),
        ("HCCL_DETERMINISTIC", "maybe", "fail", "strict"),
        ("HCCL_CONECT_TIMEOUT", "200", "warn", "Did you mean HCCL_CONNECT_TIMEOUT?"),
        ("HCCL_EXEC_TIMEOUT", "7200", "fail", "Set hccl.event_timeout_s to 7232"),
        ("HCCL_SOCKET_IFNAME", "nosuch0", "fail", "Set one of: "),
        ("HCCL_IF_IP", "203.0.113.7", "fail", "no address of this host"),
    ],
)
def test_a_variable_that_would_not_work_is_told(name: str, value: str, status: str, says: str) -> None:
    (line,) = doctor_ascend.exported_settings({name: value})
    assert (line.name, line.status) == (name, status)
    assert says in f"{line.detail} {line.fix}"


def test_variables_that_work_are_left_alone() -> None:
    good = {
        "HCCL_CONNECT_TIMEOUT": "7200",
        "HCCL_EXEC_TIMEOUT": "7200",
        "HCCL_EVENT_TIMEOUT": "7300",
        "HCCL_DETERMINISTIC": "true",
        "HCCL_WHITELIST_DISABLE": "1",
        "ACL_OP_COMPILER_CACHE_DIR": "/tmp",
        "HCCL_IF_BASE_PORT": "61000",
        "HCCL_ALGO": "level0:NA",
        "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",
        "HCCL_SOCKET_IFNAME": "lo",
        "HCCL_IF_IP": "127.0.0.1",
        "HOME": "/",
    }
    (line,) = doctor_ascend.exported_settings(good)
    assert (line.status, line.detail) == ("ok", "8 exported, none wrong")


def test_two_allocator_variables_exclude_each_other() -> None:
    (line,) = doctor_ascend.exported_settings({"PYTORCH_NPU_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "a:1"})
    assert line.status == "fail" and "refuses" in line.detail


# --- the machine ------------------------------------------------------------------------------------------


def test_ports_in_use_are_told(programs) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        lines = by_name(doctor._ports(environ(MASTER_PORT=str(port))))
        assert lines["MASTER_PORT"].status == "warn" and "HCCL ports" not in lines
        assert doctor_ascend.ports({"HCCL_IF_BASE_PORT": str(port)})[0].status == "warn"
    assert by_name(doctor._ports(environ(MASTER_PORT=str(port))))["MASTER_PORT"].status == "ok"
    assert by_name(doctor._ports(environ(MASTER_PORT="x")))["MASTER_PORT"].status == "fail"
    programs("npu-smi", "true")
    assert "HCCL ports" in by_name(doctor._ports(environ()))


def test_too_little_of_the_hosts_own_is_told(monkeypatch, tmp_path) -> None:
    (line,) = doctor._shared_memory(tmp_path / "absent")
    assert line.status == "fail"
    sizes = {"f_frsize": 4096}
    for blocks, status in ((1_000_000, "ok"), (64 * 2**20 // 4096, "warn"), (100, "fail")):
        found = type("Size", (), {**sizes, "f_blocks": blocks})
        monkeypatch.setattr(doctor.os, "statvfs", lambda folder, found=found: found)
        assert doctor._shared_memory(tmp_path)[0].status == status
    for soft, status in ((65536, "ok"), (1024, "warn"), (100, "fail"), (resource.RLIM_INFINITY, "ok")):
        monkeypatch.setattr(doctor.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert doctor._open_files()[0].status == status
    for free, status in ((2**40, "ok"), (2**30, "warn"), (1000, "fail")):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert doctor._disk(tmp_path / "not/yet/there")[0].status == status
    assert doctor._compiler({"PATH": str(tmp_path)})[0].status == "warn"


@pytest.mark.parametrize(("shift", "status"), [(0, "ok"), (20, "warn"), (-20, "warn"), (300, "fail"), (-300, "fail")])
def test_clocks_of_other_hosts_are_compared(programs, shift: int, status: str) -> None:
    programs("ssh", f'[ "$6" = b ] && [ "$7" = date ] || exit 9; echo "$(( $(date +%s) + {shift} )).$(date +%N)"')
    (line,) = doctor._clocks(["b"], environ())
    assert line.status == status, line
    programs("ssh", "echo 'b: Permission denied (publickey).' >&2; exit 255")
    (line,) = doctor._clocks(["b"], environ())
    assert line.status == "warn" and "Permission denied" in line.detail


def test_nvidia_cards_that_torch_cannot_use_are_told(programs) -> None:
    assert doctor._cuda({"PATH": "/nowhere"}) == []
    programs("nvidia-smi", "echo '0, NVIDIA H100 80GB HBM3, 80000, 81559'")
    lines = doctor._cuda(environ())
    assert lines[0].detail == "NVIDIA H100 80GB HBM3, 80,000 of 81,559 MB free"
    assert lines[1].status == ("ok" if torch.cuda.is_available() else "warn")


def test_packages_that_are_too_old_or_absent_are_told(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", {"torch": (99, 0), "no_such_package": (1, 0), "lightning": (2, 6)})
    assert [line.status for line in doctor._packages()] == ["fail", "fail", "ok"]


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch) -> None:
    def breaks() -> list[Line]:
        raise RuntimeError("no such file")

    monkeypatch.setattr(doctor, "_open_files", breaks)
    lines = doctor.examine(environ=environ())
    assert any(line.name == "doctor" and "no such file" in line.detail for line in lines)
    assert "free disk" in by_name(lines) and "Python" in by_name(lines)


def test_a_program_that_is_absent_is_an_answer_too() -> None:
    assert "cannot be started" in answer_of(["no-such-program"], 1, {}).problem


# --- the command --------------------------------------------------------------------------------------------


def run(*arguments: str):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments))


def test_the_exit_code_and_the_json_say_whether_a_run_would_fail(monkeypatch) -> None:
    good, bad = Line("a", "warn", "[bold]x[/bold]", "do y"), Line("b", "fail", "z", "mend")
    monkeypatch.setattr(doctor, "examine", lambda *_: [good])
    done = run()
    assert done.exit_code == 0 and "[bold]x[/bold]" in done.stdout and "-> do y" in done.stdout
    assert "0 ok, 1 warn, 0 fail" in done.stdout
    monkeypatch.setattr(doctor, "examine", lambda *_: [good, bad])
    done = run("--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert told["checks"][1] == {"name": "b", "status": "fail", "detail": "z", "fix": "mend"}


def test_this_machine_is_examined_within_seconds() -> None:
    code = "import typer; from lightning_npu_tp.tools.commands.doctor_command import doctor; typer.run(doctor)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, "--json"], capture_output=True, text=True, timeout=100)
    assert time.monotonic() - start < 60 and done.returncode in (0, 1), done.stderr
    assert {"Python", "torch", "shared memory"} <= {check["name"] for check in json.loads(done.stdout)["checks"]}


# As `lightning-npu-tp doctor` on a machine where torch_npu breaks `import torch`: it must be there to say so.
WITHOUT_TORCH = f"""
import sys, types
sys.path.insert(0, {str(ROOT)!r})
package = types.ModuleType("lightning_npu_tp")
package.__path__ = [{str(ROOT / "lightning_npu_tp")!r}]
sys.modules["lightning_npu_tp"] = package
for name in ("torch", "transformers", "lightning", "torch_npu"):
    sys.modules[name] = None
from lightning_npu_tp.tools.doctor import examine
from lightning_npu_tp.tools.commands.doctor_command import doctor
print(*(line.name for line in examine()), sep="\\n")
"""


def test_the_doctor_needs_no_torch_in_its_own_process() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert {"torch", "shared memory"} <= set(done.stdout.splitlines()) and "doctor" not in done.stdout.splitlines()
