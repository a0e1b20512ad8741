"""Catches an audit that passes over what stalls an Ascend card, blames the wrong line, or cries over what does not.

Each fault is planted in a line that ends in `# here`; operator, kind, file and line must come back. The other half
is what must stay silent: numbers that never were on the card, and our own models.
"""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typer.testing import CliRunner

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.families.registry import supported
from lightning_npu_tp.models.moe import dispatch
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools import audit_run
from lightning_npu_tp.tools.audit import Finding, Recorder, merge
from lightning_npu_tp.tools.cli import app
from lightning_npu_tp.tools.operators import CLASSES, classify, operator_table, parse
from lightning_npu_tp.tools.operators.limits import DTYPE, DYNAMIC, FALLBACK, SYNC
from lightning_npu_tp.tools.testing.models import random_batch, tiny_config

ALONE = Layout(1, 1, 1)


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if grad.abs().max() < 1e9 else grad * 0  # here


def item(x: Tensor) -> Tensor:
    return x * x.sum().item()  # here


def truth(x: Tensor) -> Tensor:
    return x if x.sum() > 1e9 else x + 1  # here


def tolist(x: Tensor) -> Tensor:
    return x * len(x.tolist())  # here


def to_cpu(x: Tensor) -> Tensor:
    return x * len(x.cpu())  # here


def numpy(x: Tensor) -> Tensor:
    return x * len(x.detach().float().numpy())  # here


def one_hot_of_unknown_size(x: Tensor) -> Tensor:
    return x + F.one_hot(x.argmax(-1)).sum()  # here


def histc_of_unknown_range(x: Tensor) -> Tensor:
    return x + torch.histc(x.detach().float(), bins=4).sum()  # here


def reads_in_backward(x: Tensor) -> Tensor:
    return ReadsInBackward.apply(x)


def nonzero(x: Tensor) -> Tensor:
    return x * len(torch.nonzero(x > 0))  # here


def mask(x: Tensor) -> Tensor:
    return x * x[x > 0].sum()  # here


def unique(x: Tensor) -> Tensor:
    return x * len(torch.unique(x.argmax(-1)))  # here


def repeats(x: Tensor) -> Tensor:
    return x * len(torch.repeat_interleave(x, torch.ones(len(x), dtype=torch.long), dim=0))  # here


def mode(x: Tensor) -> Tensor:
    return x + torch.mode(x.detach(), dim=0).values  # here


def composite_of_a_fallback(x: Tensor) -> Tensor:
    return x + torch.logcumsumexp(x, 0)  # here


def structured_without_kernel(x: Tensor) -> Tensor:
    return x + torch.lgamma(x.abs() + 1)  # here


def scatter_reduce(x: Tensor) -> Tensor:
    index = torch.zeros(len(x), x.shape[1], dtype=torch.long)
    return x + x.detach().scatter_reduce(0, index, x.detach(), "amax")  # here


def argsort(x: Tensor) -> Tensor:
    return x + torch.argsort(x, dim=-1)  # here


def cumsum(x: Tensor) -> Tensor:
    return x + x.detach().cumsum(0)  # here


def index_add(x: Tensor) -> Tensor:
    return x.index_add(0, torch.zeros(1, dtype=torch.long), x[:1].detach())  # here


def unsorted_topk(x: Tensor) -> Tensor:
    return x + x.topk(2, sorted=False).values.sum()  # here


def double(x: Tensor) -> Tensor:
    return x + x.detach().double().sum().to(x.dtype)  # here


def float64_zeros(x: Tensor) -> Tensor:
    return x + torch.zeros(2, dtype=torch.float64, device=x.device).sum().to(x.dtype)  # here


def polar(x: Tensor) -> Tensor:
    return x + torch.polar(x.detach().float(), x.detach().float()).real.to(x.dtype)  # here


def large_repeat(x: Tensor) -> Tensor:
    return x + x.detach().expand(2**19, 3, 4).repeat_interleave(1, dim=0)[0]  # here


