"""What a run tells at its end: how well the model predicts before and after, and where the files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_MEANINGS = {
    "config.yaml": "every setting of this run, resolved",
    "metrics.csv": "losses, tokens per second",
    "loss.png": "the loss curve",
    "checkpoints": "weights and training state; resume with ckpt_path=…",
    "tensorboard": "events; show them with `tensorboard --logdir`",
}

Results = Sequence[Mapping[str, float]]


def summary(before: Results, after: Results, folder: Path) -> str:
    """Lines to print. before, after: what `Trainer.validate` returned; empty where nothing was validated."""
    lines = []
    for when, results in (("before", before), ("after", after)):
        if results and "val/loss" in results[0]:
            loss, perplexity = results[0]["val/loss"], results[0]["val/perplexity"]
            lines.append(
                f"validation {when} training:".ljust(28)
                + f"loss {loss:.4f} nats per token, perplexity {perplexity:.2f}"
            )
    lines.append(f"run folder: {folder}")
    for name, meaning in _MEANINGS.items():
        if (folder / name).exists():
            lines.append(f"  {name.ljust(13)}{meaning}")
    return "\n".join(lines)
