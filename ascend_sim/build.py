"""Builds the native libraries of the simulator, once per user and set of versions.

The sources come with the package; what they are built against is the torch and torch_npu of the running Python. The
result goes into the user's cache under a name made of all that matters (versions, compiler, sources), through a
temporary folder and a rename, so that it is either whole or not there. A lock file makes processes that start at
once build once. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
# What the libraries provide was read from this release; another one needs other symbols.
SUPPORTED = "2.13"
RUNTIME = ("order", "device", "stream", "memory", "pinned", "legacy", "faults", "log", "counters")
# Their functions live in libascendcl.so; torch_npu looks some of them up through these names.
ALIASES = ("acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
# Set by `--sanitize`, and inherited: the libraries are then built with it, beside those without.
SANITIZE = "ASCEND_SIM_SANITIZE"
SANITIZERS = {"address": "libasan.so", "thread": "libtsan.so"}


class BuildError(RuntimeError):
    """The simulator cannot be built here; the text says what is missing and what to do."""


def libraries() -> Path:
    """The folder of the built libraries, after building them if need be. Raises BuildError."""
    compiler = find_compiler()
    torch, torch_npu = package("torch"), package("torch_npu")
    for name in ("torch", "torch_npu"):
        version = importlib.metadata.version(name)
        if not version.startswith(SUPPORTED + "."):
            raise BuildError(
                f"ascend_sim simulates what {name} {SUPPORTED} needs, but {name} {version} is installed. "
                f"Install `{name}=={SUPPORTED}.*`."
            )
    folder = cache() / key(compiler, torch, torch_npu)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / "lock"):
            if not folder.is_dir():
                # Nobody else builds now: what lies here was left by a build that was ended.
                for left in folder.parent.glob("building-*"):
                    shutil.rmtree(left, ignore_errors=True)
                _build(compiler, torch, torch_npu, folder)
    except OSError as error:
        raise BuildError(
            f"ascend_sim cannot build its libraries into {folder.parent}: {error.strerror or error}. "
            f"Make room there, or set XDG_CACHE_HOME to a folder that can be written."
        ) from error
    return folder


def find_compiler() -> str:
    """The C++ compiler: the variable CXX, or g++ or clang++ of the path."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise BuildError(
        f"ascend_sim needs a C++ compiler and found none ({wanted or 'g++ or clang++'}). "
        "Install one (`apt-get install g++`), or set CXX to the path of yours."
    )


def sanitized() -> list[str]:
    """Flags of the compiler and the linker for the sanitizer of the environment; none where there is none."""
    kind = os.environ.get(SANITIZE)
    if kind and kind not in SANITIZERS:
        raise BuildError(f"{SANITIZE}={kind} is no sanitizer of the simulator. Choose one of {', '.join(SANITIZERS)}.")
    return [f"-fsanitize={kind}", "-fno-omit-frame-pointer", "-g"] if kind else []


def preloads(kind: str) -> str:
    """What LD_PRELOAD has to name for a sanitizer: its library, and the one whose exceptions it looks at."""
    compiler = find_compiler()
    names = (SANITIZERS[kind], "libstdc++.so")
    found = [_run([compiler, f"-print-file-name={name}"]).strip() for name in names]
    if not all(map(os.path.isabs, found)):
        raise BuildError(
            f"{compiler} has no {' or no '.join(names)} for --sanitize {kind}. Use g++: set CXX to its path."
        )
    return " ".join(map(os.path.realpath, found))


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        extra = "torch" if name == "torch" else f"{name}=={SUPPORTED}.*"
        raise BuildError(f"ascend_sim runs the real {name}, which this Python does not have. `pip install '{extra}'`.")
    return Path(spec.origin).parent


def cache() -> Path:
    """Where builds are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ascend_sim"


def key(compiler: str, torch: Path, torch_npu: Path) -> str:
    """A name for what is built here: it changes with everything that the result depends on."""
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    versions = map(importlib.metadata.version, ("torch", "torch_npu"))
    for part in (compiler, version, torch, torch_npu, *versions, *sanitized()):
        digest.update(f"{part}\n".encode())
    for source in [Path(__file__), *sorted(SOURCES.iterdir())]:
        if source.suffix in (".py", ".cpp", ".h"):
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # Released by the kernel with the process, however it ends.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: str, torch: Path, torch_npu: Path, folder: Path) -> None:
    hccl = sorted(path.stem for path in SOURCES.glob("hccl*.cpp"))
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as scratch:
        out, objects = Path(scratch) / "lib", folder.parent / "objects"
        out.mkdir()
        objects.mkdir(exist_ok=True)

        def compile_(name: str, *flags: str) -> Path:
            command = [compiler, *FLAGS, *flags, *sanitized(), "-c", str(SOURCES / f"{name}.cpp")]
            # Objects are kept, so that a change of one source does not compile torch's headers anew.
            target = objects / f"{name}-{_object_key(name, command)}.o"
            if not target.exists():
                part = Path(scratch) / f"{name}.o"
                _run([*command, "-o", str(part)])
                part.replace(target)
            return target

        def link(name: str, *parts: str | Path) -> None:
            soname = f"-Wl,-soname,lib{name}.so"
            _run([compiler, "-shared", *sanitized(), soname, *map(str, parts), "-o", str(out / f"lib{name}.so")])

        # The two that include torch take most of the time, and start first.
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            heavy = {
                name: pool.submit(compile_, name, "-std=c++20", "-O1", *include) for name in ("operators", "opapi")
            }
            light = {name: pool.submit(compile_, name, "-std=c++17", "-O2") for name in (*RUNTIME, *hccl)}
            here = [f"-L{out}", "-Wl,--no-as-needed", "-lascendcl", "-Wl,-rpath,$ORIGIN"]
            link("ascendcl", *(light[name].result() for name in RUNTIME), "-pthread")
            link("hccl", *(light[name].result() for name in hccl), *here, "-pthread", "-lrt")
            # Another name of the same, where torch_npu looks for the calls that open and close a group.
            link("hcomm", f"-L{out}", "-Wl,--no-as-needed", "-lhccl", "-Wl,-rpath,$ORIGIN")
            for name in ALIASES:
                link(name, *here)
            against_torch = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
            link("opapi", heavy["opapi"].result(), *here, *against_torch)
            npu = [f"-L{torch_npu / 'lib'}", "-Wl,--unresolved-symbols=ignore-all", "-ltorch_npu"]
            link("ascend_sim_operators", heavy["operators"].result(), *here, *against_torch, *npu)
        out.rename(folder)


def _object_key(name: str, command: list[str]) -> str:
    digest = hashlib.sha256("\n".join(command).encode())
    digest.update(importlib.metadata.version("torch").encode())
    for source in [SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if "No space left" in done.stderr:
            raise OSError(28, "No space left on device")
        raise BuildError(
            f"ascend_sim does not compile here; `{' '.join(command)}` ended with {done.returncode}:\n"
            f"{done.stderr[-4000:]}"
        )
    return done.stdout
