"""The log that CANN writes for each process, where a code stands that an error of torch_npu has left out.

Source: CANN's documentation of its logs: $ASCEND_PROCESS_LOG_PATH or ~/ascend/log, in it debug/plog/plog-PID_TIME.log
of the host's side, lines as "[ERROR] MODULE(PID,NAME):TIME [FILE:LINE]TEXT".
"""

from __future__ import annotations

import os
from pathlib import Path

_LAST = 6


def place_of_logs(pid: int) -> Path:
    """Pattern of the files in which that process's log is; there may be none."""
    folder = Path(os.environ.get("ASCEND_PROCESS_LOG_PATH") or Path.home() / "ascend" / "log")
    return folder / "debug" / "plog" / f"plog-{pid}_*.log"


def logged_errors(pid: int) -> str:
    """The last errors of that process's newest log, after a line that names the file; "" if there are none."""
    pattern = place_of_logs(pid)
    try:
        logs = sorted(pattern.parent.glob(pattern.name))
        lines = logs[-1].read_text(errors="replace").splitlines() if logs else []
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("[ERROR]")]
    # What a dead launch queue says of each thing that it drops comes after the cause and hides it.
    told = [line for line in errors if "CAN_EXIT" not in line][-_LAST:]
    return "\n".join([f"From {logs[-1]}:", *told]) if told else ""
