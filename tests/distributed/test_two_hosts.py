"""Two hosts, as network namespaces joined by a pair of virtual interfaces, and a link that is cut in mid-training.

Catches: ranks on another host that train something else, processes that outlive a cut link, and an error that does
not say which operation of which group waited for which host. Also ranks under SLURM that each claim the run folder.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts_launcher.runs import REPOSITORY, Run

from lightning_npu_tp.tools.testing.ranks import free_port

TIMEOUT_S = 6
PORT = 29511
SETTINGS = [
    "trainer.max_steps=100000",
    "trainer.val_check_interval=100000",
    "validate_before=false",
    "scheduler=constant",
    "scheduler.warmup_steps=1",
    "data.batch_size=2",
    "data.sequence_length=64",
    "data.max_tokens=50_000",
    "data.max_val_tokens=2_000",
    "logger.csv.flush_every_n_rows=1",
    f"strategy.timeout_s={TIMEOUT_S}",
]
STEPS = 3


class TwoHosts:
    """Namespaces a and b with the addresses .1 and .2 of a subnet that exists only inside them."""

    def __init__(self) -> None:
        pid = os.getpid()
        self.names = [f"npu-tp-{pid}-{letter}" for letter in "ab"]
        # Interface names have 15 characters at most.
        self.interfaces = [f"v{pid}{letter}" for letter in "ab"]
        self.addresses = [f"10.231.{pid % 250}.{number}" for number in (1, 2)]

    def up(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.interfaces
        ip("link", "add", first, "type", "veth", "peer", "name", second)
        for name, interface, address in zip(self.names, self.interfaces, self.addresses, strict=True):
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", interface, "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.interfaces[1], "down")

    def down(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        # Still here if it was never moved into a namespace.
        subprocess.run(["ip", "link", "del", self.interfaces[0]], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    two = TwoHosts()
    try:
        try:
            two.up()
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"network namespaces cannot be made here (they need Linux, iproute2 and root): {why.strip()}")
        yield two
    finally:
        two.down()


def losses(file: Path) -> list[str]:
    """The training losses that stand in a metrics file so far, as written."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [row["train/loss"] for row in csv.DictReader(lines) if row.get("train/loss")]


def until_losses(file: Path, count: int, *runs: Run, seconds: float = 90) -> list[float]:
    deadline = time.monotonic() + seconds
    # One more than asked for: the last line may be half written.
    while len(found := losses(file)) <= count:
        assert all(run.process.poll() is None for run in runs) and time.monotonic() < deadline, "\n".join(
            map(str, runs)
        )
        time.sleep(0.05)
    return [float(loss) for loss in found[:count]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """The first losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run = Run(REPOSITORY / "train.py", "trainer.devices=1", "hydra.run.dir=out", *SETTINGS, folder=folder)
    try:
        return until_losses(folder / "out" / "metrics.csv", STEPS, run)
    finally:
        run.kill()


def test_two_hosts_train_as_one_and_a_cut_link_ends_both_with_the_silent_hosts_name(hosts, alone, tmp_path) -> None:
    runs: list[Run] = []
    out = tmp_path / "0" / "out"
    try:
        for node, (name, interface) in enumerate(zip(hosts.names, hosts.interfaces, strict=True)):
            torchrun = [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2",
                f"--node-rank={node}", f"--master-addr={hosts.addresses[0]}", f"--master-port={PORT}",
            ]  # fmt: skip
            layout = ["trainer.devices=2", "++trainer.num_nodes=2", "hydra.run.dir=out"]
            script = [REPOSITORY / "train.py", *layout, *SETTINGS]
            enter = "import os, sys; os.execvp('ip', ['ip', 'netns', 'exec', *sys.argv[1:]])"
            variables = {"GLOO_SOCKET_IFNAME": interface}
            runs.append(Run("-c", enter, name, *torchrun, *script, folder=tmp_path / str(node), **variables))
        apart = until_losses(out / "metrics.csv", STEPS, *runs)

        hosts.cut()
        cut = time.monotonic()
        codes = [run.end(TIMEOUT_S + 15 - (time.monotonic() - cut)) for run in runs]
        assert codes == [1, 1]
    finally:
        for run in runs:
            run.kill()

    for run, silent in zip(runs, ("[node 1] (ranks 2 and 3)", "[node 0] (ranks 0 and 1)"), strict=True):
        told = [line.strip() for line in run.stderr.splitlines() if " group (rank" in line]
        assert told, run
        for line in told:
            assert f"{silent} is silent" in line, line
            assert any(line.startswith(word) for word in ("all_", "reduce_", "barrier")), line
    assert apart == pytest.approx(alone, rel=1e-4)


def test_ranks_that_slurm_starts_on_two_nodes_are_one_run_in_one_folder(alone, tmp_path) -> None:
    slurm = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    runs: list[Run] = []
    settings = [*SETTINGS, f"hydra.run.dir={tmp_path / 'out'}", "trainer.devices=1", "++trainer.num_nodes=2"]
    try:
        for rank in "01":
            variables = {**slurm, "SLURM_PROCID": rank, "SLURM_NODEID": rank}
            runs.append(Run(REPOSITORY / "train.py", *settings, folder=tmp_path / rank, **variables))
        assert until_losses(tmp_path / "out" / "metrics.csv", STEPS, *runs) == pytest.approx(alone, rel=1e-4)
    finally:
        for run in runs:
            run.kill()
