"""`python -m ascend_sim run -n 4 [options] train.py ARGS`: a Python program as it is, on the simulated card.

The program takes this process's place, so its exit code and the signals it gets are its own.
"""

from __future__ import annotations

import argparse
import os
import sys

import ascend_sim
from ascend_sim import build as building
from ascend_sim import faults

# Options without a value.
_FLAGS = ("--no-check-streams", "--float64", "-h", "--help")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ascend_sim", description="The real torch_npu on a simulated card.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        usage="python -m ascend_sim run [options] (SCRIPT | -m MODULE) [ARGS …]",
        help="run a Python script or module; everything it starts sees the simulated card too",
    )
    run.add_argument("-n", "--devices", type=int, help="devices of this machine (4)")
    run.add_argument("--memory-gib", type=float, help="memory of each device in GiB (64)")
    run.add_argument("--soc", help="name of the chip (Ascend910B3)")
    run.add_argument("--cann", help="version of CANN that torch_npu is told (8.5.0)")
    run.add_argument("--no-check-streams", action="store_true", help="do not look for missing synchronisation")
    run.add_argument("--delay-us", type=int, help="how late queued copies and collectives run, in microseconds (0)")
    run.add_argument(
        "--float64", action="store_true", help="compute in float64 too, as no card does, to compare without rounding"
    )
    run.add_argument("--fault", action="append", default=[], help="NAME:key=value,… as in ascend_sim/faults.py")
    run.add_argument("--report-dir", help="folder for one JSON report per process")
    build = commands.add_parser("build", help="build the libraries now and print their folder")
    for command in (run, build):
        command.add_argument("--sanitize", choices=building.SANITIZERS, help="the simulator's libraries, instrumented")
    return parser


# Python and torch are not instrumented: their leaks, and what they do without a lock that is seen, are not looked for.
# Faults are left to the simulator's own handler and to faulthandler.
_SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:handle_segv=0",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:report_signal_unsafe=0:handle_segv=0",
}


def _sanitize(kind: str) -> None:
    """Start this process again with the sanitizer's library in front, unless it is there."""
    preloads = building.preloads(kind)
    os.environ[building.SANITIZE] = kind
    if preloads in os.environ.get("LD_PRELOAD", ""):
        return
    os.environ["LD_PRELOAD"] = f"{preloads} {os.environ.get('LD_PRELOAD', '')}".strip()
    for variable, ours in _SANITIZER_OPTIONS.items():
        # What is given comes last and wins.
        os.environ[variable] = ":".join(filter(None, (ours, os.environ.get(variable))))
    os.execv(sys.executable, [sys.executable, "-m", "ascend_sim", *sys.argv[1:]])


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the program's: from its name, `-m`, `-c` or what follows `--`."""
    at = 1
    while at < len(arguments) and arguments[at].startswith("-") and arguments[at] not in ("-m", "-c", "--"):
        # What is written apart from its option is passed over with it.
        at += 1 if "=" in arguments[at] or arguments[at] in _FLAGS else 2
    return arguments[:at], arguments[at + 1 :] if arguments[at : at + 1] == ["--"] else arguments[at:]


def main(arguments: list[str]) -> int:
    """Run the command; `run` does not return."""
    parser = _parser()
    own, program = _split(arguments)
    options = parser.parse_args(own)
    try:
        if options.command == "build":
            if options.sanitize:
                os.environ[building.SANITIZE] = options.sanitize
            print(building.libraries())
            return 0
        if not program:
            parser.error("run needs a script, or -m and a module")
        if options.sanitize:
            _sanitize(options.sanitize)
        if options.report_dir:
            os.environ["ASCEND_SIM_REPORT_DIR"] = os.path.abspath(options.report_dir)
        if options.fault:
            before = [os.environ[faults.VARIABLE]] if os.environ.get(faults.VARIABLE) else []
            os.environ[faults.VARIABLE] = ";".join([*before, *options.fault])
        ascend_sim.install(
            options.devices,
            options.memory_gib,
            options.soc,
            cann=options.cann,
            check_streams=False if options.no_check_streams else None,
            delay_us=options.delay_us,
            float64=True if options.float64 else None,
        )
        # A name of an operator is checked by whoever imports torch.
        faults.check_environment()
    except (ascend_sim.BuildError, ascend_sim.SimulatorError, ValueError) as error:
        print(f"ascend_sim: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *program])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
