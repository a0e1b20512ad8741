"""Two fits and a validation with two trainers; then say what is left of it in the environment."""

import json
import os
import threading

from tiny import TinyModel, is_first, tiny_trainer

if __name__ == "__main__":
    before = dict(os.environ)
    first = is_first()
    model = TinyModel()
    inside = {}

    def look(model, step):
        inside.update(os.environ)

    model.at_step = look
    trainer = tiny_trainer()
    trainer.fit(model)
    trainer.validate(model, verbose=False)
    tiny_trainer(max_steps=4).fit(model)
    if first:
        print("RESULT", json.dumps({
            "restored": dict(os.environ) == before,
            "world": inside["WORLD_SIZE"],
            "port": inside["MASTER_PORT"],
            "threads": inside.get("OMP_NUM_THREADS"),
            "val": float(trainer.callback_metrics["val"]),
            "threads_alive": [thread.name for thread in threading.enumerate()],
        }))
    print("END", os.getpid())
