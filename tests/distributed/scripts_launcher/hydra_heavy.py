"""A Hydra job that trains; the first argument says whether a sweep runs in this process or in fresh ones."""

import os

import hydra
from say import say
from tiny import TinyModel, tiny_trainer

from lightning_npu_tp.launch.sweep import run_job


def train(config):
    def at_step(model, step):
        if config.fails and rank == 1:
            raise ValueError("rank 1 came to grief")

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    trainer = tiny_trainer(devices=config.devices)
    model = TinyModel(at_step)
    trainer.fit(model)
    trainer.validate(model, verbose=False)
    world, names = trainer.world_size, ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    say("JOB", config.devices, rank, world, os.getpid(), sum(name in os.environ for name in names))
    return trainer.callback_metrics["val"]


@hydra.main(version_base="1.3", config_path="conf_heavy", config_name="config")
def main(config):
    if config.fresh:
        say("VALUE", type(run_job(train, config)).__name__)
    else:
        train(config)


if __name__ == "__main__":
    main()
