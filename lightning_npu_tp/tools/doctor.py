"""`lightning-npu-tp doctor`: whether this machine can train, told line by line, each with what to do.

Looks and changes nothing. It runs in seconds and before anything heavy: torch is asked in another process, and
what belongs to Ascend is `doctor_ascend.py`'s. Whether a model fits or a layout computes rightly is not asked here.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning_npu_tp.tools import doctor_ascend
from lightning_npu_tp.tools.doctor_lines import Line, answer_of, fail, ok, warn

_PYTHON = (3, 11)
# The package's own lower bounds.
_PACKAGES = {"torch": (2, 11), "lightning": (2, 6), "transformers": (5, 17), "torchmetrics": (1, 9)}
_GIB = 2**30
_SHARED_MEMORY = {"fail": 32 * 2**20, "warn": _GIB}
_FREE_DISK = {"fail": _GIB // 2, "warn": 10 * _GIB}
_OPEN_FILES = {"fail": 256, "warn": 4096}
_SKEW_SECONDS = {"warn": 1.0, "fail": 30.0}
_CUDA_SECONDS, _SSH_SECONDS = 60.0, 10.0
_ASK_CUDA = "import torch; print(torch.version.cuda, torch.cuda.is_available(), torch.cuda.device_count())"


def examine(
    hosts: Sequence[str] = (), folder: Path = Path("."), environ: Mapping[str, str] | None = None
) -> list[Line]:
    """Everything that can be seen from here, in the order in which a run would meet it.

    hosts:   other machines of the run, as ssh knows them, whose clocks are compared with this one.
    folder:  where checkpoints would be written.
    environ: the environment to judge; this process's by default.
    """
    environ = dict(os.environ if environ is None else environ)
    checks: list[Callable[[], list[Line]]] = [
        _python,
        _packages,
        lambda: doctor_ascend.versions(environ),
        lambda: doctor_ascend.import_of_torch_npu(environ),
        lambda: doctor_ascend.cards(environ),
        lambda: _cuda(environ),
        lambda: doctor_ascend.exported_settings(environ),
        lambda: _shared_memory(Path("/dev/shm")),
        _open_files,
        lambda: _ports(environ),
        lambda: _compiler(environ),
        lambda: _disk(folder),
        lambda: _clocks(hosts, environ),
    ]
    lines: list[Line] = []
    for check in checks:
        try:
            lines += check()
        except Exception as error:
            # One thing that cannot be looked at must not hide the others.
            lines.append(warn("doctor", f"a check failed: {type(error).__name__}: {error}", "Look at this by hand."))
    return lines


def _python() -> list[Line]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _PYTHON:
        return [fail("Python", f"{version} at {sys.executable}", "Use Python 3.11 or newer.")]
    return [ok("Python", f"{version} at {sys.executable}")]


def _packages() -> list[Line]:
    lines = []
    for name, bound in _PACKAGES.items():
        wanted = ".".join(map(str, bound))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(fail(name, "not installed", f"`pip install '{name}>={wanted}'`"))
            continue
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < bound:
            lines.append(fail(name, version, f"`pip install '{name}>={wanted}'`"))
        else:
            lines.append(ok(name, version))
    return lines


def _cuda(environ: Mapping[str, str]) -> list[Line]:
    """NVIDIA cards, and whether the installed torch can use them; nothing where the machine has none."""
    if shutil.which("nvidia-smi", path=environ.get("PATH")) is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    said = answer_of(query, _SSH_SECONDS, environ)
    if said.output is None:
        return [warn("CUDA", said.problem, "The driver does not answer; without NVIDIA cards this does not matter.")]
    lines = []
    for row in said.output.strip().splitlines():
        index, name, free, total = (cell.strip() for cell in row.split(","))
        lines.append(ok(f"card {index}", f"{name}, {int(free):,} of {int(total):,} MB free"))
    asked = answer_of(
        [sys.executable, "-c", _ASK_CUDA], _CUDA_SECONDS, {**environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    )
    if asked.output is None:
        return [*lines, fail("CUDA", asked.problem, "Reinstall torch.")]
    built, available, count = asked.output.split()[-3:]
    if available != "True":
        fix = "Install torch's CUDA build, and a driver that is new enough for it."
        return [*lines, warn("CUDA", f"torch cannot use the cards (built for CUDA {built})", fix)]
    return [*lines, ok("CUDA", f"{built}, torch sees {count} cards")]


def _shared_memory(folder: Path) -> list[Line]:
    if not folder.is_dir():
        return [fail("shared memory", f"there is no {folder}", "Mount a tmpfs there.")]
    size = os.statvfs(folder)
    total = size.f_blocks * size.f_frsize
    fix = "Start the container with --shm-size=8g or --ipc=host."
    return [_judge("shared memory", total, _SHARED_MEMORY, f"{total / _GIB:.2f} GiB in {folder}", fix)]


def _open_files() -> list[Line]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    detail = "no limit" if unlimited else f"{soft:,} (may be raised to {hard:,})"
    return [
        _judge("open files", 2**62 if unlimited else soft, _OPEN_FILES, detail, "`ulimit -n 65536` before the run.")
    ]


def _ports(environ: Mapping[str, str]) -> list[Line]:
    """The port at which ranks meet, and HCCL's where there are cards."""
    lines = []
    port = environ.get("MASTER_PORT")
    if port is not None:
        fix = "Export a free port from 1024 to 65535 as MASTER_PORT, or unset it."
        if not port.isdigit() or not 0 < int(port) < 65536:
            lines.append(fail("MASTER_PORT", f"{port!r} is no port", fix))
        elif not doctor_ascend.is_free(int(port)):
            lines.append(warn("MASTER_PORT", f"{port} is in use on this host", fix))
        else:
            lines.append(ok("MASTER_PORT", f"{port} is free"))
    try:
        address = socket.gethostbyname(socket.gethostname())
        lines.append(ok("host name", f"{socket.gethostname()} is {address}"))
    except OSError as error:
        fix = "Enter the name into /etc/hosts, or gloo and MASTER_ADDR by name will fail."
        lines.append(warn("host name", f"{socket.gethostname()} has no address ({error})", fix))
    return lines + (doctor_ascend.ports(environ) if shutil.which("npu-smi", path=environ.get("PATH")) else [])


