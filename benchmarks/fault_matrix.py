"""Every fault of the table, each while connecting, in a forward or backward pass and in a save; on simulated cards.

    python benchmarks/fault_matrix.py --json benchmarks/results/fault_matrix_sim_2026-11.json
    python benchmarks/fault_matrix.py --codes EI0002 507015 --places forward save --verbose

Needs torch_npu and a C++ compiler (see docs/simulator.md). Two ranks train a small DeepSeek-V2 from a checkpoint on the
real torch_npu, with a checkpoint after every step; a call of rank 1 fails with the code where the case says. Both ranks
must end by themselves with another exit code than 0 and within the time given, rank 1 must name the rank, the cause and
the remedy as the table has them, no process and no shared-memory file may be left, and the newest checkpoint must be
whole.

To be quick the ranks are forked from one process that has imported everything and used no card.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import ascend_sim

ascend_sim.install()

import torch  # noqa: E402
import torch_npu  # noqa: E402, F401
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, DeepseekV2Config  # noqa: E402

from lightning_npu_tp import NPUTensorParallelStrategy  # noqa: E402
from lightning_npu_tp.checkpoint.manifest import newest_complete  # noqa: E402
from lightning_npu_tp.devices.fault_table import COLLECTIVES, FAULTS, Fault  # noqa: E402

PLACES = ("connect", "forward", "backward", "save")
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
COLLECTIVE_CALLS = ("HcclAllReduce", "HcclAllGather", "HcclReduceScatter", "HcclBroadcast", "HcclAlltoAllV")
COPIES = ("aclrtMemcpyAsync", "aclrtMemcpy", "aclrtSynchronizeStreamWithTimeout", "aclrtSynchronizeStream")
ALLOCATIONS = ("aclrtMalloc", "aclrtMallocAlign32", "aclrtMallocPhysical")
# Where HCCL itself fails it returns one of its own codes; the one of the table is in the text.
HCCL_CODES = {"EI0002": 9, "EI0006": 9, "EI0015": 9, "EI0001": 1, "EI0003": 1, "EI0007": 3, "EI0011": 3}
HCCL_OTHER = 4
# Not of a card, or a matter of time and not of a call: the simulator's own tests show them.
LEFT_OUT = {
    "NCCL": "the library of CUDA",
    "watchdog": "told by a thread of torch_npu when a collective does not end, see tests/sim/test_hccl_failures.py",
    "host out of memory": "torch_npu 2.13 does not ask whether memory was pinned, and ends with a segmentation fault",
    "launch queue": "not a fault of a call, but what is told where torch_npu loses the text of one",
    "BrokenPipe": "of the processes in which CANN compiles operators, which the simulator does not have",
}


# What cannot happen there.
NOWHERE = {("out of memory", "save"): "a save copies to the host and allocates nothing on the card"}


@dataclass
class Case:
    """What happened: exit codes of both ranks, seconds, and what is wrong, if anything."""

    code: str
    place: str
    exit_codes: list[int]
    seconds: float
    struck: bool
    wrong: list[str]


class Job(LightningModule):
    """A small DeepSeek-V2."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network = AutoModelForCausalLM.from_config(DeepseekV2Config(**CONFIG))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Strike(Callback):
    """Sets the fault when training comes to the place."""

    def __init__(self, place: str, fault: Fault, struck: Path) -> None:
        self.place, self.fault, self.struck, self.stack = place, fault, struck, ExitStack()

    def strike(self, place: str) -> None:
        if place == self.place:
            if self.fault.code == "out of memory":
                # What the allocator has in its cache it need not ask the card for.
                torch.npu.empty_cache()
            for call, options in calls(self.fault, place):
                self.stack.enter_context(ascend_sim.inject(call, **options))
            self.struck.touch()

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.strike("forward")

    def on_before_backward(self, *arguments: Any) -> None:
        self.strike("backward")

    def on_save_checkpoint(self, *arguments: Any) -> None:
        self.strike("save")


