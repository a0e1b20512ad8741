"""What the packages take from other libraries without being promised it: it is there, and no more than is listed.

Catches an upgrade that renames a private attribute, a key or a frame that our code overrides, sets or looks for: some
would fail loudly, much would silently train something else. And a private name that comes in without a reason.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import textwrap
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import create_causal_mask
from upstream_defaults import READ_WITH_DEFAULT
from upstream_names import NOT_PRIVATE, NPU, PRIVATE, Names
from upstream_walk import (
    OPERATOR,
    ROOT,
    Use,
    all_uses,
    all_words,
    has,
    own_names,
    resolve,
    uses_by_inheritance,
    uses_in,
)

from lightning_npu_tp.launch.same_settings import _TRAINER_SETTINGS
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.models.layers.gqa import GroupedQueryAttention
from lightning_npu_tp.models.layers.mla import MLAttention
from lightning_npu_tp.models.layers.sharded_causal_lm import ATTENTION_NAME, ShardedCausalLM, ShardedDecoder


def title(entry: Names) -> str:
    return f"{entry.owner}:{entry.names.replace(' ', ',')}"[:100]


def require(entry: Names) -> None:
    library = entry.owner.partition(".")[0]
    for name in entry.names.split():
        try:
            there = has(resolve(entry.owner), name)
        except (ImportError, AttributeError):
            there = False
        assert there, (
            f"{library} {importlib.metadata.version(library)} has no {entry.owner}.{name} any more. Needed for: "
            f"{entry.why} Without it: {entry.loss}"
        )


@pytest.mark.parametrize("entry", [e for e in (*PRIVATE, *READ_WITH_DEFAULT) if e not in NPU], ids=title)
def test_what_we_use_is_there(entry: Names) -> None:
    require(entry)


def test_a_lost_name_fails_with_its_reason() -> None:
    for owner in ("torch", "torch.gone", "torch.nn.Linear", "torch.nn.Gone"):
        with pytest.raises(AssertionError, match="has no .*_none_such any more. Needed for: A. Without it: B."):
            require(Names(owner, "_none_such", "A.", "B."))


def test_no_private_name_is_used_without_a_reason() -> None:
    listed = {(entry.owner, name) for entry in PRIVATE for name in entry.names.split()}
    names = {name for _, name in listed} | NOT_PRIVATE.keys()
    unknown = [
        use for use in all_uses() if ((use.owner, use.name) not in listed if use.owner else use.name not in names)
    ]
    assert not unknown, (
        "Private names without a reason. Take a public way that exists in all supported versions; where there is none, "
        "say in tests/upstream_names.py why: " + "; ".join(f"{use.owner}.{use.name} at {use.where}" for use in unknown)
    )


def test_no_listed_name_is_out_of_use() -> None:
    uses = {(use.owner, use.name) for use in all_uses()}
    words = all_words()
    public = {(entry.owner, name) for entry in NPU for name in entry.names.split() if not name.startswith("_")}
    stale = [
        f"{entry.owner}.{name}"
        for entry in PRIVATE
        for name in entry.names.split()
        if not {(entry.owner, name), ("", name)} & uses and (entry.owner, name) not in public
    ]
    stale += [
        f"{entry.owner}.{name}" for entry in READ_WITH_DEFAULT for name in entry.names.split() if name not in words
    ]
    stale += [name for name in NOT_PRIVATE if ("", name) not in uses]
    assert not stale, f"Listed in tests/upstream_names.py or upstream_defaults.py, but used no more: {stale}"


def test_every_way_to_a_private_name_is_seen() -> None:
    text = """
import torch.distributed as dist
from torch.utils._pytree import tree_map
from torch.nn import Module, _x
import torch._c

class Own(Module):
    '''_documented'''
    def __init__(self):
        self._mine = dist.group._y
        self._upstreams()
        super()._supers()

def f(x, own):
    getattr(x, "_named")
    own._mine, x._there, x.__class__, x[0]._deep._er
    g(_keyword=1)
    log("torch.distributed._logger", f"{x}_part", "ends in _x", os._exit)
