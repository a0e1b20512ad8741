"""Catches: a loss that is a mean of means, wrong gradients in a short last accumulation window, NaN where no
token counts, metrics that weigh batches instead of tokens, hyperparameters that make a checkpoint unloadable.

The model is a stand-in with transformers' interface (labels shifted once inside), so that every expected
number can be worked out in float64 from all tokens at once.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_npu_tp.errors import ConfigError
from lit_models.causal_lm import LitCausalLM
from lit_models.metrics import TokenLoss, TokenPerplexity
from lit_models.token_mean import TokenMean

pytestmark = pytest.mark.filterwarnings(
    # Lightning's advice about worker processes, and its use of a deprecated torch name.
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*treespec",
)

VOCAB = 11
TINY = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


class StandIn(nn.Module):
    """Embedding and head in float64; `aux_loss` is a mean over the batch's tokens."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(6, VOCAB, generator=generator, dtype=torch.float64))

    def nll_sum(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.embed[input_ids[:, :-1]] @ self.head
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

    def aux(self, input_ids: Tensor) -> Tensor:
        return self.embed[input_ids].square().mean()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, num_items_in_batch: object = None):
        loss = None if labels is None else self.nll_sum(input_ids, labels) / num_items_in_batch
        return SimpleNamespace(loss=loss, aux_loss=self.aux(input_ids), logits=self.embed[input_ids] @ self.head)


def lit(**settings) -> LitCausalLM:
    defaults = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.5), "aux_loss_weight": 0.3}
    module = LitCausalLM(architecture="deepseek_v2", config=TINY, **{**defaults, **settings})
    module.model = StandIn()
    return module


