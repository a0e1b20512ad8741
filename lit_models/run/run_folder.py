"""The run folder: a new one for every run, never written over, with errors that say what to free.

A run's folder belongs to one run. `GuardRunFolder` sees to that before Hydra writes its first file, `claim` again for
whoever calls `train()` without Hydra's command line or looks like a rank that follows. `sole_writer` keeps a second run
out while one lives, and `explain_write_errors` turns a full disk in the middle of a run into a sentence. Where the
folder lies is the config's part.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write
from typing_extensions import override

from lightning_npu_tp import CheckpointError, ConfigError, DataError, LightningNPUTPError
from lightning_npu_tp.checkpoint.locks import hold, holder_of, patience

CONFIG_FILE = "config.yaml"
# What a run leaves in its folder. Not .hydra: a run refused for a wrong setting has got no further than that.
_SIGNS_OF_A_RUN = (CONFIG_FILE, "metrics.csv", "checkpoints", "multirun.yaml")
_PROBE_BYTES = 1 << 20
_SHARED = "/dev/shm"
# How torch names what it shares between processes.
_TORCH_SHARED = re.compile(
    r"(unable to (open shared memory object|write to file|resize file)|shm).{0,200}No space left", re.S
)
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


class RunFolderError(LightningNPUTPError, OSError):
    """The run folder cannot be written: a full disk, a quota, permissions."""


def register_resolvers() -> None:
    """Make `${run_stamp:}` known to OmegaConf: one name per run, alike on all ranks of a machine."""
    OmegaConf.register_new_resolver("run_stamp", run_stamp, use_cache=True, replace=True)


def run_stamp() -> str:
    """Date and time with microseconds; under torchrun those of torchrun's start, which its ranks share."""
    moment = datetime.now()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import psutil

        moment = datetime.fromtimestamp(psutil.Process(os.getppid()).create_time())
    return moment.strftime("%Y-%m-%d_%H-%M-%S-%f")


def is_follower() -> bool:
    """Whether this process is a rank that shares rank 0's run folder instead of making one."""
    # The first host's first rank has none of them, or 0; srun sets only the last.
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return any(os.environ.get(name, "0") != "0" for name in names)


def refuse_existing(folder: Path) -> None:
    """Raise ConfigError if `folder` holds a run already."""
    found = [name for name in _SIGNS_OF_A_RUN if (folder / name).exists()]
    if found:
        raise ConfigError(
            f"The run folder {folder} already holds a run ({', '.join(found)}), and a run is never overwritten. Choose "
            f"another with hydra.run.dir=…, leave hydra.run.dir out for a new one, or go on with this one: resume=auto."
        )