PLANTED = [
    (item, SYNC, "aten::_local_scalar_dense"),
    (truth, SYNC, "aten::_local_scalar_dense"),
    (tolist, SYNC, "Tensor.tolist"),
    (to_cpu, SYNC, "Tensor.cpu"),
    (numpy, SYNC, "Tensor.numpy"),
    (one_hot_of_unknown_size, SYNC, "aten::one_hot"),
    (histc_of_unknown_range, SYNC, "aten::histc"),
    (reads_in_backward, SYNC, "aten::_local_scalar_dense"),
    (nonzero, DYNAMIC, "aten::nonzero"),
    (mask, DYNAMIC, "aten::index.Tensor"),
    (unique, DYNAMIC, "aten::_unique2"),
    (repeats, DYNAMIC, "aten::repeat_interleave.Tensor"),
    (mode, FALLBACK, "aten::mode"),
    (composite_of_a_fallback, FALLBACK, "aten::_logcumsumexp"),
    (structured_without_kernel, FALLBACK, "aten::lgamma"),
    (scatter_reduce, FALLBACK, "aten::scatter_reduce.two"),
    (argsort, DTYPE, "aten::sort"),
    (cumsum, DTYPE, "aten::cumsum"),
    (index_add, DTYPE, "aten::index_add"),
    (unsorted_topk, DTYPE, "aten::topk"),
    (double, DTYPE, "aten::_to_copy"),
    (float64_zeros, DTYPE, "aten::zeros"),
    (polar, DTYPE, "aten::polar"),
    (large_repeat, DTYPE, "aten::repeat_interleave"),
]


class Planted(nn.Module):
    def __init__(self, fault: Any) -> None:
        super().__init__()
        self.fault = fault
        self.inner = nn.ModuleList([nn.Linear(4, 4, dtype=torch.bfloat16)])

    def forward(self, x: Tensor) -> Tensor:
        return self.fault(self.inner[0](x)).float().square().mean()


def watch(fault: Any, **options: Any) -> list[Finding]:
    root = nn.ModuleDict({"block": Planted(fault)})
    optimizer = torch.optim.AdamW(root.parameters(), **options)
    with Recorder(root) as recorder:
        root["block"](torch.linspace(-1, 1, 12).view(3, 4).to(torch.bfloat16)).backward()
        optimizer.step()
    return recorder.findings()


def line_of(planted: Any) -> int:
    lines, first = inspect.getsourcelines(ReadsInBackward if planted is reads_in_backward else planted)
    return first + next(number for number, line in enumerate(lines) if line.rstrip().endswith("# here"))


@pytest.mark.parametrize("fault, kind, operator", PLANTED, ids=[fault.__name__ for fault, *_ in PLANTED])
def test_a_planted_fault_is_found_where_it_is(fault: Any, kind: str, operator: str) -> None:
    found = watch(fault)
    matching = [finding for finding in found if (finding.kind, finding.operator) == (kind, operator)]
    assert [(f.place.file, f.place.line) for f in matching][:1] == [(__file__, line_of(fault))], found
    first = matching[0]
    assert first.count == 1 and first.modules == ["block"] and not first.allowed and first.instead and first.source
    assert first.place.backward == (fault is reads_in_backward)
    # What one line does wrong has no echo elsewhere.
    assert {f.place.line for f in found} == {line_of(fault)}, found


def test_a_gradients_operator_is_told_by_the_line_of_the_forward_pass() -> None:
    (found,) = (f for f in watch(lambda x: clamped(x)) if f.place.backward)
    assert found.operator == "aten::_logcumsumexp" and found.place.line == line_of(clamped) and found.count == 2


def clamped(x: Tensor) -> Tensor:
    y = x.clamp(-1, 1)
    return torch.logcumsumexp(y, 0)  # here


def harmless(x: Tensor) -> Tensor:
    # Never on the card: a number made here, and one that the user asked to have on the CPU.
    steps = torch.tensor(3.0).item() + torch.zeros(2, device="cpu").add(1).sum().item()
    picks = F.one_hot(x.detach().argmax(-1), 4).to(x.dtype)
    rows = torch.repeat_interleave(x, 2, dim=0)[: len(x)]
    seen = F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0]
    counts = torch.histc(x.detach().float(), bins=4, min=-1, max=1).sum()
    normed = F.rms_norm(x, (4,))
    return x * steps + picks + rows + seen + counts + normed + x.float().sort(-1).values + x.topk(2).values.sum()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "for-each", "fused"])