def calls(fault: Fault, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The calls that fail with this code at the place, and how; whichever comes first is the one that is seen."""
    text = f"{fault.code}: [PID: 1] injected"
    if fault.code == "out of memory":
        yield from ((call, {"code": 207001, "times": 0}) for call in ALLOCATIONS)
    elif fault in COLLECTIVES:
        code = HCCL_CODES.get(fault.code, HCCL_OTHER)
        names = ("HcclCommInitRootInfoConfig", "HcclCommInitRootInfo") if place == "connect" else COLLECTIVE_CALLS
        yield from ((name, {"code": code, "text": text}) for name in names)
        if place == "save":
            # A collective that failed on its stream is told by the next call that waits for the stream.
            yield from ((name, {"code": 507048, "text": text}) for name in COPIES)
    elif fault.code.isdigit():
        # While training runs nothing waits; what a device reports it reports of work that was accepted.
        names = {"connect": ("aclrtCreateEventExWithFlag", "aclrtCreateStreamWithConfig"), "save": COPIES}
        yield from ((name, {"code": int(fault.code)}) for name in names.get(place, ("stream",)))
    else:
        # An operator that CANN turns down: the code is in its text.
        names = ("aclrtCreateEventExWithFlag",) if place == "connect" else COPIES if place == "save" else ("stream",)
        yield from ((name, {"code": 561103, "text": text}) for name in names)


def train(folder: Path, extra: Sequence[Callback], steps: int) -> None:
    """One or more steps from the newest checkpoint of the folder, each followed by a checkpoint."""
    torch.manual_seed(0)
    keep = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="npu",
        devices=2,
        strategy=NPUTensorParallelStrategy(tensor_parallel_size=2, init_seed=0, timeout_s=15),
        max_steps=steps,
        callbacks=[keep, *extra],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    newest = newest_complete(folder)
    # Large enough for activations that do not fit into what the allocator has at hand.
    data = DataLoader(torch.randint(0, 64, (128, 128)), batch_size=32)
    trainer.fit(Job(), data, ckpt_path=newest)


def rank_main(rank: int, port: int, folder: Path, place: str, fault: Fault | None, output: Path, steps: int) -> int:
    """What a forked rank does; returns its exit code."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="faults",
        TORCHELASTIC_USE_AGENT_STORE="False", HCCL_EXEC_TIMEOUT="10", HCCL_CONNECT_TIMEOUT="6",
        ASCEND_PROCESS_LOG_PATH=str(output.parent / "log"),
    )  # fmt: skip
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        struck = output.with_suffix(".struck")
        strike = Strike(place, fault, struck) if fault is not None and rank == 1 else None
        if strike is not None:
            strike.strike("connect")
        train(folder, [strike] if strike else [], steps)
        return 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def run_ranks(folder: Path, place: str, fault: Fault | None, place_of_output: Path, steps: int, limit: float) -> Any:
    """Fork both ranks and wait; returns exit codes (None: had to be killed), seconds, outputs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = [place_of_output / f"rank{rank}.log" for rank in range(2)]
    begin, children = time.monotonic(), {}
    for rank, output in enumerate(outputs):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            code = 1
            with contextlib.suppress(BaseException):
                code = rank_main(rank, port, folder, place, fault, output, steps)
            os._exit(code)
        children[child] = rank
    codes: dict[int, int | None] = {}
    while len(codes) < 2 and time.monotonic() - begin < limit:
        for child in children:
            if children[child] not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[children[child]] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    seconds = time.monotonic() - begin
    for child, rank in children.items():
        if rank not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            codes[rank] = None
    return [codes[0], codes[1]], seconds, [output.read_text(errors="replace") for output in outputs]


def leftovers() -> set[str]:
    """Files in shared memory, and processes of this one."""
    running = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    # Semaphores are those of multiprocessing, which nobody uses here.
    files = {file.name for file in Path("/dev/shm").iterdir() if not file.name.startswith("sem.mp-")}
    return files | set(running)


def run_case(code: str, place: str, good: Path, room: Path, limit: float, verbose: bool) -> Case:
    """One cell of the matrix."""
    fault = next(fault for fault in FAULTS if fault.code == code)
    folder = room / "checkpoints"
    shutil.copytree(good, folder)
    before = leftovers()
    codes, seconds, outputs = run_ranks(folder, place, fault, room, 4, limit)
    struck = (room / "rank1.struck").exists()
    wrong = []
    if not struck:
        wrong.append("training did not come to the place")
    if None in codes:
        wrong.append(f"ranks {[rank for rank in range(2) if codes[rank] is None]} had to be killed after {limit:g} s")
    if 0 in codes:
        wrong.append(f"exit codes {codes}")
    told = re.sub(r"\s+", " ", outputs[1])
    for what, part in (
        ("title", fault.title),
        ("check", fault.check),
        ("cause", fault.cause),
        ("change", fault.change),
    ):
        # For memory the remedies are computed from the run, and the title is in the first line's own words.
        computed = fault.code == "out of memory" and "NPU out of memory" in told and "This rank held" in told
        if part not in told and not computed:
            wrong.append(f"the {what} is not told")
    if "rank 1" not in told:
        wrong.append("the rank is not told")
    if left := leftovers() - before:
        wrong.append(f"left behind: {sorted(left)}")
    newest = newest_complete(folder, checksums=True)
    if newest is None or (place == "connect" and newest.name != newest_complete(good).name):  # type: ignore[union-attr]
        wrong.append(f"the newest checkpoint is {newest}")
    if verbose or wrong:
        print(f"--- {code} in {place}, rank 0\n{outputs[0][-6000:]}\n--- rank 1\n{outputs[1][-3000:]}", flush=True)
    return Case(code, place, codes, round(seconds, 2), struck, wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", nargs="+", default=[f.code for f in FAULTS if f.code not in LEFT_OUT])
    parser.add_argument("--places", nargs="+", default=list(PLACES), choices=PLACES)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds in which both ranks must have ended")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        good = Path(temporary) / "good"
        good.mkdir()
        codes, _, outputs = run_ranks(good, "", None, Path(temporary), 1, 120)
        assert codes == [0, 0] and newest_complete(good) is not None, outputs
        for code in given.codes:
            for place in given.places:
                if (code, place) in NOWHERE:
                    continue
                room = Path(temporary) / f"{code}-{place}".replace(" ", "_")
                room.mkdir()
                case = run_case(code, place, good, room, given.limit, given.verbose)
                cases.append(case)
                print(
                    f"{code:>20} {place:8} {case.seconds:6.2f} s  {case.exit_codes}  {case.wrong or 'ok'}", flush=True
                )
                shutil.rmtree(room)
    result = {
        "cases": len(cases),
        "as_they_must_be": sum(not case.wrong for case in cases),
        "longest_seconds": max(case.seconds for case in cases),
        "left_out": LEFT_OUT | {f"{code} in {place}": reason for (code, place), reason in NOWHERE.items()},
        "table": [asdict(case) for case in cases],
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "command": "python benchmarks/fault_matrix.py " + " ".join(sys.argv[1:]),
    }
    print(json.dumps({name: value for name, value in result.items() if name != "table"}, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(any(case.wrong for case in cases))


if __name__ == "__main__":
    main()
