"""`ExpertLoadMonitor`: how evenly the experts are used, as three numbers and a heat map per interval.

The counts gather on the device and are read once per interval, on all ranks together; rank 0 draws. A
picture that cannot be written is reported and never ends the run.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_npu_tp.callbacks.expert_load_metric import ExpertLoad, expert_load
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.collectives import group_size

log = logging.getLogger(__name__)

# The colour scale is the same in every picture, so that two of them can be compared.
_MOST = 8


class ExpertLoadMonitor(Callback):
    """Watches the training forwards of every mixture layer.

    folder:        of the pictures, expert_load_step00000200.png and so on; made if need be. None draws
                   none.
    every_n_steps: optimizer steps of an interval.
    key:           entry of a batch dict whose elements are the tokens; those that its token_mask or 2-D attention_mask
                   says are padding make no picks.

    Logs, over the interval and all ranks
        expert_load/max_over_mean  busiest expert over the even load, in the worst layer: 1 is even;
        expert_load/entropy        of the shares over that of even ones, in the worst layer: 1 is even;
        expert_load/dropped        picks that no expert counted, or that counted twice: 0 but for a bug.

    Layers are the modules with a router `gate` and `tokens_per_expert`, int64 [E], of their last forward.
    Raises ConfigError for a module without any, for layers of different sizes, and on construction where
    matplotlib is wanted and not installed.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, every_n_steps: int = 200, key: str = "input_ids"
    ) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"ExpertLoadMonitor(every_n_steps={every_n_steps}) never looks. Set it to 1 or more.")
        if folder is not None and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(
                "ExpertLoadMonitor draws with matplotlib, which is not installed. Run `pip install "
                "'lightning-npu-tp[train]'`, or set folder=null to have the numbers without pictures."
            )
        self.folder = None if folder is None else Path(folder)
        self.every_n_steps = every_n_steps
        self.key = key
        self._layers: dict[str, Any] = {}
        self._load: ExpertLoad | None = None
        self._last_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and begin an interval."""
        self._layers = _mixture_layers(pl_module)
        if not self._layers:
            raise ConfigError(
                f"ExpertLoadMonitor finds no mixture of experts in {type(pl_module).__name__}. Leave the callback out "
                f"(callbacks.expert_load=null)."
            )
        sizes = sorted({layer.gate.weight.shape[0] for layer in self._layers.values()})
        if len(sizes) > 1:
            raise ConfigError(f"ExpertLoadMonitor cannot draw layers with {sizes} experts in one picture.")
        self._load = ExpertLoad(len(self._layers), sizes[0]).to(pl_module.device)
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at the end of an interval log, draw and begin anew."""
        assert self._load is not None
        layers = list(self._layers.values())
        picks = _num_tokens(batch, self.key) * layers[0].gate.top_k
        self._load.update(torch.stack([layer.tokens_per_expert for layer in layers]), picks)
        step = trainer.global_step
        # A batch that only accumulates finishes no step.
        if step == self._last_step:
            return
        self._last_step = step
        if step % self.every_n_steps == 0:
            self._report(trainer, step)
            self._load.reset()

    def _report(self, trainer: Trainer, step: int) -> None:
        assert self._load is not None
        # Not the metric's own sum over ranks: those that share a batch have its picks alike, and of its counts
        # either all or a slice each.
        counts_LE = _sum_over_token_ranks(trainer, self._load.counts_LE)
        num_picks = trainer.strategy.reduce(self._load.num_picks, reduce_op="sum")
        load = expert_load(counts_LE.cpu(), num_picks.cpu())
        numbers = {
            "expert_load/max_over_mean": load["max_over_mean"].max(),
            "expert_load/entropy": load["entropy"].min(),
            "expert_load/dropped": load["dropped"].abs().sum(),
        }
        # Straight to the loggers, as Lightning's own monitors do: what goes through the module's `log` waits for
        # log_every_n_steps and is repeated until the next value.
        trainer.callback_metrics.update(numbers)
        for logger in trainer.loggers:
            logger.log_metrics(
                {name: float(number) for name, number in numbers.items()},
                step=trainer.fit_loop.epoch_loop._batches_that_stepped,
            )
        if self.folder is not None and trainer.is_global_zero:
            self._write(self.folder / f"expert_load_step{step:08d}.png", load, step)

    def _write(self, path: Path, load: dict[str, Tensor], step: int) -> None:
        picture = _render(load, [_layer_number(name) for name in self._layers], step)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture)
        except OSError as error:
            existing = next(parent for parent in path.absolute().parents if parent.exists())
            log.error(
                f"The picture {path} cannot be written: {error.strerror}. It needs {len(picture):,} bytes, "
                f"{shutil.disk_usage(existing).free:,} are free there. The training itself is not affected."
            )