def test_what_does_not_stall_is_not_reported(options: dict[str, Any]) -> None:
    assert watch(harmless, **options) == []


def test_parameters_of_float64_are_named() -> None:
    layer = nn.Linear(2, 2, dtype=torch.float64)
    with Recorder(nn.ModuleDict({"head": layer})) as recorder:
        pass
    assert [modules for f in recorder.findings() for modules in f.modules] == ["head.weight", "head.bias"]


def test_what_is_allowed_by_pattern_is_told_and_does_not_count() -> None:
    root = Planted(item)
    with Recorder(root) as recorder:
        root(torch.ones(2, 4, dtype=torch.bfloat16))
    for pattern in ("aten::_local_scalar_dense", f"*{Path(__file__).name}:{line_of(item)}"):
        assert [f.allowed for f in recorder.findings([pattern])] == [f"--allow {pattern}"]
    assert [f.allowed for f in recorder.findings(["aten::mode"])] == [""]


def test_ranks_come_together_with_the_largest_count() -> None:
    one, two = (watch(item) for _ in range(2))
    two[0].count, two[0].modules = 5, ["block", "other"]
    (found,) = merge([one, two, []])
    assert found.count == 5 and found.modules == ["block", "other"]


# --- the table ------------------------------------------------------------------------------


def test_the_table_has_the_numbers_that_were_counted_in_the_wheel() -> None:
    table = operator_table()
    found = [kind for name, kind in table.classes.items() if name.startswith("aten::")]
    # The reference counts 945 and 227: 82 composites end in a fallback at once, by torch's native_functions.yaml.
    assert [found.count(kind) for kind in CLASSES] == [1078, 0, 697, 863, 309, 163]
    assert (table.torch, table.torch_npu) == ("2.13.0", "2.13.0")
    for operator, kind in {
        "aten::nonzero_static": "fallback",
        "aten::_assert_async": "fallback",
        "aten::lgamma": "fallback",
        "aten::index_reduce": "fallback",
        "aten::rms_norm": "implicit",
        "aten::_grouped_mm": "explicit",
        "aten::index_put_": "native",
        "npu::npu_grouped_matmul": "custom",
    }.items():
        assert table.of(operator) == kind, operator
    assert parse(table.as_text()) == table


