"""The device seam: backends, precisions, and why an NPU cannot be used.

Catches: torch_npu imported by a run that wants none, an import crash without a reason, a missing
torch_npu, CANN, matching release or card mistaken for another, and hardware that nobody knows
quietly treated as a CPU. The torch_npu here is a stand-in of a few lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_npu import FAKE, fake_torch_npu

from lightning_npu_tp.devices import device
from lightning_npu_tp.errors import DeviceError
from lightning_npu_tp.tools.testing.ranks import run_ranks

LOADABLE = ("libc.so.6",)
ABSENT = ("libhccl_that_is_not_there.so",)

WITHOUT_CANN = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n"


@pytest.fixture
def no_torch_npu(monkeypatch):
    """As on a machine without torch_npu, whatever this one has."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Put a fake torch_npu on the path; it is forgotten again afterwards."""

    def put(code, **options):
        monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
        monkeypatch.syspath_prepend(fake_torch_npu(tmp_path, code, **options))

    yield put
    sys.modules.pop("torch_npu", None)


def test_each_device_has_its_backend_and_unknown_hardware_raises():
    assert device.backend_for("cpu") == "gloo"
    assert device.backend_for("cuda") == "nccl"
    # hccl carries no CPU tensors, so gloo stays beside it.
    assert device.backend_for("npu") == "cpu:gloo,npu:hccl"
    for question in (device.backend_for, device.supported_precisions, device.torch_module):
        with pytest.raises(DeviceError, match=r"device type 'tpu' is not supported(.|\n)*'cpu', 'cuda', 'npu'"):
            question("tpu")


def test_every_device_computes_in_every_precision_but_npus_in_float64():
    assert "64-true" in device.supported_precisions("cpu") and "64-true" in device.supported_precisions("cuda")
    everywhere = {"32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"}
    assert set(device.supported_precisions("npu")) == everywhere
    assert set(device.supported_precisions("cpu")) == everywhere | {"64-true"}


def test_only_simulated_cards_that_were_asked_for_float64_have_it(monkeypatch):
    for libraries, wide, has in (("/built", "1", True), ("/built", "0", False), (None, "1", False)):
        monkeypatch.setenv("ASCEND_SIM_FLOAT64", wide)
        monkeypatch.delenv("ASCEND_SIM_LIBRARIES", raising=False)
        if libraries:
            monkeypatch.setenv("ASCEND_SIM_LIBRARIES", libraries)
        assert ("64-true" in device.supported_precisions("npu")) is has


def test_the_stand_in_for_the_cpu_has_what_the_runtimes_have():
    cpu = device.torch_module("cpu")
    cpu.empty_cache()
    cpu.set_device(torch.device("cpu"))
    cpu.synchronize()
    assert cpu.memory_stats() == {}
    assert device.torch_module("cuda") is torch.cuda
    assert all(hasattr(torch.cuda, name) for name in ("empty_cache", "memory_stats", "set_device", "synchronize"))


def test_without_torch_npu_the_error_says_how_to_install_it(no_torch_npu):
    with pytest.raises(DeviceError, match=r"torch_npu is not installed(.|\n)*pip install 'lightning-npu-tp\[npu\]'"):
        device.import_torch_npu()
    with pytest.raises(DeviceError, match="not installed"):
        device.torch_module("npu")
    assert not device.npu_is_available()
    assert device.npu_device_count() == 0
    assert "not installed" in device.npu_problem()
    assert device.autoload_problem() is None


def test_torch_npu_without_cann_is_told_apart_from_a_broken_one(on_path, monkeypatch):
    on_path(WITHOUT_CANN)
    monkeypatch.setattr(device, "_CANN_LIBRARIES", ABSENT)
    with pytest.raises(DeviceError, match=r"CANN is not to be found \(libhccl.so(.|\n)*source /usr/local/Ascend"):
        device.import_torch_npu()
    assert "CANN" in device.npu_problem()
    monkeypatch.setattr(device, "_CANN_LIBRARIES", LOADABLE)
    with pytest.raises(DeviceError, match="cannot be imported with torch(.|\n)*of one release"):
        device.import_torch_npu()
    assert not device.npu_is_available()


def test_a_torch_npu_of_another_release_is_refused_before_it_is_imported(on_path):
    on_path("raise SystemExit('imported')\n", version="2.1.0")
    ours = ".".join(torch.__version__.split(".")[:2])
    with pytest.raises(DeviceError, match=rf"torch_npu 2\.1\.0 does not fit torch {ours}(.|\n)*torch_npu=={ours}\.\*"):
        device.import_torch_npu()


def test_a_driver_that_fails_in_its_own_way_is_a_problem_and_no_crash(monkeypatch):
    def fail():
        raise ValueError("drv 507899")

    monkeypatch.setattr(device, "_count_npus", fail)
    assert not device.npu_is_available()
    assert "drv 507899" in device.npu_problem()


