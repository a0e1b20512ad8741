"""A process that ends when its parent does, from before its first import; also a program that becomes another one.

Linux alone has a signal for it. Nothing of the package is imported here: as a program this file runs in an interpreter
without site packages, between fork and exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process when its parent dies; end it at once if that has happened already.

    parent: process id of the one that started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before prctl.
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    # PARENT COMMAND...: the signal survives exec.
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