def _compiler(environ: Mapping[str, str]) -> list[Line]:
    for name in (environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (place := shutil.which(name, path=environ.get("PATH"))):
            return [ok("C++ compiler", place)]
    return [warn("C++ compiler", "none", "Install g++; the simulated Ascend needs one, training does not.")]


def _disk(folder: Path) -> list[Line]:
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    fix = "A checkpoint holds weights and two optimizer states; write to another disk with hydra.run.dir=…"
    return [_judge("free disk", free, _FREE_DISK, f"{free / _GIB:.1f} GiB at {there}", fix)]


def _clocks(hosts: Sequence[str], environ: Mapping[str, str]) -> list[Line]:
    """How far the clocks of other hosts are from this one: logs and time-outs are compared across hosts."""
    lines = []
    for host in hosts:
        before = time.time()
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "--", host, "date", "+%s.%N"]
        said = answer_of(command, _SSH_SECONDS, environ)
        after = time.time()
        name = f"clock of {host}"
        try:
            theirs = float(said.output or "")
        except ValueError:
            problem = said.problem or f"`date` said {said.output!r}"
            lines.append(warn(name, problem, f"`ssh {host} date` must work without a password."))
            continue
        # It was asked at some moment between the two: what lies outside is certain.
        apart = max(0.0, theirs - after, before - theirs)
        detail = f"{apart:.1f} s apart, known to {after - before:.1f} s"
        status = next((s for s in ("fail", "warn") if apart > _SKEW_SECONDS[s]), "ok")
        fix = "Let both follow one time server (`timedatectl set-ntp true`)."
        lines.append(Line(name, status, detail, "" if status == "ok" else fix))  # type: ignore[arg-type]
    return lines


def _judge(name: str, value: int, bounds: Mapping[str, int], detail: str, fix: str) -> Line:
    if value < bounds["fail"]:
        return fail(name, detail, fix)
    return warn(name, detail, fix) if value < bounds["warn"] else ok(name, detail)
