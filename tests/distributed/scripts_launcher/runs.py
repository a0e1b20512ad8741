"""Start a script in a session of its own and see how it ends, for the tests beside this folder."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil

SCRIPTS = Path(__file__).parent
REPOSITORY = SCRIPTS.parents[2]


class Run:
    """One run of a script and of everything that it starts.

    The session tells which processes belong to it, also when their parents are gone.
    """

    def __init__(self, *arguments, folder, **variables):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        env = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        env["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), str(REPOSITORY)])
        with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=folder,
                env=env | variables,
                start_new_session=True,
                # A test session in a shell's background has it ignored, and what it starts would, too.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
            )

    @property
    def stdout(self):
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self):
        return (self.folder / "stderr").read_text(errors="replace")

    def __str__(self):
        return f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"

    def until(self, text, seconds=120):
        """Wait until stdout holds this."""
        deadline = time.monotonic() + seconds
        while text not in self.stdout:
            assert self.process.poll() is None and time.monotonic() < deadline, f"never said {text!r}\n{self}"
            time.sleep(0.02)
        return self

    def said(self, word):
        """What stands after this word, for each line of stdout that begins with it."""
        return [line.removeprefix(word).strip() for line in self.stdout.splitlines() if line.startswith(word)]

    def end(self, seconds):
        """Wait for the end, at most this long; everything must be gone then. Returns the exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            left = self.left()
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {left}\n{self}") from None
        deadline = time.monotonic() + 2
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        assert not left, f"outlived the run: {left}\n{self}"
        return code

    def left(self):
        """The processes of this session that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process.pid, process.cmdline()))
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def interrupt(self):
        """What a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self):
        """Kill what is left of this session."""
        for pid, _ in self.left():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