def check_writable(folder: Path, needed_bytes: int = _PROBE_BYTES) -> None:
    """Make the folder and try to write a megabyte into it.

    Raises RunFolderError that names the folder, what is free and what is needed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_probe(folder)
    except OSError as error:
        raise RunFolderError(_explanation(folder, folder, error, needed_bytes)) from error
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RunFolderError(_explanation(folder, folder, full, needed_bytes))


def goes_on(config: DictConfig) -> bool:
    """Whether the run continues its folder. Raises ConfigError for another `resume` than null or auto."""
    resume = config.get("resume")
    if resume not in (None, "auto"):
        raise ConfigError(f"resume={resume!r} does not exist. Set it to auto or null, or a checkpoint in ckpt_path=….")
    if resume == "auto" and config.get("ckpt_path"):
        raise ConfigError(
            f"resume=auto finds its checkpoint in the run folder, and ckpt_path={config.ckpt_path} names another. Set "
            f"one of the two."
        )
    return resume == "auto"


# What may differ from start to start without a word.
_OF_ONE_START = ("resume", "ckpt_path", "run_dir")


def changes(before: DictConfig, now: DictConfig) -> list[str]:
    """What differs between the config of a run's first start and that of this one, a line each."""
    old, new = (_flat(OmegaConf.to_container(config, resolve=True)) for config in (before, now))
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key.split(".")[0] not in _OF_ONE_START
    ]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        return {key: value for name, item in node.items() for key, value in _flat(item, f"{prefix}.{name}").items()}
    return {prefix.removeprefix("."): node}


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Be the one run that writes into the folder, for as long as this lasts; rank 0 calls it.

    Raises ConfigError that names the process that is at it; one of another host is waited for until it gives no sign of
    life. Of a run that was killed nothing has to be removed.
    """
    name = folder / "run"
    check_writable(folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(name, "training", waiting=patience(name, "training")))
        except CheckpointError as error:
            holder = holder_of(name)
            who = "another process" if holder is None else f"process {holder.pid} of {holder.host}"
            raise ConfigError(
                f"The run folder {folder} is being written: {who} trains in it, and two runs would mix their rows and "
                f"checkpoints. End that run or wait for it, or choose another folder with hydra.run.dir=…."
            ) from error
        yield


def claim(folder: Path, config: DictConfig) -> None:
    """Write the resolved config as the folder's first file of this run; a second claim is a ConfigError.

    With resume=auto the config of the first start stays, and what has changed since is printed; one that a power cut
    has damaged is set aside.
    """
    check_writable(folder)
    file = folder / CONFIG_FILE
    if not goes_on(config):
        # Whoever looks as a rank that follows has not been asked before: RANK may be left from another program.
        refuse_existing(folder)
    elif file.exists():
        try:
            before = OmegaConf.load(file)
            if not isinstance(before, DictConfig) or not before:
                raise ValueError("it holds no settings")
            told = changes(before, config)
        except Exception as error:
            # A damaged text raises what YAML, Unicode and OmegaConf have, an OSError without a number too.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            aside = file.with_name(f"{file.name}.damaged")
            file.replace(aside)
            why = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{file} cannot be read ({why}): it is {aside.name} now, and written anew.", flush=True)
        else:
            if told:
                print(f"{folder} was started with other settings:", *told, sep="\n  ", flush=True)
            return
    text = OmegaConf.to_yaml(config, resolve=True)
    try:
        # "x" and not a test before: of two runs that start at once only one gets the folder.
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError:
        refuse_existing(folder)


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Around a run: a file of the run folder that cannot be written becomes a RunFolderError."""
    try:
        yield
    except LightningNPUTPError:
        raise
    except Exception as error:
        if _is_of_shared_memory(error):
            free = shutil.disk_usage(_SHARED).free if os.path.isdir(_SHARED) else 0
            raise DataError(
                f"Shared memory ({_SHARED}) is full, {free:,} bytes are free there; workers of data loaders hand over "
                f"batches in it. Set data.num_workers lower, or give the container more (docker run --shm-size=…)."
            ) from error
        cause = _write_error(error, folder)
        if cause is None:
            raise
        path = Path(cause.filename) if isinstance(cause.filename, str) else folder
        raise RunFolderError(_explanation(folder, path, cause)) from error


def _write_error(error: BaseException | None, folder: Path) -> OSError | None:
    """The refused write behind an exception, if it concerns the folder."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            name = error.filename
            if name is None or (isinstance(name, str) and Path(name).absolute().is_relative_to(folder.absolute())):
                return error
        # torch's own file writer says no more than that a write failed.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
            return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (torch: {str(error).splitlines()[0]})")
        error = error.__cause__ or error.__context__
    return None


def _is_of_shared_memory(error: BaseException | None) -> bool:
    """Whether an exception says that shared memory is full; its own errors name no file."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            frames = traceback.extract_tb(error.__traceback__)
            if str(error.filename).startswith(_SHARED) or (
                error.filename is None and any("multiprocessing" in Path(frame.filename).parts for frame in frames)
            ):
                return True
        if isinstance(error, RuntimeError) and _TORCH_SHARED.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _write_probe(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0" * _PROBE_BYTES)
        probe.flush()
        os.fsync(probe.fileno())


def _explanation(folder: Path, path: Path, error: OSError, needed_bytes: int | None = None) -> str:
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    need = f", at least {needed_bytes:,} are needed" if needed_bytes is not None else ""
    return (
        f"The run folder cannot be written: {path}: {error.strerror}. {shutil.disk_usage(existing).free:,} bytes are "
        f"free there{need}. Free some space or correct the permissions, or choose another folder with "
        f"hydra.run.dir=…; what the folder already holds is kept."
    )


class GuardRunFolder(Callback):
    """Hydra callback: refuses a run folder before anything is written into it.

    Hydra turns a callback's exceptions into warnings, so a refusal ends the process here.
    """

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check that a single run's folder is new and writable."""
        if is_follower():
            # Rank 0's files; a second writer could find them half written.
            with read_write(config.hydra):
                config.hydra.output_subdir = None
            return
        self._check(config, Path(config.hydra.run.dir))

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check that the folder that all jobs of a sweep share is new and writable."""
        if not is_follower():
            self._check(config, Path(config.hydra.sweep.dir), setting="hydra.sweep.dir")

    def _check(self, config: DictConfig, folder: Path, setting: str = "hydra.run.dir") -> None:
        try:
            if not goes_on(config):
                refuse_existing(folder)
            elif (folder / ".hydra").exists():
                # Those of the first start.
                with read_write(config.hydra):
                    config.hydra.output_subdir = None
            check_writable(folder)
        except LightningNPUTPError as error:
            print(f"error: {str(error).replace('hydra.run.dir', setting)}", file=sys.stderr)
            raise SystemExit(2) from None
