"""HCCL's and torch_npu's settings, typed: real names, ranges and units, turned into the environment.

Both libraries are configured by environment variables, ignore a name they do not know and replace a
value they do not like, at most with a warning. Here a setting is a field that is checked, and
`to_environment` is a pure function of the fields. A variable that the user exported wins and is
reported. Nothing is applied at import; the strategy calls `apply` once, before the libraries read
their variables. What a time-out or an error means is not told here.

Source: torch_npu 2.13.0 and CANN's documentation; defaults in brackets are the libraries' own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lightning_npu_tp.errors import ConfigError

ALLOC_CONF = "PYTORCH_NPU_ALLOC_CONF"
OTHER_ALLOC_CONF = "PYTORCH_ALLOC_CONF"
_DEFAULT_EXEC_TIMEOUT_S = 1836
_DEFAULT_EVENT_TIMEOUT_S = 1868
# The groups of a run: all ranks, and the axes of the layout.
GROUPS = ("world", "data_parallel", "tensor_parallel", "expert_replica", "expert_parallel")
# Where every axis has groups of its own, the group of all ranks adds up single numbers: norms, flags, counts.
_SMALL_BUFFER_MB = 16

# Names that circulate, which neither library reads: setting them does nothing.
NOT_A_VARIABLE = {
    "TORCH_NPU_ENABLE_COMGR": "nothing; leave it out",
    "NPU_FUSION_ENABLE": "nothing; leave it out (fused kernels are chosen by strategy.kernels)",
    "TORCH_NPU_ALLOC_CONF": f"{ALLOC_CONF} (max_split_size_mb, expandable_segments, garbage_collection_threshold)",
}


def _variable(name: str, low: float | None = None, high: float | None = None, values: tuple[Any, ...] = ()) -> Any:
    """A field that sets the variable `name`; None leaves it alone. Numbers within [low, high], or one of `values`."""
    return field(default=None, metadata={"variable": name, "low": low, "high": high, "values": values})


def _switch(name: str) -> Any:
    return _variable(name, values=(False, True))


def _allocator(key: str, low: float | None = None, high: float | None = None, values: tuple[Any, ...] = ()) -> Any:
    """A field that becomes one key of the allocator's variable."""
    return field(default=None, metadata={"allocator": key, "low": low, "high": high, "values": values})


