"""Say what a failed collective was: the operation, the group and its ranks, and the host that is silent.

torch's own error says how long it waited. The rest is read from the traceback when it is too late for anything else:
the innermost frame inside torch.distributed names the operation and holds its group. So training pays nothing. What a
code of HCCL in the text means is `devices/fault_text.py`'s; errors of the device that a collective only happens to meet
are `explain_device.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import FrameType, TracebackType

import torch.distributed as dist

from lightning_npu_tp.devices.fault_text import find_fault, is_communication, may_be_lost_peer
from lightning_npu_tp.launch.host_watch import Answer, HostWatch
from lightning_npu_tp.launch.hosts import ranks_in_words
from lightning_npu_tp.parallel.layout import DATA_AXIS, EXPERT_AXIS, EXPERT_REPLICA_AXIS, TENSOR_AXIS

# DeviceMesh calls its groups mesh_<axis>; "tensor group" is what the settings call it.
_MESH_GROUPS = {
    f"mesh_{DATA_AXIS}": "data",
    f"mesh_{TENSOR_AXIS}": "tensor",
    f"mesh_{EXPERT_AXIS}": "expert",
    f"mesh_{EXPERT_REPLICA_AXIS}": "expert replica",
}
# Its name, and its group if that is known.
Collective = tuple[str, dist.ProcessGroup | None]
_WRAPPERS = ("c10d_logger.py", "device_mesh.py")


def failed_collective(error: BaseException) -> Collective | None:
    """The collective that this error is the failure of; None for any other error.

    An error that says nothing of another rank, and no code of HCCL, is not taken for one.
    """
    fault = find_fault(str(error))
    is_one = is_communication(fault) if fault is not None else may_be_lost_peer(error)
    return _operation(error.__traceback__) if is_one else None


def about_collective(error: BaseException, collective: Collective, watch: HostWatch | None) -> str:
    """What failed, over which ranks, and what to do. Asks the other hosts, which may take a few seconds.

    watch: the run's hosts, None if they were never met.
    """
    text = str(error).strip()
    fault = find_fault(text)
    # A broken pipe inside of a collective is the other rank's; the table tells of pipes to compilers.
    meaning = "" if fault is None or fault.code == "BrokenPipe" else f"{fault.sentence()} "
    reason = re.sub(r"^\[[^]]*\] *", "", text.splitlines()[0]).rstrip(".") if text else type(error).__name__
    if not dist.is_initialized():
        return (
            f"The ranks did not meet: {reason}. {meaning}Start them all within strategy.timeout_s, with one "
            f"MASTER_ADDR and MASTER_PORT that every host reaches; if one ended before, look there for the cause."
        )
    operation, group = collective
    answers = watch.ask() if watch is not None else []
    where = f" on rank {watch.rank} of host {watch.here.name}" if watch is not None else ""
    return f"{operation} over {_group_in_words(group)} failed{where}: {reason}. {meaning}{_verdict(watch, answers)}"


def _operation(traceback: TracebackType | None) -> Collective | None:
    """Name and group of the innermost collective in a traceback; None if it never was in torch.distributed."""
    frames = [frame for frame, _ in frames_of(traceback)]
    for frame in reversed(frames):
        file = frame.f_code.co_filename.replace("\\", "/")
        if "torch/distributed/" in file and not file.endswith(_WRAPPERS):
            return frame.f_code.co_name, _group_in(frame) or _group_further_out(frames, frame)
    # An operation that was started earlier and is waited for here has no frame in torch.distributed.
    for frame in reversed(frames):
        if (group := _group_in(frame)) is not None:
            return f"the operation waited for in {frame.f_code.co_name}", group
    return None


def _group_further_out(frames: list[FrameType], frame: FrameType) -> dist.ProcessGroup | None:
    outside = reversed(frames[: frames.index(frame)])
    return next((group for outer in outside if (group := _group_in(outer)) is not None), None)


def _group_in(frame: FrameType) -> dist.ProcessGroup | None:
    """A process group among a frame's variables, `group` first; also what an autograd context keeps."""
    values = frame.f_locals
    candidates = [values.get("group"), *values.values(), getattr(values.get("ctx"), "group", None)]
    return next((value for value in candidates if isinstance(value, dist.ProcessGroup)), None)


def _group_in_words(group: dist.ProcessGroup | None) -> str:
    if group is None or group is dist.group.WORLD:
        return f"the world group ({ranks_in_words(range(dist.get_world_size()))})"
    ranks = sorted(dist.get_process_group_ranks(group))
    name = _MESH_GROUPS.get(group.group_desc, group.group_desc)
    return f"the {name} group ({ranks_in_words(ranks)})"


def _verdict(watch: HostWatch | None, answers: list[Answer]) -> str:
    """What the other hosts said, and what to do."""
    silent = [answer for answer in answers if answer.state == "silent"]
    ended = [answer for answer in answers if answer.state == "ended"]
    sentences = [
        f"Host {answer.host} is silent, asked once more as well ({answer.reason}). Check that machine and the network "
        f"to it."
        for answer in silent
    ]
    sentences += [
        f"Host {answer.host} answers, but its processes of this run have ended: look there for the cause."
        for answer in ended
    ]
    if sentences:
        return " ".join(sentences)
    if watch is None or len(watch.hosts) == 1:
        return (
            "All ranks are on this host: look for one that ended or hangs, or raise strategy.timeout_s if it is slow."
        )
    unasked = [str(host) for host in watch.hosts if host != watch.here and all(host != a.host for a in answers)]
    if unasked:
        return (
            f"Not known to answer, because their ports could not be reached at the start either: {', '.join(unasked)}."
        )
    return "Every host answers: look for a rank that ended or hangs, or raise strategy.timeout_s if one is only slow."


def frames_of(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """Each frame with its line, outermost first; not the first of a traceback, which handles the error.

    Looking at the variables of that one would let it hold the error, and all that the error holds, for good.
    """
    while traceback is not None and (traceback := traceback.tb_next) is not None:
        yield traceback.tb_frame, traceback.tb_lineno
