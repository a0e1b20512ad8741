"""Two fits and a validation with two trainers, and what they leave behind in the process."""

import json
import os
import signal

from say import say
from tiny import TinyModel, tiny_trainer

from lightning_npu_tp.errors import ConfigError


def left_behind():
    return [dict(os.environ), str(signal.getsignal(signal.SIGTERM)), str(signal.getsignal(signal.SIGINT))]


if __name__ == "__main__":
    say("START")
    seen = {}
    before = left_behind()
    model = TinyModel(lambda model, step: seen.update(os.environ))
    trainer = tiny_trainer()
    trainer.fit(model)
    trainer.validate(model, verbose=False)
    tiny_trainer(max_steps=4).fit(model)
    if "LOCAL_RANK" not in os.environ:
        names = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
        say(
            "RESULT",
            json.dumps({"restored": left_behind() == before, "inside": [seen[name] for name in names]}),
        )
    try:
        tiny_trainer(devices=3).fit(model)
    except ConfigError as error:
        say("REFUSED", error)
    say("END", os.environ.get("LOCAL_RANK", "0"), float(model.layer.weight.sum()))