@dataclass(frozen=True, kw_only=True)
class HcclSettings:
    """Settings of HCCL and torch_npu for one run; None leaves the library's default.

    Raises ConfigError for a value out of range, for settings that contradict each other, and for names
    in `extra` that do not exist or that are fields of this class.
    """

    # --- time-outs, in seconds ---
    # Until all ranks have met [120]. Compiling a large model can outlast it.
    connect_timeout_s: int | None = _variable("HCCL_CONNECT_TIMEOUT", 120, 7200)
    # Until a collective has ended [1836]; 0: never gives up.
    exec_timeout_s: int | None = _variable("HCCL_EXEC_TIMEOUT", 0)
    # Until a device event has come [1868]; must exceed the one above.
    event_timeout_s: int | None = _variable("HCCL_EVENT_TIMEOUT", 1)
    # Until a watchdog thread that shows no sign of life ends its process [600].
    heartbeat_timeout_s: int | None = _variable("TORCH_HCCL_HEARTBEAT_TIMEOUT_SEC", 1)

    # --- communication ---
    # MB of one buffer [200]; every communicator has two.
    buffer_mb: int | None = _variable("HCCL_BUFFSIZE", 1)
    # The same for the groups named, of: world, data_parallel, tensor_parallel, expert_replica, expert_parallel.
    # Not named: buffer_mb; for world, where no axis has all ranks, 16.
    group_buffers_mb: Mapping[str, int] = field(default_factory=dict)
    # Whether the list of allowed hosts is not checked [true].
    whitelist_disable: bool | None = _switch("HCCL_WHITELIST_DISABLE")
    # Address, or name of the network interface, by which hosts talk [chosen by HCCL]. One of the two.
    interface_ip: str | None = _variable("HCCL_IF_IP")
    socket_interface: str | None = _variable("HCCL_SOCKET_IFNAME")
    # Same order of summation in every run [false]; strict: order-preserving as well.
    deterministic: bool | Literal["strict"] | None = _variable("HCCL_DETERMINISTIC", values=(False, True, "strict"))
    # 0: off, 1: end the process, 2: clean up only, 3: end it without cleaning up [1].
    async_error_handling: int | None = _variable("TORCH_HCCL_ASYNC_ERROR_HANDLING", 0, 3)
    # Each a help in finding hangs, at a price in speed [false].
    blocking_wait: bool | None = _switch("TORCH_HCCL_BLOCKING_WAIT")
    desync_debug: bool | None = _switch("TORCH_HCCL_DESYNC_DEBUG")
    enable_monitoring: bool | None = _switch("TORCH_HCCL_ENABLE_MONITORING")
    dump_on_timeout: bool | None = _switch("TORCH_HCCL_DUMP_ON_TIMEOUT")

    # --- launching operators ---
    # 0: no queue, 1: queue [1], 2: two-level queue, faster, higher peak memory.
    task_queue: int | None = _variable("TASK_QUEUE_ENABLE", 0, 2)
    # Treat chains of operators on non-contiguous tensors as one [false].
    combined: bool | None = _switch("COMBINED_ENABLE")
    # Wait after every operator, for debugging [false]; switches the task queue off.
    launch_blocking: bool | None = _switch("ASCEND_LAUNCH_BLOCKING")
    # Bind host threads to cores: 0: off [0], 1: coarse, 2: fine.
    cpu_affinity: int | None = _variable("CPU_AFFINITY_CONF", 0, 2)
    # Overflow gives infinity and NaN instead of saturating [true].
    inf_nan_mode: bool | None = _switch("INF_NAN_MODE_ENABLE")
    # Folder for compiled operators [home folder]; needs a mode.
    op_cache_dir: str | None = _variable("ACL_OP_COMPILER_CACHE_DIR")
    op_cache_mode: str | None = _variable("ACL_OP_COMPILER_CACHE_MODE", values=("enable", "disable", "force"))

    # --- memory ---
    # How memory is reused among streams [1]; 0: not.
    multi_stream_memory_reuse: int | None = _variable("MULTI_STREAM_MEMORY_REUSE", 0, 3)
    # Grow segments instead of adding new ones: less fragmentation [false]; excludes the next two.
    expandable_segments: bool | None = _allocator("expandable_segments", values=(False, True))
    # MB; larger blocks are not split [no limit].
    max_split_size_mb: int | None = _allocator("max_split_size_mb", 21)
    # Share of the memory above which cached blocks are given back [off].
    garbage_collection_threshold: float | None = _allocator("garbage_collection_threshold", 0.0, 1.0)

    # --- anything else, by its variable's name ---
    extra: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for setting in fields(self):
            if setting.metadata and getattr(self, setting.name) is not None:
                _check(setting.name, getattr(self, setting.name), **_limits(setting.metadata))
        self._check_combinations()
        self._check_groups()
        self._check_extra()

    def buffers_mb(self, axes_of_all: Collection[str]) -> dict[str, int]:
        """Group -> MB of each of its two buffers, for groups that have another size than the environment says.

        axes_of_all: names of the axes whose group is the world's, which then is as large as they ask for.
        """
        sizes = dict(self.group_buffers_mb)
        asked = [sizes[axis] for axis in axes_of_all if axis in sizes]
        if "world" not in sizes and not axes_of_all:
            sizes["world"] = _SMALL_BUFFER_MB if self.buffer_mb is None else min(_SMALL_BUFFER_MB, self.buffer_mb)
        elif "world" not in sizes and asked:
            sizes["world"] = max(asked)
        return sizes

    def to_environment(self) -> dict[str, str]:
        """The variables that these settings stand for; nothing for a field that is None."""
        environment = {}
        allocator = []
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is None or not setting.metadata:
                continue
            if "allocator" in setting.metadata:
                allocator.append(f"{setting.metadata['allocator']}:{value}")
            else:
                environment[setting.metadata["variable"]] = _text(setting.name, value)
        if allocator:
            environment[ALLOC_CONF] = ",".join(allocator)
        return environment | {name: str(value) for name, value in self.extra.items()}

    def apply(self, environ: MutableMapping[str, str] | None = None) -> SettingsReport:
        """Set the variables in `environ` (by default the process's), except those that are set already.

        Raises ConfigError where both allocator variables would be set, which torch_npu refuses.
        """
        environ = os.environ if environ is None else environ
        wanted = self.to_environment()
        if ALLOC_CONF in wanted and OTHER_ALLOC_CONF in environ:
            raise ConfigError(
                f"{OTHER_ALLOC_CONF}={environ[OTHER_ALLOC_CONF]!r} is exported, and the allocator settings of "
                f"strategy.hccl would set {ALLOC_CONF} as well, which torch_npu refuses. Unset the variable, or "
                f"remove expandable_segments, max_split_size_mb and garbage_collection_threshold."
            )
        kept = {name: environ[name] for name, value in wanted.items() if environ.get(name, value) != value}
        applied = {name: value for name, value in wanted.items() if name not in environ}
        environ.update(applied)
        return SettingsReport(applied=applied, kept=kept, wanted=wanted)

    def _check_combinations(self) -> None:
        if self.exec_timeout_s is not None or self.event_timeout_s is not None:
            execution = _DEFAULT_EXEC_TIMEOUT_S if self.exec_timeout_s is None else self.exec_timeout_s
            event = _DEFAULT_EVENT_TIMEOUT_S if self.event_timeout_s is None else self.event_timeout_s
            if event <= execution:
                raise ConfigError(
                    f"hccl.event_timeout_s={_shown(self.event_timeout_s, event)} must exceed "
                    f"hccl.exec_timeout_s={_shown(self.exec_timeout_s, execution)}, or the event gives up before the "
                    f"collective that it waits for. Set hccl.event_timeout_s to {execution + 32}."
                )
        if self.interface_ip is not None and self.socket_interface is not None:
            raise ConfigError(
                f"hccl.interface_ip={self.interface_ip!r} makes HCCL ignore "
                f"hccl.socket_interface={self.socket_interface!r}. Set only one of the two."
            )
        if self.launch_blocking and self.task_queue:
            raise ConfigError(
                f"hccl.launch_blocking=true switches the task queue off, but hccl.task_queue={self.task_queue}. "
                f"Set hccl.task_queue to 0 or null, or hccl.launch_blocking to false."
            )
        for name in ("max_split_size_mb", "garbage_collection_threshold"):
            # A threshold of 0 is off.
            if self.expandable_segments and (value := getattr(self, name)):
                raise ConfigError(
                    f"hccl.expandable_segments=true and hccl.{name}={value} exclude each other in torch_npu. "
                    f"Set hccl.expandable_segments to false or null, or hccl.{name} to null."
                )
        if self.op_cache_dir is not None and self.op_cache_mode is None:
            raise ConfigError(
                f"hccl.op_cache_dir={self.op_cache_dir!r} has no effect without a mode. "
                f"Set hccl.op_cache_mode to 'enable'."
            )

    def _check_groups(self) -> None:
        for setting in ("group_buffers_mb", "extra"):
            if not isinstance(getattr(self, setting), Mapping):
                raise ConfigError(f"hccl.{setting}={getattr(self, setting)!r} is no table of names and values.")
        for name, size in self.group_buffers_mb.items():
            if name not in GROUPS:
                raise ConfigError(f"hccl.group_buffers_mb names {name!r}, which is no group. Name one of {GROUPS}.")
            _check(f"group_buffers_mb.{name}", size, low=1, high=None, values=())

    def _check_extra(self) -> None:
        names = {s.metadata["variable"]: s.name for s in fields(self) if "variable" in s.metadata}
        # The old name of a variable; torch_npu still reads it.
        names["HCCL_ASYNC_ERROR_HANDLING"] = "async_error_handling"
        names[ALLOC_CONF] = "expandable_segments, max_split_size_mb and garbage_collection_threshold"
        for name, value in self.extra.items():
            if not _fits_environment(name) or "=" in name or not name:
                raise ConfigError(f"hccl.extra names {name!r}, which no variable can be called.")
            if not isinstance(value, str | int | float) or not _fits_environment(str(value)):
                raise ConfigError(f"hccl.extra sets {name} to {value!r}, which no variable can hold. Set a text.")
            if name in NOT_A_VARIABLE:
                raise ConfigError(
                    f"hccl.extra sets {name}, which neither HCCL nor torch_npu reads. Use instead: "
                    f"{NOT_A_VARIABLE[name]}."
                )
            if name in names:
                raise ConfigError(f"hccl.extra sets {name} unchecked. Set hccl.{names[name]} instead.")