"""
    tree = ast.parse(text)
    found = {(use.owner, use.name) for use in uses_in(tree, "text", own_names(tree))}
    imported = {("torch.utils", "_pytree"), ("torch.nn", "_x"), ("torch", "_c")}
    dotted = {("torch.distributed.group", "_y"), ("torch.distributed", "_logger")}
    bare = {"_upstreams", "_supers", "_named", "_there", "_deep", "_er", "_keyword"}
    # os is not imported there; where it is, it is none of the libraries.
    assert found == imported | dotted | {("", name) for name in bare | {"_exit"}}


def test_overrides_of_private_methods_are_seen() -> None:
    found = list(uses_by_inheritance("lightning_npu_tp.models.moe.router"))
    assert [(use.owner, use.name) for use in found] == [("torch.nn.modules.module.Module", "_apply")]
    assert isinstance(found[0], Use) and "TopKRouter" in found[0].where


def test_operators_are_there() -> None:
    """An operator that is looked for by an old name is never found: audit would be blind for it, and not say so."""
    existing = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    named = {word for word in all_words() if OPERATOR.fullmatch(word)}
    assert len(named) > 60 and named <= existing, f"torch {torch.__version__} has no {sorted(named - existing)}"


def test_transformers_builds_no_mask_for_our_attention() -> None:
    """It would read a value on the host for it in every forward pass."""
    config = LlamaConfig(hidden_size=8, num_attention_heads=2)
    embeds = torch.zeros(1, 4, 8)
    arguments = {"inputs_embeds": embeds, "past_key_values": None}
    ours = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    config._attn_implementation = "eager"
    assert create_causal_mask(config, attention_mask=None, **arguments) is not None
    config._attn_implementation = ATTENTION_NAME
    assert create_causal_mask(config, attention_mask=None, **arguments) is None
    assert create_causal_mask(config, attention_mask=ours, **arguments) is ours


def arguments(forward: Callable[..., Any]) -> set[str]:
    """Named arguments of a forward, without self."""
    parameters = inspect.signature(forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name for each in parameters if each.kind in kinds} - {"self"}


def class_of(family: str, part: str) -> type:
    """transformers' class of a family, `part` instead of ForCausalLM in its name."""
    with torch.device("meta"):
        model = type(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=1)))
    return resolve(f"{model.__module__}.{model.__name__.replace('ForCausalLM', part)}")


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_transformers_calls_our_attention_with_what_it_knows(family: str) -> None:
    """Ours takes any keyword and leaves it: a mask or a cache under a new name would be ignored."""
    layer = class_of(family, "DecoderLayer")
    tree = ast.parse(textwrap.dedent(inspect.getsource(layer.forward)))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.self_attn"
    ]
    assert len(calls) == 1 and not calls[0].args
    passed = {keyword.arg for keyword in calls[0].keywords if keyword.arg}
    # Positions come as rotary tables; there is a cache where one is passed.
    left = {"position_ids", "use_cache"}
    for ours in (MLAttention, GroupedQueryAttention):
        # Our own decoder layer hands the forward pass down; transformers' does not know it.
        taken = arguments(ours.forward) - {"step"}
        waits = taken - passed - left
        assert not waits, f"{ours.__name__} waits for {waits}, which {layer.__name__} does not pass"
        assert passed <= taken | left, f"{ours.__name__} ignores {passed - taken - left}, which {layer.__name__} passes"


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_our_forwards_take_what_transformers_takes(family: str) -> None:
    """Keywords that nobody names are refused: what was renamed would be."""
    assert arguments(ShardedDecoder.forward) - {"return_dict", "step", "token_mask"} == arguments(
        class_of(family, "Model").forward
    )
    # Some are those of transformers' loss function and of its decorators.
    own = {"gather_logits", "shift_labels", "num_items_in_batch", "ignore_index", "return_dict", "token_mask"}
    # As the other switches output_…, it is no argument by name here.
    switch = {"output_router_logits"}
    assert arguments(ShardedCausalLM.forward) - own == arguments(class_of(family, "ForCausalLM").forward) - switch


def test_the_trainer_keeps_the_settings_that_ranks_compare() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    missing = [name for name in _TRAINER_SETTINGS if not hasattr(trainer, name)]
    assert not missing, f"Ranks that differ in these settings would not be noticed: {missing}"


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(map(Requirement, sum(project["optional-dependencies"].values(), project["dependencies"])))


def test_pinned_versions_lie_inside_the_bounds() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    for requirement in requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"constraints.txt pins {version}, pyproject.toml says {requirement}"


def test_whose_private_names_we_use_has_an_upper_bound() -> None:
    bounded = {r.name for r in requirements() if any(clause.operator in ("<", "<=") for clause in r.specifier)}
    # Hydra says which OmegaConf it works with.
    package = {"omegaconf": "hydra-core"}
    owners = {entry.owner.partition(".")[0] for entry in PRIVATE}
    assert {package.get(owner, owner) for owner in owners} <= bounded
