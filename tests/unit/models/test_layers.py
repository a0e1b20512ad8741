"""Layers on one process against the plain formula. Catches a wrong rotation, mask or loss, and unbounded memory.

What many ranks do with them is compared in tests/distributed/test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding, apply_rotary_emb

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.kernels.plain import attend, rotate_interleaved
from lightning_npu_tp.models.layers import vocab
from lightning_npu_tp.models.layers.linear import RMSNorm
from lightning_npu_tp.models.layers.rotary import RotaryTables
from lightning_npu_tp.models.layers.sharded_causal_lm import attention_mask_4d
from lightning_npu_tp.models.layers.vocab import IGNORED_LABEL, VocabEmbedding, VocabHead
from lightning_npu_tp.parallel.layout import Groups
from lightning_npu_tp.parallel.tensor_region import Region
from lightning_npu_tp.tools.testing.models import tiny_deepseek_v2_config
from lightning_npu_tp.tools.testing.operators import CountOperators
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference

YARN = tiny_deepseek_v2_config().rope_parameters


@pytest.mark.parametrize("rope", [YARN, {"rope_type": "default", "rope_theta": 10000.0}])
def test_rotation_without_complex_numbers_equals_transformers(rope: dict) -> None:
    config = tiny_deepseek_v2_config(rope_parameters=dict(rope))
    q, k = torch.randn(2, 4, 11, 8, dtype=torch.float64), torch.randn(2, 1, 11, 8, dtype=torch.float64)
    positions = torch.stack((torch.arange(11), torch.arange(11) * 97 + 5))
    with float64_reference():
        source = DeepseekV2RotaryEmbedding(config)
        wanted_q, wanted_k = apply_rotary_emb(q, k, source(q, positions))
    cos, sin = RotaryTables(source)(q, positions)
    assert cos.dtype == torch.float64
    assert relative_difference(rotate_interleaved(q.transpose(1, 2), cos, sin).transpose(1, 2), wanted_q) < 1e-14
    assert relative_difference(rotate_interleaved(k.transpose(1, 2), cos, sin).transpose(1, 2), wanted_k) < 1e-14


def test_rotary_frequencies_survive_bfloat16_and_the_meta_device() -> None:
    config = tiny_deepseek_v2_config()
    exact = RotaryTables(DeepseekV2RotaryEmbedding(config)).frequencies
    with torch.device("meta"):
        on_meta = DeepseekV2RotaryEmbedding(config)
    assert RotaryTables(on_meta).frequencies == exact
    assert RotaryTables(DeepseekV2RotaryEmbedding(config).to(torch.bfloat16)).frequencies == exact
    tables = RotaryTables(on_meta).to(torch.bfloat16)
    cos, _ = tables(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[1000, 1001]]))
    assert cos.dtype == torch.float32
    assert not torch.equal(cos[0, 0], cos[0, 1])


def test_frequencies_that_depend_on_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ConversionError, match="rope_type='dynamic'.*host sync"):
        RotaryTables(DeepseekV2RotaryEmbedding(tiny_deepseek_v2_config(rope_parameters=rope)))


def test_rms_norm_equals_its_formula_and_does_not_normalise_in_bfloat16() -> None:
    weight = nn.Parameter(torch.randn(16, dtype=torch.float64))
    x = torch.randn(3, 16, dtype=torch.float64)
    wanted = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    assert relative_difference(RMSNorm(weight, 1e-3)(x), wanted) < 1e-15
    # 256 + 1 is 256 in bfloat16: a sum of squares in bfloat16 would be far off.
    many = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert RMSNorm(nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)), 0.0)(many).eq(1).all()


@pytest.mark.parametrize("value_dim", [4, 12])
def test_attention_with_narrow_values_equals_softmax(value_dim: int) -> None:
    q, k = torch.randn(2, 2, 3, 5, 12, dtype=torch.float64).unbind(0)
    v = torch.randn(2, 3, 5, value_dim, dtype=torch.float64)
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    out = attend(q, k, v, mask=None, scale=0.3, dropout=0.0)
    assert out.shape == v.shape
    assert relative_difference(out, scores.softmax(-1) @ v) < 1e-14
    last = attend(q[:, :, -1:], k, v, mask=None, scale=0.3, dropout=0.0)
    assert relative_difference(last, (scores.softmax(-1) @ v)[:, :, -1:]) < 1e-14


def _mask(**kwargs) -> list[list[int]]:
    given = {"attention_mask": None, "position_ids": None, "past_length": 0, "device": torch.device("cpu"), **kwargs}
    return attention_mask_4d(**given)[0, 0].int().tolist()


def test_masks_say_who_sees_whom() -> None:
    none = attention_mask_4d(None, None, query_length=3, past_length=0, device=torch.device("cpu"))
    assert none is None, "plain causal attention needs no mask"
    padded_left = torch.tensor([[0, 1, 1]])
    assert _mask(attention_mask=padded_left, query_length=3) == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    packed = torch.tensor([[0, 1, 0]])
    assert _mask(position_ids=packed, query_length=3) == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert _mask(query_length=2, past_length=1) == [[1, 1, 0], [1, 1, 1]]
    ready = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert attention_mask_4d(ready, None, query_length=3, past_length=0, device=ready.device) is ready


def _head(vocab_size: int = 50, width: int = 8) -> VocabHead:
    return VocabHead(nn.Linear(width, vocab_size, dtype=torch.float64), Region(Groups()))


@pytest.mark.parametrize("chunk_rows", [1000, 3])
def test_token_losses_and_gradients_equal_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    monkeypatch.setattr(vocab, "_CHUNK_BYTES", chunk_rows * 50 * 4)
    head, labels = _head(), torch.randint(0, 50, (10,))
    labels[[0, 7]] = IGNORED_LABEL
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(10, dtype=torch.float64)
    (head.token_losses(hidden, labels) * weights).sum().backward()
    ours = [hidden.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()]
    hidden.grad = head.weight.grad = head.bias.grad = None
    losses = F.cross_entropy(F.linear(hidden, head.weight, head.bias), labels, reduction="none")
    assert relative_difference(head.token_losses(hidden, labels), losses) < 1e-14
    (losses * weights).sum().backward()
    for actual, wanted in zip(ours, [hidden.grad, head.weight.grad, head.bias.grad], strict=True):
        assert relative_difference(actual, wanted) < 1e-14


def test_the_loss_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab, "_CHUNK_BYTES", 16 * 512 * 4)
    head = _head(vocab_size=512)
    hidden, labels = torch.randn(256, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, 512, (256,))
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Largest():
        head.token_losses(hidden, labels).sum().backward()
    assert 16 * 512 <= largest < 256 * 512 / 4


def test_the_loss_of_bfloat16_hidden_states_is_float32_and_takes_every_label_ignored() -> None:
    head = VocabHead(nn.Linear(8, 50, bias=False, dtype=torch.bfloat16), Region(Groups()))
    hidden = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    losses = head.token_losses(hidden, torch.full((4,), IGNORED_LABEL))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.eq(0).all() and hidden.grad.eq(0).all() and head.weight.grad.eq(0).all()


def test_autocast_runs_the_head_in_bfloat16_and_the_loss_in_float32() -> None:
    head = VocabHead(nn.Linear(8, 50, bias=False), Region(Groups()))
    hidden, labels = torch.randn(4, 8), torch.randint(0, 50, (4,))
    seen = set()
    plain = F.linear

    def spy(x, *rest):
        seen.add(x.dtype)
        return plain(x, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(vocab.F, "linear", spy)
        losses = head.token_losses(hidden, labels)
    assert seen == {torch.bfloat16} and losses.dtype == torch.float32


def test_embedding_gives_the_padding_row_no_gradient() -> None:
    embedding = VocabEmbedding(nn.Embedding(6, 3, padding_idx=2), Region(Groups()))
    embedding(torch.tensor([[2, 1]])).sum().backward()
    assert embedding.weight.grad[2].eq(0).all() and embedding.weight.grad[1].eq(1).all()


def test_the_loss_asks_the_host_nothing() -> None:
    head, hidden = _head(), torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (10,))
    with CountOperators() as counter:
        head.token_losses(hidden, labels).sum().backward()
    assert not counter.found()
