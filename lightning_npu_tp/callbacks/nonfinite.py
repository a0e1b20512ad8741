"""`NonFiniteGuard`: a NaN or infinite loss or gradient refuses the optimizer step, on every rank alike.

One such gradient makes every weight NaN, and the checkpoints after it worthless. The guard looks at the finished
gradients before they are clipped (clipping would spread one NaN over all of them), agrees with the other ranks, and
names where it began. It repairs nothing: what caused the NaN is the user's to find.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError, LightningNPUTPError
from lightning_npu_tp.launch.hosts import ranks_in_words
from lightning_npu_tp.models.moe.bias import biased_blocks, clear_pending
from lightning_npu_tp.parallel.clipping import local_gradients

log = logging.getLogger(__name__)


class NonFiniteError(LightningNPUTPError, FloatingPointError):
    """A loss or gradient is NaN or infinite; the optimizer step was refused and the weights are as before it."""


class NonFiniteGuard(Callback):
    """Refuses optimizer steps with a NaN or infinite loss or gradient.

    action:          "stop" raises NonFiniteError on every rank; "skip" drops the step (with gradient accumulation all
                     its micro-batches) on every rank, warns and goes on. Weights and optimizer state stay as they
                     were, bit for bit; step count and learning rate go on.
    max_consecutive: with "skip", this many refused steps in a row raise as "stop" does: such a run never recovers.

    Parameters may be DTensors of any meshes or plain tensors; each rank looks at its own part, and one flag is reduced
    over all ranks. Price: one pass over the gradients, that reduction, and one host read per optimizer step.

    With precision=16-mixed infinite gradients are the gradient scaler's: it skips the step itself and lowers its
    scale. Then only the loss is guarded.

    Logs train/skipped_steps with "skip": how many steps were refused so far; it is kept in checkpoints.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", max_consecutive: int = 10) -> None:
        if action not in ("stop", "skip"):
            raise ConfigError(f"NonFiniteGuard(action={action!r}) is not known. Set action to 'stop' or 'skip'.")
        if max_consecutive < 1:
            raise ConfigError(
                f"NonFiniteGuard(max_consecutive={max_consecutive}) would stop before the first step. Set it to 1 or "
                f"more steps."
            )
        self.action = action
        self.max_consecutive = max_consecutive
        self.skipped = 0
        self.consecutive = 0
        self._loss_is_bad: Tensor | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was stopped in the middle of a window leaves nothing behind."""
        self._loss_is_bad = None

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember on the device whether a micro-batch's loss was not finite; reads nothing."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._loss_is_bad = bad if self._loss_is_bad is None else self._loss_is_bad | bad

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the step happen, drop it, or raise NonFiniteError; the same on every rank."""
        bad_loss, self._loss_is_bad = self._loss_is_bad, None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        flag = _nonfinite([] if scaled else local_gradients(parameters), pl_module.device)
        if bad_loss is not None:
            flag = flag | bad_loss.to(flag.device)
        if not _on_any_rank(flag):
            self.consecutive = 0
        else:
            # What the refused step counted must not move the routers' bias either.
            clear_pending(list(biased_blocks(pl_module).values()))
            where = _describe(pl_module, parameters, bad_loss, step=trainer.global_step, look_at_gradients=not scaled)
            self._refuse(parameters, where, log_it=trainer.is_global_zero)
        if self.action == "skip":
            pl_module.log("train/skipped_steps", float(self.skipped))

    def _refuse(self, parameters: list[Tensor], where: str, *, log_it: bool) -> None:
        self.consecutive += 1
        if self.action == "stop":
            raise NonFiniteError(
                f"{where} The optimizer step was refused; the weights are those of the step before. Lower the learning "
                f"rate, clip gradients or look at this batch; NonFiniteGuard(action='skip') drops such steps."
            )
        self.skipped += 1
        if self.consecutive >= self.max_consecutive:
            raise NonFiniteError(
                f"{where} {self.consecutive} optimizer steps in a row were refused (max_consecutive="
                f"{self.max_consecutive}); the weights are those of the last good step. Lower the learning rate, or "
                f"resume from an earlier checkpoint."
            )
        # None, not zero: with zeros Adam's averages would decay, and weight decay would still shrink the weights.
        for parameter in parameters:
            parameter.grad = None
        if log_it:
            log.warning(f"{where} The optimizer step was skipped ({self.skipped} so far).")

    @override
    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped, in a row and in all, for the checkpoint."""
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting skipped steps from where the checkpoint was saved."""
        self.skipped, self.consecutive = state_dict["skipped"], state_dict["consecutive"]


@torch.no_grad()
def _nonfinite(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Whether an element of these plain tensors is NaN or infinite: bool scalar, on the device."""
    # A rank's share of a parameter may be empty, and an empty tensor has no largest magnitude.
    gradients = [gradient for gradient in gradients if gradient.numel()]
    norms: list[Tensor] = []
    # The largest magnitude: unlike a sum of squares it overflows in no dtype, and it keeps NaN.
    for dtype in {gradient.dtype for gradient in gradients}:
        norms += torch._foreach_norm([g for g in gradients if g.dtype == dtype], float("inf"))
    flags = [~torch.isfinite(norm).to(device) for norm in norms]
    return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool, device=device)


def _on_any_rank(flag: Tensor) -> bool:
    """Reads the host; collective over all ranks."""
    count = flag.to(torch.int32)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return bool(count.item())


def _describe(
    pl_module: LightningModule, parameters: list[Tensor], bad_loss: Tensor | None, *, step: int, look_at_gradients: bool
) -> str:
    """One sentence or two: step, ranks whose loss was bad, ranks and parameter whose gradient was. Collective."""
    here = (
        bad_loss is not None and bool(bad_loss),
        list(_bad_names(pl_module, parameters)) if look_at_gradients else [],
    )
    everyone = [here]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [here] * dist.get_world_size()
        dist.all_gather_object(everyone, here)
    sentences = []
    if ranks := [rank for rank, (bad, _) in enumerate(everyone) if bad]:
        sentences.append(f"The loss of optimizer step {step + 1} is not finite on {ranks_in_words(ranks)}.")
    if ranks := [rank for rank, (_, names) in enumerate(everyone) if names]:
        names = everyone[ranks[0]][1]
        first = f"{names[0]} (backward reached it first; {len(names) - 1} more follow)" if names[1:] else names[0]
        sentences.append(
            f"The gradient of {first} is not finite in optimizer step {step + 1}, on {ranks_in_words(ranks)}."
        )
    return " ".join(sentences)


def _bad_names(pl_module: LightningModule, parameters: list[Tensor]) -> Iterator[str]:
    """Names of the parameters whose local gradient is not finite, in the order in which backward reached them."""
    chosen = {id(parameter) for parameter in parameters}
    # From the output back: a NaN that begins in one layer spoils the gradients of all layers before it, so the first
    # in the model's own order would nearly always be the embedding.
    for name, parameter in reversed(list(pl_module.named_parameters())):
        if id(parameter) in chosen and bool(_nonfinite(local_gradients([parameter]), pl_module.device)):
            yield name
