"""Repeat a Hydra job in another process: the command line that composes exactly the config of this one.

A job's own command line does not do that: under `-m` it describes the whole sweep, and the files that it names
may have been edited since. So another process gets the config that Hydra saved in the run folder. Hydra and
OmegaConf are never imported here, only looked up: without them there is no job.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_npu_tp.errors import ConfigError

SNAPSHOT_NAME = "launch.yaml"
# Resolvers whose value is another one in another process: its own hydra node, its own clock.
_OWN_VALUE = re.compile(r"\$\{(hydra|now):")


@dataclass(frozen=True)
class HydraJob:
    """The job that Hydra runs in this process.

    number: its number in a sweep, None outside.
    in_sweep: whether this process runs the sweep, rather than this job alone.
    """

    output_dir: str
    output_subdir: str | None
    name: str
    number: int | None
    in_sweep: bool
    original_cwd: str
    chdir: bool | None

    def command(self, *, name: str, output_subdir: str | None) -> list[str]:
        """The command that runs this job alone, in its own folder; start it in `original_cwd`.

        name: its job name, which also names its log file there, if it has one.
        output_subdir: where it saves its config below the run folder; None for nowhere.
        """
        settings = {
            "hydra.run.dir": quote(self.output_dir),
            "hydra.job.name": quote(name),
            "hydra.output_subdir": "null" if output_subdir is None else quote(output_subdir),
        }
        if self.chdir is not None:
            settings["hydra.job.chdir"] = str(self.chdir).lower()
        if self.number is not None:
            settings["hydra.job.num"] = str(self.number)
        if output_subdir is None:
            # A further rank; its log file would only lie about in the run folder.
            settings["hydra/job_logging"] = "stdout"
        return [
            *program(self.original_cwd),
            *self._config_arguments(),
            *(f"{key}={value}" for key, value in settings.items()),
        ]

    def _config_arguments(self) -> list[str]:
        if self.output_subdir is None:
            return _composing_arguments()
        folder = Path(self.output_dir, self.output_subdir)
        write_snapshot(folder / "config.yaml", folder / SNAPSHOT_NAME)
        return ["-cp", str(folder), "-cn", SNAPSHOT_NAME]


def current_job() -> HydraJob | None:
    """The Hydra job that this process runs, None outside of one."""
    if (config := _hydra_config()) is None:
        return None
    is_missing = sys.modules["omegaconf"].OmegaConf.is_missing
    # Somebody may have composed a config with Hydra without running a job.
    if is_missing(config.runtime, "output_dir"):
        return None
    return HydraJob(
        output_dir=config.runtime.output_dir,
        output_subdir=config.output_subdir,
        name=config.job.name,
        number=None if is_missing(config.job, "num") else config.job.num,
        in_sweep=config.mode is not None and config.mode.name == "MULTIRUN",
        original_cwd=config.runtime.cwd,
        chdir=config.job.chdir,
    )


def program(cwd: str) -> list[str]:
    """The interpreter and the script or module that this process runs, without arguments.

    cwd: the folder in which it was started.
    """
    import __main__

    spec = getattr(__main__, "__spec__", None)
    script = os.path.abspath(os.path.join(cwd, sys.argv[0]))
    # A folder or an archive that is run as a script has a spec named "__main__".
    if spec is not None and spec.name != "__main__":
        # With -m Python puts the module's file there. In a worker of a pool (joblib's, say) it is the script that the
        # user has started, and the module is the pool's, which understands another command line.
        if not os.path.exists(script) or os.path.samefile(script, spec.origin or script):
            return [sys.executable, "-m", spec.name]
    if not os.path.exists(script):
        raise ConfigError(
            f"Other ranks run the same script, but this process was started from {sys.argv[0]!r}, which is no file. "
            "Put the code in a script or module, or start all ranks with torchrun."
        )
    return [sys.executable, script]


def quote(value: str) -> str:
    """A value as Hydra's override grammar reads it back unchanged."""
    # Inside quotes a backslash is special before a quote only, the closing one included.
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value) + '"'


def write_snapshot(source: Path, target: Path) -> None:
    """Copy a saved config, with the values that differ between processes filled in; other interpolations stay."""
    omegaconf = sys.modules["omegaconf"]
    config = omegaconf.OmegaConf.load(source)
    # The clock that this process has read for its folder is the clock of the others. The whole composed config, which
    # remembers it, is not public; only its part "hydra" is.
    omegaconf.OmegaConf.copy_cache(_hydra_config()._get_root(), config)
    _freeze(config, omegaconf.OmegaConf.to_container(config, resolve=False), omegaconf)
    # Written aside and renamed: the first nodes of several machines may share the folder.
    partial = target.with_name(f"{target.name}.{os.uname().nodename}.{os.getpid()}")
    partial.write_text(omegaconf.OmegaConf.to_yaml(config), encoding="utf-8")
    partial.replace(target)


def _freeze(node: Any, raw: Any, omegaconf: Any) -> None:
    """node: a config; raw: the same as plain containers with the interpolations as text."""
    for key, text in enumerate(raw) if isinstance(raw, list) else raw.items():
        if isinstance(text, dict | list):
            _freeze(node[key], text, omegaconf)
        elif isinstance(text, str) and _OWN_VALUE.search(text):
            try:
                node[key] = node[key]
            except omegaconf.errors.OmegaConfBaseException:
                # Nobody could have read it in this process either.
                continue


def _composing_arguments() -> list[str]:
    """For a job that saves no config: what composes it anew, from the files as they are now."""
    config = _hydra_config()
    assert config is not None
    arguments = []
    for source in config.runtime.config_sources:
        path = f"pkg://{source.path}" if source.schema == "pkg" else source.path
        if source.provider == "main" and path:
            arguments += ["-cp", path]
        elif source.provider == "command-line":
            arguments += ["-cd", path]
    if config.job.config_name is not None:
        arguments += ["-cn", config.job.config_name]
    return [*arguments, *config.overrides.task, *_kept(config.overrides.hydra)]


def _kept(overrides: Sequence[str]) -> list[str]:
    """Hydra's own overrides less those that belong to the sweep or that `command` sets itself."""
    dropped = ("hydra.mode", "hydra.run.", "hydra.sweep", "hydra.job.name", "hydra.job.chdir", "hydra.output_subdir")
    ours = ("hydra/sweeper", "hydra/launcher", "hydra.launcher", *dropped)
    return [override for override in overrides if not override.lstrip("+~").startswith(ours)]


def _hydra_config() -> Any:
    module = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return None
    return module.HydraConfig.get()
