"""Sources with weights. Catches: an epoch that takes another share than the weight says, a sequence that is never
reached, an order that depends on the layout or that a resumed run does not find again, and validation counted twice."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_npu_tp.errors import DataError
from lit_models.data.chat import ChatDataModule
from lit_models.data.mixture import MixedSet, Mixture, Source
from lit_models.data.order import EpochSampler
from lit_models.data.packing import PackedDataset
from lit_models.data.streams import TokenStream
from lit_models.data.text import TextDataModule


def epoch_of(mixture: Mixture, epoch: int) -> list[int]:
    return mixture.indices(epoch, np.arange(mixture.size)).tolist()


def test_an_epoch_takes_from_each_source_what_its_weight_says_and_none_is_left_out() -> None:
    mixture = Mixture([10, 7, 4], [0.5, 1, 2.5], seed=3, shuffle=True)
    assert mixture.counts == [5, 7, 10] and mixture.size == 22
    epochs = [epoch_of(mixture, epoch) for epoch in range(4)]
    for indices in epochs:
        assert Counter(np.searchsorted([10, 17, 21], indices, side="right").tolist()) == {0: 5, 1: 7, 2: 10}
        assert sorted(index for index in indices if 10 <= index < 17) == list(range(10, 17))
    # Half of the first in one epoch, the other half in the next, and so again.
    halves = [{index for index in indices if index < 10} for indices in epochs]
    assert halves[0] | halves[1] == set(range(10)) == halves[2] | halves[3] and halves[0] != halves[2]
    # Of the third two or three of each in one epoch, five in two.
    assert set(Counter(index for index in epochs[0] if index >= 17).values()) <= {2, 3}
    assert set(Counter(index for indices in epochs[:2] for index in indices if index >= 17).values()) == {5}
    # Mixed, in another order each epoch, and the same when it is asked again.
    assert len({tuple(indices) for indices in epochs}) == 4
    assert any(a < 10 <= b for a, b in zip(epochs[0], epochs[0][1:], strict=False))
    again = Mixture([10, 7, 4], [0.5, 1, 2.5], seed=3, shuffle=True)
    assert epoch_of(again, 3) == epochs[3]
    assert again.indices(3, np.array([21, 0, 5])).tolist() == [epochs[3][place] for place in (21, 0, 5)]
    assert epoch_of(Mixture([10, 7, 4], [0.5, 1, 2.5], seed=4, shuffle=True), 0) != epochs[0]


def test_sources_that_are_alike_do_not_go_in_step() -> None:
    indices = epoch_of(Mixture([50, 50], [0.5, 0.5], seed=0, shuffle=True), 0)
    assert {index for index in indices if index < 50} != {index - 50 for index in indices if index >= 50}


def test_without_shuffling_the_sources_lie_end_to_end() -> None:
    mixture = Mixture([3, 2], [2, 0.5], seed=0, shuffle=False)
    assert epoch_of(mixture, 0) == epoch_of(mixture, 1) == [0, 1, 2, 0, 1, 2, 3]
    assert Mixture([100, 3], [1, 0.01], seed=0, shuffle=False).counts == [100, 1]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_any_layout_sees_the_same_order_from_any_place(replicas: int) -> None:
    mixture = Mixture([10, 7, 4], [0.5, 1, 2.5], seed=3, shuffle=True)
    expected = epoch_of(mixture, 1)

    def seen(start: int) -> list[int]:
        ranks = []
        for rank in range(replicas):
            sampler = EpochSampler(
                range(21), num_replicas=replicas, rank=rank, batch_size=4 // replicas, shuffle=True, seed=3,
                size=mixture.size, indices_of=mixture.indices,
            )  # fmt: skip
            sampler.set_epoch(1)
            sampler.start = start
            ranks.append(list(sampler))
            assert len(sampler) == 20 // replicas
        return [index for indices in zip(*ranks, strict=True) for index in indices]

    assert seen(0) == expected[:20] and seen(8) == expected[8:20]


def corpus(folder: Path, name: str, count: int) -> str:
    (folder / name).mkdir()
    for number in range(count):
        (folder / name / f"{number:03}.txt").write_text(f"{name} {number:03} " * 8)
    return str(folder / name)


def texts(batches: Any) -> list[str]:
    return [bytes(row[row < 256].tolist()).decode() for batch in batches for row in batch["input_ids"]]


def test_a_data_module_mixes_its_sources(tmp_path: Path) -> None:
    sources = [{"path": corpus(tmp_path, "aa", 30), "weight": 2}, corpus(tmp_path, "bb", 30)]
    settings: dict[str, Any] = {"source": "text", "sequence_length": 32, "batch_size": 4, "val_fraction": 0.2}
    data = TextDataModule(sources=sources, cache_dir=tmp_path / "cache", **settings)
    alone = [TextDataModule(paths=path, **settings) for path in (tmp_path / "aa", tmp_path / "bb")]
    sizes = [len(one.train_dataloader().dataset) for one in alone]
    taken = texts(data.train_dataloader())
    assert len(taken) == (2 * sizes[0] + sizes[1]) // 4 * 4
    of_aa = sum("aa" in text for text in taken) / len(taken)
    assert of_aa == pytest.approx(2 * sizes[0] / (2 * sizes[0] + sizes[1]), abs=0.02)
    # Each source is split by itself, validation counts each once, whatever the weights.
    validation = texts(data.val_dataloader())
    assert [text for text in validation if text] == [t for one in alone for t in texts(one.val_dataloader()) if t]
    summary = data.summary()
    assert "data: 2 sources, " in summary
    assert f"{tmp_path / 'aa'}, weight 2: {2 * sizes[0]} sequences an epoch" in summary
    other = TextDataModule(sources=[sources[0] | {"weight": 1}, sources[1]], cache_dir=tmp_path / "cache", **settings)
    assert other.identity() != data.identity() and other.identity()["content"] == data.identity()["content"]


def test_files_that_validate_are_left_out_of_every_source_and_counted_once(tmp_path: Path) -> None:
    sources = [corpus(tmp_path, "aa", 8), corpus(tmp_path, "bb", 8)]
    held_out = [f"{sources[0]}/000.txt", f"{sources[1]}/000.txt"]
    settings: dict[str, Any] = {"source": "text", "val_paths": held_out, "sequence_length": 64, "batch_size": 2}
    data = TextDataModule(sources=sources, **settings)
    learnt = texts(data.train_dataloader())
    assert not any("aa 000" in text or "bb 000" in text for text in learnt)
    assert any("aa 001" in text for text in learnt)
    alone = TextDataModule(paths=sources[0], **settings)
    assert texts(data.val_dataloader()) == texts(alone.val_dataloader())


def test_a_blank_sequence_has_the_keys_of_the_others(tmp_path: Path) -> None:
    sources = [corpus(tmp_path, "aa", 3), corpus(tmp_path, "bb", 3)]
    data = TextDataModule(source="text", sources=sources, val_fraction=0.4, sequence_length=16, batch_size=4)
    data.setup()
    assert isinstance(data.val_set, MixedSet)
    rounded = data.val_set.round_up(data.val_set.num_sequences + 1)
    assert len(rounded) == data.val_set.num_sequences + 1 and {
        frozenset(rounded[index]) for index in range(len(rounded))
    } == {frozenset(("input_ids", "labels", "token_mask"))}
    blank = rounded[len(rounded) - 1]
    assert (blank["labels"] == -100).all() and not blank["token_mask"].any()
    assert torch.equal(rounded[0]["input_ids"], data.val_set[0]["input_ids"]) and rounded[0]["token_mask"].any()
    # Also where no set has padding of its own.
    full = PackedDataset(TokenStream(np.arange(7), np.array([0])), sequence_length=4, pad_id=9)
    assert "token_mask" not in MixedSet([full, full])[0]
    rounded = MixedSet([full, full]).round_up(5)
    assert [int(rounded[index]["token_mask"].sum()) for index in range(5)] == [4, 4, 4, 4, 0]


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([{"path": "a", "weight": 0}], r"data.sources\[0\].weight=0 is no number above 0"),
        (["a", {"path": "a", "weight": "2"}], r"data.sources\[1\].weight='2' is no number"),
        ([{"path": "a", "weight": True}], "weight=True is no number"),
        ([{"path": "a", "weight": float("nan")}], "weight=nan is no number"),
        ([{"paths": ["a"]}], r"data.sources\[0\]=.*is no source. Write {path: FOLDER, weight: 1.0}"),
        ([{"path": ["a", "b"]}], "A source has one; several are several sources"),
        ([3], r"data.sources\[0\]=3 is no source"),
    ],
)
def test_a_wrong_source_is_told(sources: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        TextDataModule(source="text", sources=sources)


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = [corpus(tmp_path, "aa", 8), str(tmp_path / "bb")]
    with pytest.raises(DataError, match=r"data.sources\[1\]: .*bb.*does not exist"):
        TextDataModule(source="text", sources=missing, sequence_length=16).setup()
    with pytest.raises(DataError, match="data.paths and data.sources are both set"):
        TextDataModule(source="text", paths="a", sources=["b"])
    with pytest.raises(DataError, match="data.sources and val_paths need data.source=text"):
        TextDataModule(sources=["b"])
    for module in (partial(TextDataModule, source="text"), ChatDataModule):
        with pytest.raises(DataError, match="data.paths is empty.*or data.sources"):
            module()
    assert Source.of("a", 0) == Source.of({"path": "a"}, 0) == Source("a", 1.0)
