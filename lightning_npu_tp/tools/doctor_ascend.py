"""What a machine has for Ascend, found without importing torch_npu: versions, cards, exported settings.

Part of `lightning-npu-tp doctor`. Versions come from the files and wheels' metadata, cards from `npu-smi`, and
whether torch_npu can be imported is tried in a process of its own, with a time limit. Every function gives lines
of a diagnosis and raises nothing.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_npu_tp.devices.device import autoload_problem
from lightning_npu_tp.devices.hccl_settings import ALLOC_CONF, NOT_A_VARIABLE, HcclSettings
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.tools.doctor_lines import Line, answer_of, fail, ok, warn

ROOT = Path("/usr/local/Ascend")
# From here on CANN binds a device only when it is first used, which torch_npu 2.13 asks it for.
_LAZY_DEVICE = (8, 3)
_IMPORT_SECONDS = 60.0
_SMI_SECONDS = 20.0
_IN_USE = 0.1
_FIRST_PORT = 60000
_TRY = "import torch, torch_npu; print('devices', torch.npu.device_count() if torch.npu.is_available() else 0)"
# HCCL's own variables that are no field of HcclSettings.
_OTHER_VARIABLES = (
    "HCCL_ASYNC_ERROR_HANDLING", "HCCL_IF_BASE_PORT", "HCCL_ALGO", "HCCL_INTRA_PCIE_ENABLE", "HCCL_INTRA_ROCE_ENABLE",
    "HCCL_RDMA_TC", "HCCL_RDMA_SL", "HCCL_RDMA_TIMEOUT", "HCCL_RDMA_RETRY_CNT", "HCCL_RDMA_PCIE_DIRECT_POST_NOSTRICT",
    "HCCL_OP_EXPANSION_MODE", "HCCL_OP_RETRY_ENABLE", "HCCL_ENTRY_LOG_ENABLE", "HCCL_DEBUG_CONFIG",
    "HCCL_DIAGNOSE_ENABLE", "HCCL_WHITELIST_FILE", "HCCL_SOCKET_FAMILY", "HCCL_HOST_SOCKET_PORT_RANGE",
    "HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_LOGIC_SUPERPOD_ID",
)  # fmt: skip
_ALIKE = ("HCCL_", "TORCH_HCCL_", "TORCH_NPU_", "PYTORCH_NPU_", "TASK_QUEUE", "COMBINED_")


@dataclass(frozen=True)
class Card:
    """One chip as `npu-smi info` shows it; memory in MB."""

    index: int
    name: str
    health: str
    used: int
    total: int


def versions(environ: Mapping[str, str], root: Path = ROOT) -> list[Line]:
    """torch_npu, CANN and driver, and whether they belong together; one line where there is nothing of Ascend."""
    wheel, torch = _wheel("torch_npu"), _wheel("torch")
    cann, driver = cann_version(environ, root), _version_in(root / "driver/version.info")
    if not wheel and not cann and not driver:
        return [ok("torch_npu", "not installed, and no CANN: this machine has nothing of Ascend")]
    lines = [_torch_npu_line(wheel, torch)]
    if cann is None:
        lines.append(
            fail("CANN", "not found", f"Install CANN and `source {root}/ascend-toolkit/set_env.sh`.")
            if wheel
            else warn("CANN", "not found", "Install CANN and torch_npu to use the card.")
        )
    elif wheel.startswith("2.13") and _numbers(cann) < _LAZY_DEVICE:
        lines.append(
            warn("CANN", f"{cann} is older than 8.3, which torch_npu {wheel} is made for", "Install CANN 8.3 or newer.")
        )
    else:
        lines.append(ok("CANN", cann))
    lines.append(
        ok("driver", driver)
        if driver
        else warn("driver", f"no {root}/driver/version.info", "Install the driver, or mount it into the container.")
    )
    return lines


def _torch_npu_line(wheel: str, torch: str) -> Line:
    if not wheel:
        return warn("torch_npu", "not installed, but CANN or a driver is", "`pip install 'lightning-npu-tp[npu]'`")
    if torch.split(".")[:2] != wheel.split(".")[:2]:
        release = ".".join(torch.split(".")[:2])
        return fail("torch_npu", f"{wheel} does not fit torch {torch}", f"`pip install torch_npu=={release}.*`")
    return ok("torch_npu", f"{wheel}, for torch {torch}")


def import_of_torch_npu(environ: Mapping[str, str]) -> list[Line]:
    """Whether torch_npu can be imported, tried in another process; nothing where it is not installed."""
    if not _wheel("torch_npu"):
        return []
    if problem := autoload_problem():
        return [fail("import torch_npu", problem, "Install CANN and source its set_env.sh, or remove torch_npu.")]
    said = answer_of([sys.executable, "-c", _TRY], _IMPORT_SECONDS, {**environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    if said.output is None:
        return [
            fail("import torch_npu", said.problem, "Check that torch_npu, torch, CANN and driver are of one release.")
        ]
    count = int(said.output.split("devices")[-1])
    if count:
        return [ok("import torch_npu", f"works, {count} devices")]
    return [warn("import torch_npu", "works, but sees no device", "`npu-smi info` shows what the driver sees.")]


def cards(environ: Mapping[str, str]) -> list[Line]:
    """A line per card: health, free memory, processes on it; nothing without npu-smi."""
    if shutil.which("npu-smi", path=environ.get("PATH")) is None:
        return []
    said = answer_of(["npu-smi", "info"], _SMI_SECONDS, environ)
    if said.output is None:
        return [fail("npu-smi", said.problem, "The driver does not answer: restart it, or the machine.")]
    found, processes = parse_npu_smi(said.output)
    if not found:
        return [warn("npu-smi", "shows no card", "Mount the devices (/dev/davinci0 …) into the container.")]
    lines = []
    for card in found:
        name, free = f"card {card.index}", card.total - card.used
        detail = f"{card.name}, {card.health}, {free:,} of {card.total:,} MB free"
        busy = processes.get(card.index, [])
        if card.health != "OK":
            lines.append(
                fail(name, detail, "Take the card out of use (ASCEND_RT_VISIBLE_DEVICES) and see the driver's log.")
            )
        elif busy or card.used > _IN_USE * card.total:
            who = f", used by {', '.join(busy)}" if busy else ""
            lines.append(warn(name, detail + who, "End what uses it, or leave it out with ASCEND_RT_VISIBLE_DEVICES."))
        else:
            lines.append(ok(name, detail))
    return lines


def parse_npu_smi(text: str) -> tuple[list[Card], dict[int, list[str]]]:
    """Cards, numbered as torch numbers them, and processes by card, of `npu-smi info`.

    A card is two rows: number, name and health; then chip, bus address and memory, of which the last pair is the
    card's own. Rows of processes follow in a table of their own.
    """
    found: list[Card] = []
    by_chip: dict[tuple[str, str], int] = {}
    processes: dict[int, list[str]] = {}
    first: list[str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        if len(cells) == 3 and re.fullmatch(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:.*", cells[1]) and first is not None:
            pairs = re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])
            if pairs:
                npu, name = first[0].split(None, 1)
                by_chip[npu, cells[0].split()[0]] = len(found)
                found.append(Card(len(found), name, first[1], int(pairs[-1][0]), int(pairs[-1][1])))
            first = None
        elif len(cells) == 3 and re.fullmatch(r"\d+\s+\S.*", cells[0]):
            first = cells
        elif len(cells) == 4 and cells[1].isdigit():
            npu, chip = (*cells[0].split(), "0")[:2]
            if (npu, chip) in by_chip:
                processes.setdefault(by_chip[npu, chip], []).append(f"{cells[2]} ({cells[1]})")
    return found, processes


def cann_version(environ: Mapping[str, str], root: Path = ROOT) -> str | None:
    """CANN's version from the files that it installs; None where there is none."""
    homes = [Path(environ[name]) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if environ.get(name)]
    for home in (*homes, root / "ascend-toolkit/latest", root / "cann"):
        files = [*home.glob("*-linux/ascend_toolkit_install.info"), home / "version.info", home / "version.cfg"]
        for file in (*files, home / "compiler/version.info", home / "runtime/version.info"):
            if version := _version_in(file):
                return version
    return None