@dataclass(frozen=True)
class SettingsReport:
    """What `HcclSettings.apply` did.

    applied: variables that it set.
    kept:    variables that were exported with another value, which stays.
    wanted:  what the settings asked for.
    """

    applied: dict[str, str]
    kept: dict[str, str]
    wanted: dict[str, str]

    def lines(self) -> list[str]:
        """One line per variable, for the log."""
        lines = [f"{name}={value}" for name, value in self.applied.items()]
        return lines + [
            f"{name}={value} (exported by you; the configuration's {self.wanted[name]} is not used)"
            for name, value in self.kept.items()
        ]

    def undo(self, environ: MutableMapping[str, str] | None = None) -> None:
        """Remove what was set, so that the next run in this process does not take it for an exported variable."""
        environ = os.environ if environ is None else environ
        for name in self.applied:
            environ.pop(name, None)


def _limits(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: metadata[key] for key in ("low", "high", "values")}


def _check(name: str, value: Any, *, low: float | None, high: float | None, values: tuple[Any, ...]) -> None:
    if values:
        # `1 == True`, but a switch set to 1 or "true" is a mistake worth hearing of.
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            allowed_text = ", ".join(str(allowed).lower() for allowed in values)
            raise ConfigError(f"hccl.{name}={value!r} is none of: {allowed_text}. Set it to one, or null.")
    elif low is not None:
        whole = isinstance(low, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ConfigError(f"hccl.{name}={value!r} is not a {'whole ' if whole else ''}number. Set one, or null.")
        if value < low or (high is not None and value > high):
            allowed_text = f"{low} or more" if high is None else f"{low} to {high}"
            raise ConfigError(f"hccl.{name}={value} is out of range. Set it to {allowed_text}, or null.")
    elif not _fits_environment(value) or not value:
        raise ConfigError(f"hccl.{name}={value!r} is not a text. Set one, or null.")


def _fits_environment(value: Any) -> bool:
    """Whether it is a text without the zero byte that ends a variable, and without half a character."""
    return isinstance(value, str) and "\0" not in value and value.isprintable()


def _text(name: str, value: Any) -> str:
    """A value as the libraries read it: switches are 0 and 1, but HCCL spells determinism out."""
    if isinstance(value, bool):
        return str(value).lower() if name == "deterministic" else str(int(value))
    return str(value)


def _shown(value: int | None, effective: int) -> str:
    return str(value) if value is not None else f"null ({effective} by default)"
