"""Show a batch as the model gets it: `python show_data.py data=chat 'data.paths=[chats.jsonl]' data.tokenizer=FOLDER`.

Takes the settings of train.py, builds the data alone, and prints its summary, the first training batch (or validation
batch) decoded, with what is learnt in green, borders of documents and the counts. Nothing is written but the token
cache. A setting that cannot work ends with one line `error: …` and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Print a batch as the command line asks; returns the exit code, 2 for a mistake in the settings."""
    parser = argparse.ArgumentParser(prog="show_data.py", description="Show a batch of data as the model gets it.")
    parser.add_argument("settings", nargs="*", help="settings of train.py, e.g. data=text 'data.paths=[corpus/]'")
    parser.add_argument("--batch", type=int, default=0, help="which batch of the first epoch (default: 0, the first)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to show of a sequence; 0 = all (default: 512)")
    parser.add_argument("--validation", action="store_true", help="of the validation set instead of the training set")
    given = parser.parse_intermixed_args(arguments)

    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from rich.console import Console

    from lightning_npu_tp import DataError, LightningNPUTPError
    from lit_models.data.show import show_batch
    from lit_models.run.instantiate import build

    try:
        with initialize_config_dir(str(Path(__file__).resolve().parent / "conf"), version_base="1.3"):
            config = compose("train", given.settings)
        data = build(config, "data")
        print(data.summary())
        loader = data.val_dataloader() if given.validation else data.train_dataloader()
        if not 0 <= given.batch < len(loader):
            raise DataError(f"--batch {given.batch} does not exist: there are {len(loader)} batches, from 0.")
        batch = next(batch for number, batch in enumerate(loader) if number == given.batch)
    except (LightningNPUTPError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show_batch(batch, data.tokenizer, Console(), most_tokens=given.tokens or None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