def exported_settings(environ: Mapping[str, str]) -> list[Line]:
    """A line for each exported variable of HCCL and torch_npu that does not exist or has a value out of range."""
    by_variable = {f.metadata["variable"]: f for f in fields(HcclSettings) if "variable" in f.metadata}
    known = (*by_variable, *_OTHER_VARIABLES, ALLOC_CONF, *_own_switches(environ))
    lines: list[Line] = []
    for name, value in sorted(environ.items()):
        if name in NOT_A_VARIABLE:
            lines.append(warn(name, "is read by neither HCCL nor torch_npu", f"Use instead: {NOT_A_VARIABLE[name]}."))
        elif name in by_variable:
            try:
                HcclSettings(
                    **{by_variable[name].name: _value(value, by_variable[name].metadata)}, **_needs(name, environ)
                )
            except (ConfigError, ValueError) as error:
                lines.append(
                    fail(name, f"{value!r}: {error}", f"Unset it, or set strategy.hccl.{by_variable[name].name}.")
                )
        elif (
            name.startswith(_ALIKE) and name not in known and (near := difflib.get_close_matches(name, known, 1, 0.85))
        ):
            lines.append(warn(name, "is not known", f"Did you mean {near[0]}?"))
    if ALLOC_CONF in environ and "PYTORCH_ALLOC_CONF" in environ:
        lines.append(
            fail(ALLOC_CONF, "PYTORCH_ALLOC_CONF is exported too, which torch_npu refuses", "Unset one of the two.")
        )
    lines += _interface(environ)
    exported = [name for name in environ if name in by_variable]
    return lines or [ok("HCCL settings", f"{len(exported)} exported, none wrong")]


