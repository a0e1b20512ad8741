"""Conversion on one process. Catches a swap that silently does not happen, weights that are lost or shared with
the caller, layouts that are refused without saying what works, and leftovers on the meta device."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM, GPT2Config

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import check_sizes, conversion_of, convert, materialize_rest
from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.models.families.deepseek_v2 import DEEPSEEK_V2
from lightning_npu_tp.models.families.registry import family_named, supported
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.parallel.plan import match_plan
from lightning_npu_tp.tools.testing.models import (
    random_batch,
    tiny_deepseek_v2_config,
    tiny_deepseek_v2_grouped_config,
)
from lightning_npu_tp.tools.testing.reference import relative_difference

CPU = torch.device("cpu")


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meshes, groups = Meshes.build(Layout.resolve(world=1), "cpu"), Groups()
    groups.bind(meshes)
    yield {
        "meshes": meshes,
        "groups": groups,
        "kernels": kernels.select("cpu"),
        "device": CPU,
        "dtype": None,
        "seed": 0,
    }
    dist.destroy_process_group()


def _model(config=None, device="cpu") -> DeepseekV2ForCausalLM:
    with torch.device(device):
        return DeepseekV2ForCausalLM(config or tiny_deepseek_v2_config())


def test_every_module_that_needs_it_is_swapped_and_counted(alone) -> None:
    model = _model()
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    report = convert(model, **alone)[0]
    assert report.swapped == {
        "Embedding": 1,
        "Linear": 1,
        "DeepseekV2RotaryEmbedding": 1,
        "DeepseekV2Attention": 3,
        "DeepseekV2RMSNorm": 7,
        "DeepseekV2MLP": 1,
        "DeepseekV2Moe": 2,
    }
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == names
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert report.parameters == report.local_parameters == sum(p.numel() for p in model.parameters())
    assert isinstance(model, DeepseekV2ForCausalLM)


def test_weights_that_exist_are_kept_and_the_callers_config_is_left_alone(alone) -> None:
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = model.config
    attention = config._attn_implementation
    convert(nn.ModuleDict({"inner": model}), **alone)
    assert all(torch.equal(p.to_local(), before[name]) for name, p in model.named_parameters())
    assert config._attn_implementation == attention and model.config is not config
    assert model.model.config is model.config


def test_a_second_conversion_changes_nothing(alone) -> None:
    model = _model()
    first = convert(model, **alone)
    parameters = list(model.parameters())
    assert len(first) == 1 and convert(model, **alone) == []
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert conversion_of(model) is first[0]


def test_meta_parameters_are_filled_from_the_seed_and_frozen_ones_stay_frozen(alone) -> None:
    first, second, other = (_model(tiny_deepseek_v2_config(pad_token_id=3), device="meta") for _ in range(3))
    first.lm_head.requires_grad_(False)
    convert(first, **alone)
    convert(second, **alone)
    convert(other, **{**alone, "seed": 1})
    state, same, different = first.state_dict(), second.state_dict(), other.state_dict()
    for name, value in state.items():
        assert torch.equal(value.to_local(), same[name].to_local())
        if not name.endswith("norm.weight"):
            assert not torch.equal(value.to_local(), different[name].to_local())
    assert state["model.norm.weight"].to_local().eq(1).all()
    assert abs(state["model.layers.1.mlp.experts.down_proj"].to_local().std() - 0.1) < 5e-3
    assert state["model.embed_tokens.weight"].to_local()[3].eq(0).all()
    assert not first.lm_head.weight.requires_grad and first.model.norm.weight.requires_grad


def test_a_transformers_class_that_changed_is_refused_before_anything_is_touched(alone) -> None:
    model = _model()
    expected = dict(DEEPSEEK_V2.expected(model.config), DeepseekV2Attention=4)
    family = dataclasses.replace(DEEPSEEK_V2, expected=lambda config: expected)
    before = list(model.modules())
    with pytest.raises(ConversionError, match="3 of DeepseekV2Attention instead of 4"):
        convert(model, families=[family], **alone)
    assert list(model.modules()) == before and conversion_of(model) is None


def _refusal(config, layout: Layout) -> str:
    model = _model(config, device="meta")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rules = match_plan(DEEPSEEK_V2.plan(config), shapes, family="deepseek_v2")
    with pytest.raises(ConfigError) as refused:
        check_sizes(DEEPSEEK_V2, config, rules, shapes, layout)
    return str(refused.value)


def test_sizes_that_cannot_be_split_are_refused_with_those_that_can() -> None:
    text = _refusal(tiny_deepseek_v2_config(), Layout(data=1, tensor=3, expert=3))
    assert "tensor_parallel_size=3 cannot split the 8 heads" in text and "[1, 2, 4, 8]" in text
    text = _refusal(tiny_deepseek_v2_config(n_routed_experts=6), Layout(data=1, tensor=4, expert=4))
    assert "expert_parallel_size=4 cannot split the 6 experts" in text and "[1, 2, 3, 6]" in text
    text = _refusal(tiny_deepseek_v2_config(vocab_size=5), Layout(data=1, tensor=4, expert=4))
    assert "leaves a rank without any vocabulary entry of model.embed_tokens.weight (size 5)" in text
    assert "[1, 2, 3]" in text


@pytest.mark.parametrize(
    "overrides", [{"topk_method": "noaux_tc"}, {"num_key_value_heads": 4}], ids=["routing", "key_heads"]
)
def test_variants_that_would_give_other_numbers_are_refused(alone, overrides: dict) -> None:
    name, value = next(iter(overrides.items()))
    model = _model()
    setattr(model.config, name, value)
    with pytest.raises(ConversionError, match=name):
        convert(model, **alone)


def test_the_lookup_error_lists_the_families() -> None:
    assert family_named("deepseek_v2") is DEEPSEEK_V2 and "deepseek_v2" in supported()
    with pytest.raises(ConversionError, match="'gpt9' is not supported. Supported: .*deepseek_v2"):
        family_named("gpt9")


def test_other_models_inside_a_module_are_left_alone(alone) -> None:
    tiny = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    root = nn.ModuleDict({"other": AutoModelForCausalLM.from_config(tiny), "ours": _model()})
    reports = convert(root, **alone)
    assert [report.model for report in reports] == ["ours"]
    assert not any(isinstance(p, DTensor) for p in root["other"].parameters())


def test_generation_with_a_cache_gives_the_tokens_of_transformers(alone) -> None:
    torch.manual_seed(0)
    model = _model(tiny_deepseek_v2_grouped_config()).eval()
    batch = random_batch(model.config, 2, 7, seed=0)
    ask = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :3] = 0
    wanted = model.generate(batch["input_ids"], attention_mask=mask, **ask)
    convert(model, **alone)
    assert torch.equal(model.generate(batch["input_ids"], attention_mask=mask, **ask), wanted)


def test_logits_come_when_no_labels_do_or_when_asked_for(alone) -> None:
    model = _model()
    batch = random_batch(model.config, 2, 7, seed=0)
    wanted = model(**batch)
    convert(model, **alone)
    assert model(**batch).logits is None
    assert relative_difference(model(**batch, gather_logits=True).logits, wanted.logits) < 1e-5
    logits = model(input_ids=batch["input_ids"]).logits
    assert relative_difference(logits, wanted.logits) < 1e-5
    last = model(input_ids=batch["input_ids"], logits_to_keep=2).logits
    assert torch.equal(last, logits[:, -2:])
    assert model(**batch, return_dict=False)[0].shape == ()


def test_what_is_left_on_meta_fills_itself_or_is_named() -> None:
    with torch.device("meta"):
        root = nn.ModuleDict({"head": nn.Linear(4, 2)})
    root["loaded"] = nn.Linear(2, 2)
    kept = root["loaded"].weight.detach().clone()
    state = torch.get_rng_state()
    materialize_rest(root, device=CPU, seed=0)
    assert torch.equal(root["loaded"].weight, kept) and torch.equal(torch.get_rng_state(), state)
    first = root["head"].weight.detach().clone()
    assert first.abs().max() <= 0.5 and not first.eq(0).all()
    root["head"].to("meta")
    with torch.device("meta"):
        again = nn.ModuleDict({"head": nn.Linear(4, 2)})
    materialize_rest(again, device=CPU, seed=0)
    assert torch.equal(again["head"].weight, first)

    class NoReset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3, device="meta"))

    with pytest.raises(ConversionError, match=r"'norm' \(NoReset\) is on the meta device and has no reset_parameters"):
        materialize_rest(nn.ModuleDict({"norm": NoReset()}), device=CPU, seed=0)


# transformers 5.23 renames the switch; 5.17 has this name only.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_transformers_switch_for_checkpointing_loses_no_gradient_of_balance_losses(alone, use_reentrant: bool) -> None:
    config = tiny_deepseek_v2_config(aux_loss_alpha=0.1)
    model = _model(config).train()
    convert(model, **alone)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(**random_batch(config, 2, 8, seed=0)).aux_loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad is not None


def test_checkpointing_that_would_lose_the_balance_losses_gradient_is_refused(alone) -> None:
    config = tiny_deepseek_v2_config(aux_loss_alpha=0.1)
    model = _model(config).train()
    convert(model, **alone)
    model.enable_input_require_grads()
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            partial(forward, **kwargs), *args, use_reentrant=True
        )
    with pytest.raises(ConfigError, match="strategy.recompute=block"):
        model(**random_batch(config, 2, 8, seed=0))