def test_an_operator_that_the_table_does_not_know_is_asked_about() -> None:
    with torch.library._scoped_library("audited", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CPU")
        assert classify("audited::twice", ()) == "fallback"
        root = Planted(lambda x: x + torch.ops.audited.twice(x.detach()))
        with Recorder(root) as recorder:
            root(torch.ones(2, 4, dtype=torch.bfloat16))
        assert [(f.kind, f.operator) for f in recorder.findings()] == [(FALLBACK, "audited::twice")]


# --- whole models ---------------------------------------------------------------------------


def in_this_process(function: Any, world_size: int, request: Any, **_: Any) -> list[Any]:
    assert world_size == 1
    return [function(0, 1, request)]


def audit(family: str, **options: Any) -> list[Finding]:
    unconverted = options.pop("unconverted", False)
    request = audit_run.Request(
        config=tiny_config(family), layout=ALONE, options=Options(**options), unconverted=unconverted
    )
    return audit_run.audit(request, run=in_this_process)[0]


@pytest.fixture
def alone() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", supported())
def test_no_family_of_ours_stalls(family: str, alone: None) -> None:
    assert audit(family) == []


def test_one_read_per_exchange_is_by_design_and_a_second_is_not(alone: None, monkeypatch: Any) -> None:
    (found,) = audit("deepseek_v2", dispatch="all_to_all", recompute="block")
    # Two mixture layers, three micro-batches; and nothing more for the second run.
    assert found.allowed.startswith("by design") and found.count == 6 and found.kind == SYNC
    exchange = dispatch._exchange_counts
    monkeypatch.setattr(dispatch, "_exchange_counts", lambda *given: (exchange(*given), exchange(*given))[1])
    counts = {bool(f.allowed): f.count for f in audit("deepseek_v2", dispatch="all_to_all", recompute="block")}
    assert counts == {True: 6, False: 6}


def test_transformers_v2_shows_its_loop_and_its_complex_numbers(alone: None) -> None:
    found = audit("deepseek_v2", unconverted=True)
    seen = {(f.kind, f.operator, f.place.backward) for f in found if "deepseek_v2/modeling" in f.where}
    assert {
        (DYNAMIC, "aten::nonzero", False),
        (DTYPE, "aten::polar", False),
        (DTYPE, "aten::view_as_complex", False),
        (DTYPE, "aten::mul.Tensor", True),
        (DTYPE, "aten::index_add_", False),
    } <= seen
    # Its other way to run experts, which it prefers.
    assert any(f.operator == "aten::_grouped_mm" and f.kind == SYNC for f in found)
    assert {"model.layers.1.mlp.experts", "model.rotary_emb"} <= {module for f in found for module in f.modules}


# --- the command and the user's own module --------------------------------------------------


MADE: list[torch.optim.Optimizer] = []


class Users(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.layer(batch["x"].to(self.layer.weight.dtype)).float().square().mean()
        self.log("loss", loss)
        self.log("read", loss.item())  # here
        return loss

    def configure_optimizers(self) -> Any:
        MADE.append(torch.optim.SGD(self.parameters(), lr=0.1))
        return MADE[-1]


def users_module() -> Any:
    return Users(), {"x": torch.randn(2, 4)}


def no_module() -> Any:
    return 3


def command(monkeypatch: Any, *arguments: str) -> Any:
    monkeypatch.setattr(audit_run, "audit", partial(audit_run.audit, run=in_this_process))
    return CliRunner().invoke(app, ["audit", *arguments])


def test_the_users_module_is_audited_with_its_hooks_and_optimizer(monkeypatch: Any, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    result = command(monkeypatch, "--module", f"{__name__}:users_module", "--unconverted", "--json", str(file))
    assert result.exit_code == 1, result.output
    line = line_of(Users.training_step)
    content = json.loads(file.read_text())
    (found,) = content["findings"]
    assert not content["ok"] and found["place"]["line"] == line and found["kind"] == SYNC
    assert f"{Path(__file__).name}:{line}" in result.output.replace("\n", "") or str(line) in result.output
    assert "1 findings in a training step: host sync 1x" in result.output
    # As it would be on a card, where nothing was chosen.
    assert MADE[-1].param_groups[0]["foreach"] is True
    allowed = command(monkeypatch, "--module", f"{__name__}:users_module", "--unconverted", "--allow", "*scalar_dense")
    assert allowed.exit_code == 0 and "nothing in a training step would stall" in allowed.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "either --model NAME or --module"),
        (["--model", "deepseek_v2_tiny", "--module", "a:b"], "either --model NAME or --module"),
        (["--model", "nothing_like_it"], "--model nothing_like_it"),
        (["--model", "deepseek_v2_tiny", "--tensor", "0"], "--tensor 0"),
        (["--model", "deepseek_v2_tiny", "--dtype", "float64"], "--dtype float64"),
        (["--model", "deepseek_v2_tiny", "--tensor", "2", "--unconverted"], "--unconverted"),
        (["--model", "deepseek_v2_tiny", "--tensor", "5"], "tensor_parallel_size=5"),
        (["--module", "no_such_package:make"], "--module no_such_package:make cannot be imported"),
        (["--module", f"{__name__}:ALONE"], "Name a function"),
        (["--module", f"{__name__}:no_module", "--unconverted"], "made a int"),
    ],
)
def test_a_mistake_is_told_in_a_line(monkeypatch: Any, arguments: list[str], words: str) -> None:
    result = command(monkeypatch, *arguments)
    assert result.exit_code == 2 and words in result.output and "Traceback" not in result.output


def test_the_batches_are_plain_padded_and_packed() -> None:
    plain, padded, packed = audit_run.batches_of(tiny_config("llama"), Layout(4, 2, 2))
    assert len(plain["input_ids"]) == 4 and set(plain) == {"input_ids", "labels"}
    assert not padded["attention_mask"].all() and (packed["position_ids"] == 0).sum() == 8
    assert random_batch(tiny_config("llama"), 1, 4, 0)["labels"].shape == (1, 4)


def test_dtypes_that_do_not_train_on_a_card_are_refused() -> None:
    with pytest.raises(ConfigError, match="--dtype int8"):
        audit_run.audit(audit_run.Request(config=None, layout=ALONE, options=Options(), dtype="int8"))
