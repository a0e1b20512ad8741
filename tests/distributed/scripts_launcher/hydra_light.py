"""A Hydra job that starts one rank, without Torch and Lightning; each process says what its config is."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import hydra
import stand_ins  # noqa: F401
from hydra.utils import get_original_cwd
from omegaconf import OmegaConf
from say import say

from lightning_npu_tp.launch.child_process import ChildProcess, parent_channel
from lightning_npu_tp.launch.hydra_job import current_job
from lightning_npu_tp.launch.sweep import run_job


def save(*_):
    time.sleep(11)
    say("SAVED")
    sys.exit(143)


def task(config):
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    # What the script itself changes must reach the values that follow it, in every rank.
    config.base += 1
    seen = OmegaConf.to_container(config, resolve=True)
    say(
        "JOB",
        json.dumps([config.lr, rank, os.getpid(), seen | {"cwd": os.getcwd(), "from": get_original_cwd()}]),
    )
    if config.then == "save":
        # As a strategy does that needs longer than others to save; what others have is 10 seconds.
        parent_channel().send("grace", seconds=20.0)
        signal.signal(signal.SIGTERM, save)
    if config.then in ("wait", "save"):
        say("WAITS")
        time.sleep(100)
    if rank == 0:
        # An edit of the files must not reach the ranks of a job that has been composed already.
        Path(os.environ["CONF"], "group", "first.yaml").write_text("name: edited\n")
        job = current_job()
        child = ChildProcess(
            "rank 1",
            job.command(name="rank_1", output_subdir=None),
            env=os.environ | {"LOCAL_RANK": "1"},
            cwd=job.original_cwd,
        )
        assert child.process.wait() == 0, child.tail()
        if config.lr == 2:
            raise ValueError("a learning rate of 2")
    return {"loss": config.lr / 2}


@hydra.main(version_base="1.3", config_path=None, config_name="given by the command line")
def main(config):
    say("VALUE", os.getpid(), json.dumps(run_job(task, config)))


if __name__ == "__main__":
    sys.argv[0] = os.path.relpath(sys.argv[0])
    main()
