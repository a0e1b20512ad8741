"""The name table, against the files that transformers itself writes.

Catches a name that only one direction knows, an expert or a part put into another's place, and a family whose
published names differ from the table's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.models.file_names import Ignored, KeyTable, Renamed, Stacked, all_pieces
from lightning_npu_tp.tools.testing.models import tiny_config


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_pieces_are_what_transformers_saves(family: object, tmp_path: Path) -> None:
    config = tiny_config(family.name)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    table = family.keys(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    pieces = all_pieces(table, shapes.items())
    buffers = {name for name in files if name.endswith("e_score_correction_bias")}
    assert {piece.key for found in pieces.values() for piece in found} == set(files) - buffers
    for name, parameter in model.named_parameters():
        whole = torch.full(parameter.shape, torch.nan)
        for piece in pieces[name]:
            assert tuple(files[piece.key].shape) == piece.shape
            place = tuple(slice(start, stop) for start, stop in piece.bounds)
            whole[place] = files[piece.key].reshape(whole[place].shape)
        assert torch.equal(whole, parameter)


def test_an_overlap_is_what_a_part_needs_of_a_piece() -> None:
    table = KeyTable([Stacked("*.experts.both", ("*.e.#.gate", "*.e.#.up"))])
    whole = torch.arange(4 * 6 * 5).reshape(4, 6, 5)
    files = {f"m.e.{e}.{part}": whole[e, 3 * p : 3 * p + 3] for e in range(4) for p, part in enumerate(("gate", "up"))}
    for wanted in (((1, 3), (2, 5), (1, 4)), ((0, 4), (0, 6), (0, 5)), ((3, 4), (0, 1), (4, 5))):
        part = torch.full([stop - start for start, stop in wanted], -1)
        for piece in table.pieces("m.experts.both", whole.shape):
            if (found := piece.overlap(wanted)) is not None:
                inside, target = (tuple(slice(*pair) for pair in bounds) for bounds in found)
                part[target] = files[piece.key][inside].reshape(part[target].shape)
        assert torch.equal(part, whole[tuple(slice(*pair) for pair in wanted)])
    assert table.pieces("m.experts.both", whole.shape)[0].overlap(((1, 2), (0, 6), (0, 5))) is None


def test_files_may_hold_the_models_own_names_too() -> None:
    table = KeyTable([Stacked("*.experts.both", ("*.e.#.gate", "*.e.#.up")), Renamed("*.gate", "*.router")])
    assert [piece.key for piece in table.find("m.gate", (2, 3), {"m.router"})] == ["m.router"]
    assert [piece.key for piece in table.find("m.gate", (2, 3), {"m.gate"})] == ["m.gate"]
    assert [piece.key for piece in table.find("m.experts.both", (1, 2, 3), {"m.experts.both"})] == ["m.experts.both"]
    # Nothing there: what is missing is told in the published names.
    assert [piece.key for piece in table.find("m.gate", (2, 3), set())] == ["m.router"]
    assert [piece.key for piece in table.find("m.other", (2, 3), set())] == ["m.other"]


def test_what_is_ignored_has_a_reason() -> None:
    table = KeyTable(ignored=[Ignored("model.layers.9.*", "a reason")])
    assert table.why_ignored("model.layers.9.mlp.weight") == "a reason"
    assert table.why_ignored("model.layers.0.self_attn.rotary_emb.inv_freq") is not None
    assert table.why_ignored("model.layers.8.mlp.weight") is None


def test_layers_for_multi_token_prediction_are_not_the_models() -> None:
    (family,) = [family for family in FAMILIES if family.name == "deepseek_v3"]
    config = tiny_config("deepseek_v3")
    table, behind = family.keys(config), config.num_hidden_layers
    assert table.why_ignored(f"model.layers.{behind}.embed_tokens.weight") == "multi-token prediction"
    assert table.why_ignored(f"model.layers.{behind - 1}.input_layernorm.weight") is None


def test_a_table_that_cannot_be_right_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"m\.experts\.both of shape \(2, 5, 3\) cannot be made of 2 equal parts"):
        KeyTable([Stacked("*.experts.both", ("*.#.gate", "*.#.up"))]).pieces("m.experts.both", (2, 5, 3))
    with pytest.raises(CheckpointError, match="m.a and m.b both want m.b"):
        all_pieces(KeyTable([Renamed("*.a", "*.b")]), [("m.a", (1,)), ("m.b", (1,))])
