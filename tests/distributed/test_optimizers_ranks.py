"""Every optimizer of torch, and transformers' own, on shards: the weights of one process, or refused by name.

Catches one that updates each rank's part by that part's own norms or means, and a table in the docs that promises
another thing than the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, optim
from torch.utils.data import DataLoader
from transformers.optimization import Adafactor as TransformersAdafactor

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.optim import AdamWBF16
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.testing.models import (
    counted_tokens,
    random_batch,
    reference_model,
    tiny_config,
    tiny_deepseek_v2_config,
)
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference
from lightning_npu_tp.tools.testing.sharded import own_rows, sharded_model, whole
from lightning_npu_tp.trainer.module_setup import plain_parameters
from lightning_npu_tp.trainer.optimizers import choose_implementations, refuse_optimizers

Make = Callable[..., optim.Optimizer]
DOCS = Path(__file__).parents[2] / "docs" / "own-models.md"
TOLERANCE = 1e-10
# An eps far above rounding: what divides by the size of a gradient would turn a zero's rounding into a step.
WORKS: dict[str, Make] = {
    "Adadelta": partial(optim.Adadelta, lr=0.1),
    "Adagrad": partial(optim.Adagrad, lr=1e-2, eps=1e-4),
    "Adam": partial(optim.Adam, lr=1e-2, eps=1e-4, amsgrad=True),
    "AdamW": partial(optim.AdamW, lr=1e-2, eps=1e-4),
    "AdamWBF16": partial(AdamWBF16, lr=1e-2, eps=1e-4),
    "Adamax": partial(optim.Adamax, lr=1e-2, eps=1e-4),
    "ASGD": partial(optim.ASGD, lr=1e-2, t0=1),
    "NAdam": partial(optim.NAdam, lr=1e-2, eps=1e-4),
    "RAdam": partial(optim.RAdam, lr=1e-2, eps=1e-4),
    "RMSprop": partial(optim.RMSprop, lr=1e-3, eps=1e-2, centered=True, momentum=0.9),
    "SGD": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
}
# What makes it another optimizer begins at bfloat16: test_bf16_optimizer_ranks.py.
FOREACH = {f"{name}, for-each": partial(make, foreach=True) for name, make in WORKS.items() if name != "ASGD"}
REFUSED: dict[str, tuple[Make, str]] = {
    "Adafactor": (partial(optim.Adafactor, lr=1e-2), "its factors are means over rows and columns"),
    "transformers' Adafactor": (TransformersAdafactor, "its factors are means over rows and columns"),
    "LBFGS": (optim.LBFGS, "experts, or layers of your own, lie on other ranks"),
    "Muon": (partial(optim.Muon, lr=1e-2), "it orthogonalises whole matrices in bfloat16"),
    "Rprop": (partial(optim.Rprop, lr=1e-3), "it picks elements by a mask"),
    "SparseAdam": (optim.SparseAdam, "those of the embedding are dense"),
    "ASGD, for-each": (partial(optim.ASGD, foreach=True), "it takes parameters of one mesh"),
    "SGD, fused": (partial(optim.SGD, lr=0.1, fused=True), "the fused kernels of Adam and AdamW only"),
    "Adagrad, fused": (partial(optim.Adagrad, fused=True), "the fused kernels of Adam and AdamW only"),
}
LAYOUTS = {
    "tensor 2": ((1, 2, 2), "shard"),
    "data 2 shard": ((2, 1, 1), "shard"),
    "data 2 replicate": ((2, 1, 1), "replicate"),
    "data 2, tensor 2, expert 4": ((2, 2, 4), "shard"),
}


def mixture() -> Any:
    """Vectors, matrices and experts, and a vocabulary that two ranks do not divide."""
    return tiny_deepseek_v2_config(num_hidden_layers=2, vocab_size=131)


def batch(config: Any) -> dict[str, Tensor]:
    return random_batch(config, 4, 9, seed=0)


def parameters(model: Any, name: str) -> list[Tensor]:
    """What a user would hand over: torch's Muon takes matrices only."""
    return [p for p in model.parameters() if p.ndim == 2 or not name.startswith("Muon")]


def three_steps(model: Any, optimizer: optim.Optimizer, mine: dict[str, Tensor], tokens: float) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**mine, num_items_in_batch=tokens).loss
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)


