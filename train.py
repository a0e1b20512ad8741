"""Train what conf/ describes: `python train.py trainer.devices=4 optimizer.lr=1e-3`; `-m` sweeps.

Composes the config, builds its parts, validates, fits, validates again. Nothing else lives here: the
parts are in lit_models/ and lightning_npu_tp/, their settings in conf/. A setting that cannot work ends
with one line `error: …` and exit code 2; HYDRA_FULL_ERROR=1 shows the traceback too.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

# All that loads torch is imported inside the functions: its threads read their settings once, when it is loaded.
if TYPE_CHECKING:
    from omegaconf import DictConfig


def train(config: DictConfig) -> float | None:
    """One run; returns the final validation loss in nats per token, None without validation data."""
    from lightning import seed_everything

    from lightning_npu_tp.callbacks import ExportAtEnd
    from lit_models.data import check_vocabulary
    from lit_models.run.continued import ContinueRun
    from lit_models.run.instantiate import build, build_each
    from lit_models.run.run_folder import claim, explain_write_errors, goes_on, sole_writer
    from lit_models.run.summary import summary

    strategy = build(config, "strategy")
    # Lightning's and torch_npu's own uses of torch names that are going away: nothing that a user could mend. Not
    # earlier, for transformers has loaded torch_npu with the strategy, and that puts filters of its own before these.
    for gone in (".*LeafSpec", "TypedStorage is deprecated"):
        warnings.filterwarnings("ignore", gone)

    folder = Path(config.run_dir)
    checkpoint = "auto" if goes_on(config) else config.ckpt_path
    extra = [ContinueRun(continues=checkpoint == "auto")]
    if config.export:
        extra.append(ExportAtEnd(folder / "export" if config.export is True else config.export))
    seed_everything(config.seed, workers=True, verbose=False)
    # The trainer first: it says at once whether the device is there, before data and model cost anything.
    warmup = build(config, "warmup")
    trainer = build(
        config,
        "trainer",
        strategy=strategy,
        callbacks=[*build_each(config, "callbacks"), *([warmup] if warmup is not None else []), *extra],
        logger=build_each(config, "logger"),
    )
    data = build(config, "data")
    model = build(config, "model", optimizer=build(config, "optimizer"), scheduler=build(config, "scheduler"))
    check_vocabulary(data.tokenizer, model.model_config.vocab_size)
    with ExitStack() as stack:
        # By the rank that writes, not by the environment: RANK may be left from another program.
        if trainer.is_global_zero:
            stack.enter_context(sole_writer(folder))
            claim(folder, config)
            print(data.summary(), flush=True)
        stack.enter_context(explain_write_errors(folder))
        before = []
        if config.validate_before:
            before = trainer.validate(model, data, ckpt_path=checkpoint, verbose=False)
        trainer.fit(model, data, ckpt_path=checkpoint)
        after = trainer.validate(model, data, verbose=False)
    if trainer.is_global_zero:
        print(summary(before, after, folder), flush=True)
    return after[0]["val/loss"] if after else None


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def run(config: DictConfig) -> float | None:
    """A job as Hydra calls it: a sweep gives each a process, and what a user can mend is told without a traceback."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_npu_tp import DeviceError, LightningNPUTPError, RankFailure, run_job

    try:
        return run_job(train, config)
    except (LightningNPUTPError, MisconfigurationException) as error:
        # A sweep goes on with its other jobs and reports at its end.
        if HydraConfig.get().mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if isinstance(error, RankFailure):
            # No setting that cannot work; that rank's traceback is told when this process has ended, as the last thing.
            raise SystemExit(1) from None
        instead = " `python train.py` alone trains a small model on the CPU." if isinstance(error, DeviceError) else ""
        print(f"error: {error}{instead}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    # The CPU's OpenMP threads spin while they wait for each other. Beside any other busy process that made this job
    # ten times slower; sleeping costs little on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from lit_models.run.run_folder import register_resolvers

    register_resolvers()
    run()