def ports(environ: Mapping[str, str]) -> list[Line]:
    """Whether HCCL's first ports are free, of which each card takes one."""
    first = int(environ["HCCL_IF_BASE_PORT"]) if environ.get("HCCL_IF_BASE_PORT", "").isdigit() else _FIRST_PORT
    busy = [port for port in range(first, first + 16) if not is_free(port)]
    if busy:
        fix = "A process of an earlier run may be alive; end it, or export HCCL_IF_BASE_PORT."
        return [warn("HCCL ports", f"in use: {', '.join(map(str, busy))}", fix)]
    return [ok("HCCL ports", f"{first} to {first + 15} are free")]


def _interface(environ: Mapping[str, str]) -> Iterator[Line]:
    names = [name for _, name in socket.if_nameindex()]
    wanted = environ.get("HCCL_SOCKET_IFNAME", "")
    if wanted and not wanted.startswith("^"):
        given = [part.lstrip("=") for part in wanted.split(",") if part]
        exact = wanted.startswith("=")
        if not any(name == part if exact else name.startswith(part) for name in names for part in given):
            yield fail(
                "HCCL_SOCKET_IFNAME",
                f"{wanted!r} is no network interface of this host",
                f"Set one of: {', '.join(names)}.",
            )
    if address := environ.get("HCCL_IF_IP"):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind((address, 0))
        except OSError as error:
            yield fail(
                "HCCL_IF_IP", f"{address!r} is no address of this host ({error})", "Set one that `ip addr` shows."
            )


def _own_switches(environ: Mapping[str, str]) -> Sequence[str]:
    """Names with these beginnings that torch_npu reads and that are no settings of a run."""
    return [name for name in environ if name.startswith(("TORCH_NPU_FALLBACK", "TORCH_NPU_COMPACT", "TORCH_NPU_LOG"))]


def _value(text: str, metadata: Mapping[str, Any]) -> Any:
    """An exported text as the field would have it; raises ValueError for what is no number."""
    if True in metadata["values"]:
        return {"0": False, "1": True, "false": False, "true": True}.get(text.lower(), text)
    return int(text) if metadata["low"] is not None else text


def _needs(name: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """What else belongs to a variable: the other time-out, or what it needs besides."""
    if name == "HCCL_EXEC_TIMEOUT" and (event := environ.get("HCCL_EVENT_TIMEOUT", "")).isdigit():
        return {"event_timeout_s": int(event)}
    if name == "HCCL_EVENT_TIMEOUT":
        # Told at the other one.
        return {"exec_timeout_s": 0} if "HCCL_EXEC_TIMEOUT" in environ else {}
    return {"op_cache_mode": "enable"} if name == "ACL_OP_COMPILER_CACHE_DIR" else {}


def is_free(port: int) -> bool:
    """Whether this process could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _version_in(file: Path) -> str | None:
    try:
        match = re.search(r"(?im)^\s*(?:package_)?version\s*[=:]\s*\[?([\w.]+)", file.read_text(errors="replace"))
    except OSError:
        return None
    return match.group(1) if match else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _wheel(name: str) -> str:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""
