"""How the simulated card comes under a process: build, install, run, children, and the report that each leaves.

Catches a child that runs without the card, a second install that changes it, an exit code or a signal that is lost,
and a build that two processes spoil for each other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ascend_sim
from ascend_sim import build

ROOT = Path(__file__).parents[2]
INHERITED = ("ASCEND_SIM_", "LD_LIBRARY_PATH", "PYTHONPATH")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a shell that knows nothing of the simulator, except where the package lies."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def python(
    *arguments: str, env: dict[str, str] | None = None, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=env or clean_environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def test_a_plain_script_installs_the_card_after_torch_and_its_children_inherit_it(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import multiprocessing as mp, subprocess, sys, ctypes\n"
        "import torch\n"
        "import ascend_sim\n"
        "def count(queue):\n"
        "    import torch_npu\n"
        "    queue.put(torch.npu.device_count())\n"
        "if __name__ == '__main__':\n"
        "    ascend_sim.install(devices=3, memory_gib=2)\n"
        "    ascend_sim.install(devices=3)\n"
        "    ctypes.CDLL('libhccl.so')\n"
        "    import torch_npu\n"
        "    context = mp.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    process = context.Process(target=count, args=(queue,))\n"
        "    process.start()\n"
        "    print(queue.get(timeout=100), torch.ones(2, device='npu:2').sum().item())\n"
        "    process.join()\n"
        "    program = 'import ctypes; ctypes.CDLL(\"libhccl.so\"); import torch, torch_npu;'\n"
        "    program += 'print(torch.npu.mem_get_info()[1] >> 30)'\n"
        "    subprocess.run([sys.executable, '-c', program], check=True)\n"
    )
    ended = python(str(tmp_path / "job.py"))
    assert ended.returncode == 0, ended.stderr
    # torch_npu's own remark that CANN's variables are not set comes between.
    assert [line for line in ended.stdout.splitlines() if "ASCEND_HOME_PATH" not in line] == ["3 2.0", "2"]


def test_install_comes_too_late_after_torch_npu() -> None:
    assert "torch_npu" in sys.modules
    before = os.environ.pop("ASCEND_SIM_LIBRARIES")
    try:
        with pytest.raises(ascend_sim.SimulatorError, match="already imported"):
            ascend_sim.install(devices=4)
    finally:
        os.environ["ASCEND_SIM_LIBRARIES"] = before


def test_a_second_install_with_other_arguments_is_refused() -> None:
    ascend_sim.install(devices=4, memory_gib=64, soc="Ascend910B3")
    with pytest.raises(ascend_sim.SimulatorError, match="devices=4.*devices=2"):
        ascend_sim.install(devices=2)
    with pytest.raises(ascend_sim.SimulatorError, match="1 to 16"):
        ascend_sim.install(devices=17)


def test_float64_needs_a_chip_that_reduces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_SIM_LIBRARIES", "ASCEND_SIM_SOC"):
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch_npu")
    with pytest.raises(ascend_sim.SimulatorError, match=r"soc=Ascend910B3.*Leave soc out.*Ascend950PR_9599"):
        ascend_sim.install(soc="Ascend910B3", float64=True)
    show = "import os; print(os.environ['ASCEND_SIM_SOC'], os.environ['ASCEND_SIM_FLOAT64'])"
    for arguments, soc in ((["--float64"], "Ascend950PR_9599"), (["--float64", "--soc", "Ascend950"], "Ascend950")):
        ended = python("-m", "ascend_sim", "run", *arguments, "-c", show)
        assert ended.stdout.split() == [soc, "1"], ended.stderr
    for given, settings in ({"ASCEND_SIM_FLOAT64": "1"}, ["Ascend950PR_9599", "1"]), ({}, ["Ascend910B3", "0"]):
        ended = python("-m", "ascend_sim", "run", "-c", show, env=clean_environment(**given))
        assert ended.stdout.split() == settings, ended.stderr


def test_run_passes_arguments_and_the_exit_code_through_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import os, sys\nassert 'torch' not in sys.modules\nprint(sys.argv[1:], os.environ['ASCEND_SIM_DEVICES'])\n"
        "sys.exit(7)\n"
    )
    ended = python("-m", "ascend_sim", "run", "-n", "2", str(tmp_path / "job.py"), "-n", "x", "--", "a=b")
    assert (ended.returncode, ended.stdout) == (7, "['-n', 'x', '--', 'a=b'] 2\n"), ended.stderr
    (tmp_path / "module_of_test.py").write_text("import sys; print(sys.argv[1:])")
    env = clean_environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    ended = python("-m", "ascend_sim", "run", "--", "-m", "module_of_test", "-v", env=env)
    assert (ended.returncode, ended.stdout) == (0, "['-v']\n"), ended.stderr


def test_run_passes_signals_through() -> None:
    program = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(43)); print('on', flush=True)"
    )
    command = [sys.executable, "-m", "ascend_sim", "run", "-c", f"{program}; time.sleep(60)"]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 43


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    env = clean_environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    ended = python("-m", "ascend_sim", "run", "-c", "print('program')", env=env)
    # Once for the command itself, once for the program.
    assert ended.stdout.split() == ["theirs", "theirs", "program"], ended.stderr


@pytest.mark.parametrize("leave", ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_each_process_leaves_its_report(tmp_path: Path, leave: str) -> None:
    program = "import os, sys, time, torch, torch_npu; torch.ones(9, device='npu:1').sum().item()\n"
    env = {**os.environ, "ASCEND_SIM_REPORT_DIR": str(tmp_path)}
    # Written each second, which is all that one leaves that is killed.
    wait = "os.environ['RANK'] = '3'; time.sleep(1.5); del os.environ['RANK']; time.sleep(1.5)\n"
    python("-c", program + wait + leave, env=env)
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    # The rank that it had is not forgotten when it has none any more.
    assert report["rank"] == "3"
    counters = report["counters"]
    assert counters["operator.aten::sum"] == 1 and counters["sync.aten::_local_scalar_dense"] == 1
    assert counters["memory.peak.1"] >= 2 << 20 and "memory.peak.0" not in counters


def test_two_processes_that_start_at_once_build_once_and_leave_nothing_else(tmp_path: Path) -> None:
    # Compiled objects are taken over, so that this tests the building and not the compiler.
    cache = tmp_path / "ascend_sim"
    cache.mkdir()
    (cache / "objects").symlink_to(build.cache() / "objects")
    (cache / "building-left-by-a-crash").mkdir()
    env = clean_environment(XDG_CACHE_HOME=str(tmp_path))
    command = [sys.executable, "-m", "ascend_sim", "build"]
    begin = time.monotonic()
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=200)[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes) and len(folders) == 1
    assert time.monotonic() - begin < 60
    names = {path.name for path in Path(folders.pop()).iterdir()}
    assert {"libascendcl.so", "libhccl.so", "libopapi.so", "libascend_sim_operators.so"} <= names
    assert len(list(cache.iterdir())) == 3, "the lock, the objects and one build"


def test_what_is_missing_for_a_build_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ascend_sim.BuildError, match=r"needs a C\+\+ compiler.*apt-get install g\+\+"):
        build.libraries()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ascend_sim.BuildError, match="found none"):
        build.libraries()
    monkeypatch.undo()
    with pytest.raises(ascend_sim.BuildError, match="does not have"):
        build.package("no_such_package")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ascend_sim.BuildError, match="XDG_CACHE_HOME"):
        build.libraries()
    monkeypatch.undo()
    monkeypatch.setattr(build, "SUPPORTED", "9.9")
    with pytest.raises(ascend_sim.BuildError, match=r"torch 9.9 needs, but torch 2.13"):
        build.libraries()
    monkeypatch.undo()
    monkeypatch.setenv("ASCEND_SIM_SANITIZE", "memory")
    with pytest.raises(ascend_sim.BuildError, match="ASCEND_SIM_SANITIZE=memory.*one of address, thread"):
        build.libraries()