def _num_tokens(batch: Any, key: str) -> int | Tensor:
    """Tokens of a batch without padding: an int64 scalar on the device where a mask says what that is."""
    if isinstance(batch, Tensor):
        return batch.numel()
    tokens: Tensor = batch[key]
    for name in ("token_mask", "attention_mask"):
        mask = batch.get(name)
        if mask is not None and mask.shape == tokens.shape[:2]:
            return mask.bool().sum()
    return tokens.numel()


def _sum_over_token_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    """The sum over the ranks whose tokens differ; may be the tensor itself.

    A strategy whose ranks hold slices of each other's sequences has a `token_groups()` that returns
    process groups, to be summed over one after the other. Without it tokens differ as batches do, and the
    strategy's own `reduce` knows over which ranks.
    """
    find_groups = getattr(trainer.strategy, "token_groups", None)
    if find_groups is None:
        return trainer.strategy.reduce(tensor, reduce_op="sum")
    for group in find_groups():
        if group_size(group) > 1:
            dist.all_reduce(tensor, group=group)
    return tensor


def _mixture_layers(root: nn.Module) -> dict[str, Any]:
    """Modules with a router and counts, by qualified name."""
    return {
        name: module
        for name, module in root.named_modules()
        if hasattr(module, "tokens_per_expert") and hasattr(getattr(module, "gate", None), "top_k")
    }


def _layer_number(name: str) -> str:
    """The number of the decoder layer in a qualified name; the whole name where it has none."""
    numbers = re.findall(r"\.(\d+)(?:\.|$)", f".{name}")
    return numbers[-1] if numbers else name


def _render(load: dict[str, Tensor], layers: list[str], step: int) -> bytes:
    """The PNG's bytes. load: of `expert_load`, on the CPU. layers: a label for each."""
    # Not pyplot: its windows and global state are none of a library's business.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts_LE = load["tokens"].double()
    num_layers, num_experts = counts_LE.shape
    even_L1 = counts_LE.mean(dim=1, keepdim=True)
    # Doubling and halving are equally far from even; an expert without a token counts as the least.
    times_LE = (counts_LE / even_L1).clamp(1 / _MOST, _MOST).log2()
    octaves = _MOST.bit_length() - 1

    figure = Figure(figsize=(min(6 + num_experts / 16, 20), min(3.5 + num_layers / 6, 16)), layout="constrained")
    FigureCanvasAgg(figure)
    worst = int(load["max_over_mean"].argmax())
    axes = figure.add_subplot(xlabel="expert", ylabel="decoder layer")
    axes.set_title(
        f"Expert load up to step {step:,}: {int(counts_LE[0].sum()):,} picks per layer, "
        f"{int(load['dropped'].abs().sum()):,} dropped\n"
        f"busiest expert: {load['max_over_mean'][worst]:.2f} times the even load, in layer {layers[worst]}",
        fontsize="medium",
    )
    image = axes.imshow(
        times_LE.numpy(), aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-octaves, vmax=octaves
    )
    shown = range(0, num_layers, -(-num_layers // 32))
    axes.set_yticks(shown, [layers[number] for number in shown])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    scale = figure.colorbar(image, ax=axes, label="tokens of the expert / even load (1.0 = even)")
    scale.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["≤ 1/8", "1/4", "1/2", "1.0", "2", "4", "≥ 8"])
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