def batches(counted: list[int], rows: int = 2, length: int = 9) -> list[dict[str, Tensor]]:
    """One batch per entry, with that many labels that count, at places that differ."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in counted:
        input_ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
        labels = torch.full_like(input_ids, -100)
        places = torch.randperm(rows * (length - 1), generator=generator)[:number]
        for place in places.tolist():
            row, column = divmod(place, length - 1)
            labels[row, column + 1] = input_ids[row, column + 1]
        # The first label has no logit; it must not be counted whatever it is.
        labels[:, 0] = input_ids[:, 0]
        made.append({"input_ids": input_ids, "labels": labels})
    return made


def loader(data: list) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(data, batch_size=None)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step > len(self.seen):
            self.seen.append(float(trainer.callback_metrics["train/loss"]))


def fit(module: LitCausalLM, data: list, **settings) -> list[float]:
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=settings.pop("max_epochs", 1),
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses, *settings.pop("callbacks", [])],
        **settings,
    )
    trainer.fit(module, loader(data), loader([]))
    return losses.seen


def expected_steps(windows: list[list[dict[str, Tensor]]], clip: float | None = None) -> tuple[StandIn, list[float]]:
    """Plain SGD on the sum over all tokens of a window divided by their number."""
    model, losses = StandIn(), []
    for window in windows:
        model.zero_grad()
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in window]
        nll = sum(model.nll_sum(**batch) for batch in window)
        aux = sum(model.aux(batch["input_ids"]) * count for batch, count in zip(window, counts, strict=True))
        ((nll + 0.3 * aux) / sum(counts)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
        losses.append(float(nll.detach()) / sum(counts))
    return model, losses


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_unequal_micro_batches_train_like_one_batch_of_all_their_tokens(accumulate: int, clip: float | None) -> None:
    data = batches([16, 3, 1, 7, 12])  # with 3 per step, the last window has two
    windows = [data[start : start + accumulate] for start in range(0, len(data), accumulate)]
    module = lit()
    logged = fit(module, data, accumulate_grad_batches=accumulate, gradient_clip_val=clip)

    expected, losses = expected_steps(windows, clip)

    for parameter, reference in zip(module.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, reference, rtol=1e-12, atol=1e-12)
    assert logged == pytest.approx(losses, rel=1e-6)  # Lightning keeps logged values in float32


def test_a_second_epoch_begins_a_window_of_its_own() -> None:
    data = batches([16, 3, 1, 7])
    module = lit()
    fit(module, data, accumulate_grad_batches=3, max_epochs=2)
    expected, _ = expected_steps([data[:3], data[3:]] * 2)
    torch.testing.assert_close(module.model.embed, expected.embed, rtol=1e-12, atol=1e-12)


def test_micro_batches_of_several_shapes_share_one_window() -> None:
    data = [*batches([16]), *batches([3], rows=1), *batches([20, 5], rows=5)]
    module = lit()
    fit(module, data, accumulate_grad_batches=2)
    expected, _ = expected_steps([data[:2], data[2:]])
    torch.testing.assert_close(module.model.embed, expected.embed, rtol=1e-12, atol=1e-12)


def test_a_fit_after_one_that_broke_within_a_window_starts_afresh() -> None:
    class Breaks(L.Callback):
        def on_train_batch_end(self, *args) -> None:
            raise RuntimeError("stop")

    data = batches([16, 3])
    module = lit()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, data, accumulate_grad_batches=2, callbacks=[Breaks()])
    fit(module, data, accumulate_grad_batches=2)
    expected, _ = expected_steps([data])
    torch.testing.assert_close(module.model.embed, expected.embed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_any_counted_token_changes_nothing(accumulate: int) -> None:
    module = lit()
    before = module.model.embed.detach().clone()
    logged = fit(module, batches([0, 0]), accumulate_grad_batches=accumulate)
    assert torch.equal(module.model.embed, before)
    assert set(logged) == {0.0}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_averaged_gradients_of_unequal_data_ranks_are_those_of_all_tokens(accumulate: int) -> None:
    ranks = [batches([16, 2][:accumulate]), batches([5, 9][:accumulate])]
    everything = [batch for rank in ranks for batch in rank]
    counts = torch.tensor([sum(float((b["labels"][:, 1:] != -100).sum()) for b in rank) for rank in ranks])
    nlls = torch.stack([sum(StandIn().nll_sum(**b) for b in rank) for rank in ranks]).detach()
    averaged = torch.zeros(VOCAB, 6, dtype=torch.float64)
    for rank in ranks:
        model = StandIn()

        def mean_over_data(value: Tensor) -> Tensor:
            return (nlls if value.dtype == torch.float64 and value not in counts else counts).mean().to(value.dtype)

        window = TokenMean(mean_over_data)
        for batch in rank:
            tokens = (batch["labels"][:, 1:] != -100).sum()
            divisor = window.divisor(tokens, batch["labels"].numel(), accumulate)
            loss = model.nll_sum(**batch) / divisor
            window.add_loss(loss * divisor)
            (loss / accumulate).backward()  # as Lightning does
        window.rescale(model.parameters())
        averaged += model.embed.grad / len(ranks)  # as data parallelism does
        assert float(window.loss()) == pytest.approx(float(nlls.sum() / counts.sum()), rel=1e-12)

    whole = StandIn()
    (sum(whole.nll_sum(**batch) for batch in everything) / counts.sum()).backward()
    torch.testing.assert_close(averaged, whole.embed.grad, rtol=1e-12, atol=1e-12)


def test_validation_weighs_tokens_and_not_batches() -> None:
    data = batches([16, 1, 0])
    module = lit()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    (found,) = trainer.validate(module, loader(data), verbose=False)
    (tested,) = trainer.test(module, loader(data), verbose=False)
    mean = float(sum(module.model.nll_sum(**batch) for batch in data).detach()) / 17
    assert found["val/loss"] == pytest.approx(mean, rel=1e-6)
    assert found["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert tested["test/loss"] == found["val/loss"]


def test_the_metrics_count_tokens_that_float32_cannot() -> None:
    loss, perplexity = TokenLoss(), TokenPerplexity()
    for metric in (loss, perplexity):
        metric.update(torch.tensor(0.0), torch.tensor(2**24))
        metric.update(torch.tensor(2.0), torch.tensor(1))
    assert int(loss.tokens) == 2**24 + 1
    assert float(perplexity.compute()) == pytest.approx(math.exp(2 / (2**24 + 1)))


def test_prediction_scores_each_token_after_those_before_it() -> None:
    (batch,) = batches([16])
    module = lit()
    scores = module.predict_step(batch, 0)
    assert scores["log_likelihood"].shape == (2, 8) == scores["counted"].shape
    total = scores["log_likelihood"][scores["counted"]].sum()
    torch.testing.assert_close(-total, module.model.nll_sum(**batch))


def test_an_unknown_architecture_lists_the_supported_ones() -> None:
    with pytest.raises(ConfigError, match=r"architecture='gpt9'.*deepseek_v2"):
        LitCausalLM(architecture="gpt9", config={})


def test_a_config_value_that_transformers_refuses_is_told_as_such() -> None:
    with pytest.raises(ConfigError, match="model.config is refused.*hidden_size"):
        LitCausalLM(architecture="deepseek_v2", config={"hidden_size": "wide"})


def test_training_without_an_optimizer_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="optimizer=None"):
        lit(optimizer=None).configure_optimizers()


def test_configure_model_builds_on_meta_once() -> None:
    module = LitCausalLM(
        architecture="deepseek_v2", config={**TINY, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    )
    module.configure_model()
    first = module.model
    module.configure_model()
    assert module.model is first
    assert all(parameter.is_meta for parameter in module.parameters())


def test_hyperparameters_from_a_hydra_config_come_back_from_a_safely_loaded_checkpoint(tmp_path) -> None:
    config = OmegaConf.create({"model": TINY, "patterns": ["*norm*"]})
    module = LitCausalLM(
        architecture="deepseek_v2",
        config=config.model,
        no_weight_decay=config.patterns,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
    )
    module.model = StandIn()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_progress_bar=False, limit_val_batches=0,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(batches([16])), loader([]))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    stored = torch.load(tmp_path / "it.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["config"] == TINY and type(stored["config"]) is dict
    assert stored["no_weight_decay"] == ["*norm*"]
    assert "optimizer" not in stored