def alone(make: Make, name: str, config: Any) -> dict[str, Tensor]:
    model, data = reference_model(config), batch(config)
    optimizer = make(parameters(model, name))
    # The forward pass alone: an optimizer's own float32 numbers stay what they are in any process.
    forward = model.forward

    def wide(**inputs: Any) -> Any:
        with float64_reference():
            return forward(**inputs)

    model.forward = wide
    three_steps(model, optimizer, data, counted_tokens(data))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def sharded(
    rank: int, world_size: int, sizes: tuple[int, ...], how: Any, config: Any, makes: dict[str, Make]
) -> dict[str, Any]:
    """After three steps of each optimizer the whole weights, or how it was refused."""
    layout = Layout(*sizes)
    model, _ = sharded_model(config, layout, Options(data_parallel=how))
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data, found = batch(config), {}
    _, mine = own_rows(data, rank // layout.tensor, layout.data)
    for name, make in makes.items():
        with torch.no_grad():
            for of, parameter in model.named_parameters():
                parameter.copy_(first[of])
                parameter.grad = None
        optimizer = make(parameters(model, name))
        try:
            refuse_optimizers([optimizer])
            choose_implementations([optimizer], plain_parameters(model), "cpu")
        except ConfigError as error:
            found[name] = str(error)
            continue
        three_steps(model, optimizer, mine, counted_tokens(data) / layout.data)
        found[name] = {of: whole(parameter).detach().clone() for of, parameter in model.named_parameters()}
    return found if rank == 0 else {}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    worst = max((relative_difference(found[name], wanted), name) for name, wanted in expected.items())
    assert worst[0] <= TOLERANCE, f"{what}: {worst}"


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Tensor]]:
    """For-each is compared with the loop: it is the same update."""
    return {name: alone(make, name, mixture()) for name, make in WORKS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_optimizer_gives_the_weights_of_one_process_or_is_refused(
    on_ranks: Any, one_process: dict[str, dict[str, Tensor]], layout: str
) -> None:
    sizes, how = LAYOUTS[layout]
    makes = WORKS | {name: make for name, (make, _) in REFUSED.items()}
    if layout == "tensor 2":
        makes |= FOREACH
    if how == "replicate":
        # Nothing is divided there.
        one_process = one_process | {"Muon": alone(makes["Muon"], "Muon", mixture())}
    found = on_ranks(sharded, sizes[0] * sizes[1], sizes, how, mixture(), makes, timeout=240)[0]
    for name in makes:
        expected = one_process.get(name.removesuffix(", for-each")) if name not in REFUSED or name == "Muon" else None
        if expected is None:
            words = REFUSED[name][1]
            assert isinstance(found[name], str) and words in found[name], (name, found[name])
        else:
            assert_same(found[name], expected, name)


def test_lbfgs_works_where_all_parameters_lie_on_the_same_ranks_evenly(on_ranks: Any) -> None:
    even, uneven = tiny_config("llama"), tiny_config("llama", vocab_size=131)
    lbfgs = {"LBFGS": partial(optim.LBFGS, max_iter=2)}
    expected = alone(lbfgs["LBFGS"], "LBFGS", even)
    for sizes, how in LAYOUTS.values():
        if sizes[0] * sizes[1] == 2:
            assert_same(on_ranks(sharded, 2, sizes, how, even, lbfgs)[0]["LBFGS"], expected, f"{sizes} {how}")
    assert "some are divided unevenly" in on_ranks(sharded, 2, (1, 2, 2), "shard", uneven, lbfgs)[0]["LBFGS"]


class Module(LightningModule):
    """Ends in configure_optimizers, or in its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = reference_model(mixture())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise AssertionError("training began")

    def configure_optimizers(self) -> Any:
        return {"optimizer": torch.optim.Adafactor(self.parameters())}


def fit(rank: int, world_size: int) -> None:
    run = Trainer(
        accelerator="cpu", devices=2, strategy=NPUTensorParallelStrategy(), max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="Adafactor from configure_optimizers cannot train sharded.*AdamW; docs/own-"):
        run.fit(Module(), DataLoader(torch.zeros(2, 4, dtype=torch.int64)))


def test_a_trainer_refuses_it_before_it_trains(on_ranks: Any) -> None:
    on_ranks(fit, 2, backend=None)


def test_the_table_in_the_docs_says_what_works() -> None:
    rows = dict(re.findall(r"^\| ([^|]*`[^|]*) \| (works|refused)", DOCS.read_text(encoding="utf-8"), re.M))
    told = {name: verdict for names, verdict in rows.items() for name in re.findall(r"`([\w.]+)`", names)}
    ours = {f"torch.optim.{name}" for name in dir(optim) if isinstance(getattr(optim, name), type)}
    ours = {name for name in ours if issubclass(getattr(optim, name.rpartition(".")[2]), optim.Optimizer)}
    assert told.keys() == ours - {"torch.optim.Optimizer"} | {
        "transformers.optimization.Adafactor",
        "lightning_npu_tp.optim.AdamWBF16",
    }
    for name, verdict in told.items():
        short = "transformers' Adafactor" if name.startswith("transformers") else name.rpartition(".")[2]
        assert (verdict == "works") == (short in WORKS), name