def test_no_card_behind_a_working_torch_npu_is_said_so(monkeypatch):
    monkeypatch.setattr(device, "_count_npus", lambda: 0)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "9")
    assert "see no NPU (ASCEND_RT_VISIBLE_DEVICES='9')" in device.npu_problem()
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES")
    assert "see no NPU; `npu-smi info`" in device.npu_problem()


def test_the_autoload_problem_is_explained_for_torch_and_for_transformers(on_path, monkeypatch):
    on_path(WITHOUT_CANN)
    monkeypatch.setattr(device, "_CANN_LIBRARIES", ABSENT)
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    assert "`import torch` loads torch_npu" in device.autoload_problem()
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert "transformers imports torch_npu by itself" in device.autoload_problem()
    with pytest.raises(DeviceError, match="pip uninstall torch_npu"), device.explained_import():
        raise RuntimeError("Failed to load the backend extension: torch_npu.")
    # Nothing of ours: the error stays what it is.
    monkeypatch.setattr(device, "_CANN_LIBRARIES", LOADABLE)
    assert device.autoload_problem() is None
    with pytest.raises(RuntimeError, match="something else"), device.explained_import():
        raise RuntimeError("something else")


def test_a_module_without_a_spec_counts_as_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", type(sys)("torch_npu"))
    monkeypatch.setattr(device, "_CANN_LIBRARIES", ABSENT)
    assert device.autoload_problem() is not None


ROOT = Path(device.__file__).parents[2]
# The module alone, without what the package's own __init__ imports.
DEVICE_ALONE = f"""
import sys, types
package = types.ModuleType("lightning_npu_tp")
package.__path__ = [{str(ROOT / "lightning_npu_tp")!r}]
sys.modules["lightning_npu_tp"] = package
from lightning_npu_tp.devices import device
"""


def python(code: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    environment["PYTHONPATH"] = os.pathsep.join((path, str(ROOT)))
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_the_import_crash_of_torch_itself_becomes_one_sentence(tmp_path):
    path = fake_torch_npu(tmp_path, WITHOUT_CANN, autoload=True)
    crash = python("import torch", path)
    assert crash.returncode != 0 and "Failed to load the backend extension: torch_npu" in crash.stderr
    explained = python(
        f"{DEVICE_ALONE}\ndevice._CANN_LIBRARIES = {ABSENT}\nwith device.explained_import():\n    import torch", path
    )
    assert explained.returncode != 0
    assert "DeviceError: torch_npu is installed, but CANN's" in explained.stderr.splitlines()[-1]


def test_importing_the_device_module_imports_no_torch_npu(tmp_path):
    path = fake_torch_npu(tmp_path, "raise SystemExit('torch_npu was imported')\n")
    result = python(f"{DEVICE_ALONE}\ndevice.backend_for('npu')\ndevice.torch_module('cpu')", path)
    assert result.returncode == 0, result.stderr


def use_the_fake(rank, world_size, path):
    sys.path.insert(0, path)
    before = "torch_npu" in sys.modules
    problem = device.npu_problem()
    device.torch_module("npu").set_device(torch.device("npu", 1))
    return before, problem, device.npu_device_count(), device.npu_is_available(), torch.npu.calls


def test_a_working_torch_npu_is_counted_and_used(tmp_path):
    path = fake_torch_npu(tmp_path, FAKE.format(count=4))
    ((before, problem, count, available, calls),) = run_ranks(use_the_fake, 1, path, backend=None)
    assert not before
    assert (problem, count, available) == (None, 4, True)
    assert calls == [("set_device", "npu:1")]


def test_cards_that_a_run_on_the_cpu_leaves_unused_are_mentioned(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_DEVICE_FILES", str(tmp_path / "davinci[0-9]*"))
    assert device.idle_npus("cpu") is None
    (tmp_path / "davinci_manager").touch()
    assert device.idle_npus("cpu") is None
    (tmp_path / "davinci0").touch()
    assert "trainer.accelerator=npu" in device.idle_npus("cpu")
    assert device.idle_npus("npu") is None


@pytest.mark.skipif(device._missing_cann() is None, reason="CANN is installed here")
@pytest.mark.parametrize("autoload", ["0", "1"])
def test_the_doctor_comes_up_where_torch_npu_has_no_cann(tmp_path, autoload):
    path = fake_torch_npu(tmp_path, WITHOUT_CANN, autoload=True)
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    environment.pop("CI", None)
    command = [str(Path(sys.executable).with_name("lightning-npu-tp")), "doctor", "--json"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode == 1 and "Traceback" not in told.stderr, told.stderr
    assert next(line for line in json.loads(told.stdout)["checks"] if line["name"] == "CANN")["status"] == "fail"
    if autoload == "0":
        # Importing torch goes well then; transformers' import, which comes later, is explained where it happens.
        return
    code = (
        "import lightning_npu_tp as package\n"
        "try: package.NPUAccelerator\n"
        "except package.DeviceError as error: print(error)"
    )
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "torch_npu is installed, but CANN's" in asked.stdout, asked.stderr
