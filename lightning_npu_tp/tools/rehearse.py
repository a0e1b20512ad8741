"""A run on the simulated Ascend, and what its processes report: HCCL traffic, memory, CPU fallbacks, host waits.

Starts a command as it is with the simulated card in its environment and adds up the reports that the processes
leave. The card itself is the package `ascend_sim`; how the sum is shown is the command `rehearse`'s.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_npu_tp.errors import ConfigError

# As `ascend_sim` spells them; its module is imported only for a rehearsal.
_REPORT_DIR = "ASCEND_SIM_REPORT_DIR"
_TRACE_SYNCS = "ASCEND_SIM_TRACE_SYNCS"
_FAULTS = "ASCEND_SIM_FAULTS"
_TRAFFIC = re.compile(r"hccl\.(\w+)\[(.*)\]\.(calls|bytes)")
_PEAK = re.compile(r"memory\.peak\.(\d+)")


@dataclass
class ProcessReport:
    """What one process did on the simulated card.

    peaks:     device -> most bytes that the process held there.
    traffic:   (operation, group) -> [calls, bytes sent or reduced by this process].
    fallbacks: operator -> how often it ran on the CPU.
    waits:     "call file:line" -> how often the host waited for the device there.
    """

    pid: int
    rank: str | None
    peaks: dict[int, int] = field(default_factory=dict)
    traffic: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    fallbacks: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    misuses: int = 0

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> ProcessReport:
        """The report in the content of the file that a process left."""
        report = cls(pid=content["pid"], rank=content["rank"], waits=Counter(content["synchronisations"]))
        for name, value in content["counters"].items():
            if match := _TRAFFIC.fullmatch(name):
                report.traffic.setdefault((match[1], match[2]), [0, 0])[match[3] == "bytes"] = value
            elif match := _PEAK.fullmatch(name):
                report.peaks[int(match[1])] = value
            elif name.startswith("fallback."):
                report.fallbacks[name.removeprefix("fallback.")] = value
            elif name == "stream_misuse":
                report.misuses = value
        return report

    @property
    def used_a_card(self) -> bool:
        """Whether the process held memory of any device."""
        return any(self.peaks.values())


@dataclass(frozen=True)
class Rehearsal:
    """A run that has ended: its exit code (128 + number for a signal), and the processes that used a card."""

    exit_code: int
    processes: list[ProcessReport]

    @property
    def fallbacks(self) -> Counter[str]:
        """Operator -> how often it ran on the CPU, in all processes."""
        return sum((process.fallbacks for process in self.processes), Counter())

    @property
    def waits(self) -> Counter[str]:
        """Where the host waited for the device, in all processes."""
        return sum((process.waits for process in self.processes), Counter())

    @property
    def misuses(self) -> int:
        """Accesses to device memory that no event or wait put in order."""
        return sum(process.misuses for process in self.processes)

    @property
    def traffic(self) -> dict[tuple[str, str], list[int]]:
        """(operation, group) -> [calls, bytes], in all processes."""
        total: dict[tuple[str, str], list[int]] = {}
        for process in self.processes:
            for key, (calls, nbytes) in process.traffic.items():
                entry = total.setdefault(key, [0, 0])
                entry[0] += calls
                entry[1] += nbytes
        return total

    def as_json(self) -> dict[str, Any]:
        """Exit code, processes, traffic, fallbacks and host waits as plain data."""
        return {
            "exit_code": self.exit_code,
            "processes": [
                {"pid": p.pid, "rank": p.rank, "peak_bytes": p.peaks, "fallbacks": p.fallbacks} for p in self.processes
            ],
            "traffic": [
                {"operation": operation, "group": group, "calls": calls, "bytes": nbytes}
                for (operation, group), (calls, nbytes) in sorted(self.traffic.items())
            ],
            "fallbacks": self.fallbacks,
            "host_waits": self.waits,
            "unordered_accesses": self.misuses,
        }


def read_reports(folder: Path) -> list[ProcessReport]:
    """The processes that used a card, by rank; a file that a killed process left half-written is passed over."""
    reports = []
    for file in sorted(folder.glob("*.json")):
        try:
            reports.append(ProcessReport.read(json.loads(file.read_text())))
        except json.JSONDecodeError:
            continue
    return sorted((r for r in reports if r.used_a_card), key=lambda r: (min(r.peaks), r.pid))


def rehearse(
    command: Sequence[str],
    *,
    devices: int,
    memory_gib: float | None = None,
    soc: str | None = None,
    float64: bool = False,
    faults: Iterable[str] = (),
    report_dir: Path | None = None,
) -> Rehearsal:
    """Run the command under the simulated card and add up what its processes report.

    command: a name without a folder is looked for beside this Python first: `python` is this one.
    devices, memory_gib, soc, float64: see `ascend_sim.install`. faults: see `ascend_sim/faults.py`.
    report_dir: where the reports stay; a temporary folder by default. Must hold no reports yet.
    Raises ConfigError when the simulator or the command cannot be started; the run's own failure is its exit code.
    """
    if not command:
        raise ConfigError("There is no command to rehearse. Write it behind `--`: rehearse -n 4 -- python train.py …")
    with tempfile.TemporaryDirectory() as temporary:
        folder = report_dir or Path(temporary)
        if any(folder.glob("*.json")):
            raise ConfigError(
                f"--report-dir {folder} holds reports of another run. Name a new folder, or an empty one."
            )
        environment = _environment(folder, devices, memory_gib, soc, float64, list(faults))
        try:
            run = subprocess.Popen(list(command), env=environment)
        except OSError as error:
            raise ConfigError(
                f"{command[0]} cannot be started: {error.strerror or error}. Check the command behind --."
            ) from error
        with _passed_on(run):
            code = run.wait()
        return Rehearsal(exit_code=128 - code if code < 0 else code, processes=read_reports(folder))


def _environment(
    folder: Path, devices: int, memory_gib: float | None, soc: str | None, float64: bool, faults: list[str]
) -> dict[str, str]:
    import ascend_sim

    before = dict(os.environ)
    try:
        if faults:
            os.environ[_FAULTS] = ";".join([*filter(None, [os.environ.get(_FAULTS)]), *faults])
        # The environment is what a child inherits the card by; this process only hands it on.
        ascend_sim.install(devices, memory_gib, soc, float64=float64 or None)
        # The environment need not be activated: another Python would not have this one's torch_npu.
        path = os.pathsep.join(filter(None, (os.path.dirname(sys.executable), os.environ.get("PATH"))))
        return {**os.environ, "PATH": path, _REPORT_DIR: str(folder.resolve()), _TRACE_SYNCS: "1"}
    except (ascend_sim.BuildError, ascend_sim.SimulatorError, ValueError) as error:
        raise ConfigError(f"The simulated card cannot be made: {error}") from error
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _passed_on(run: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand SIGTERM on to the run, and leave Ctrl-C to it: the terminal sends that to both."""
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: run.send_signal(number)),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
