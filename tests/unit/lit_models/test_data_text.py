"""Catches: a document on both sides of the split, an order that differs between processes or ranks, sequences given
twice or never over data ranks, Lightning reshuffling behind our back, and settings that fail late or silently."""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_npu_tp.errors import DataError
from lit_models.data import ByteTokenizer, TextDataModule
from lit_models.data.documents import split_point

CONF = Path(__file__).parents[3] / "conf" / "data"


def corpus(folder: Path, count: int = 60) -> Path:
    """`count` documents, each of which says its number in every line."""
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(f"<{number}> 深度学习\n" * (1 + number % 7))
    return folder


def data_module(folder: Path, **settings) -> TextDataModule:
    defaults = {"sequence_length": 32, "batch_size": 4, "val_fraction": 0.2}
    return TextDataModule(source="text", paths=[folder], **{**defaults, **settings})


def on_data_rank(data: TextDataModule, rank: int, of: int) -> TextDataModule:
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": of, "rank": rank})
    return data


def inputs(loader) -> list[torch.Tensor]:
    return [batch["input_ids"] for batch in loader]


def numbers_in(dataset) -> set[int]:
    text = ByteTokenizer().decode(dataset.stream.tokens)
    return {int(number) for number in re.findall(r"<(\d+)>", text)}


# The split


def test_every_document_is_on_exactly_one_side(tmp_path):
    data = data_module(corpus(tmp_path))
    data.setup()
    train, validation = numbers_in(data.train_set), numbers_in(data.val_set)
    assert train | validation == set(range(60))
    assert not train & validation
    assert 0.05 < len(validation) / 60 < 0.4
    reseeded = data_module(tmp_path, seed=1)
    reseeded.setup()
    assert numbers_in(reseeded.val_set) != validation


def test_another_file_moves_no_document_to_the_other_side(tmp_path):
    before = data_module(corpus(tmp_path))
    before.setup()
    (tmp_path / "000a.txt").write_text("<100>\n")
    after = data_module(tmp_path)
    after.setup()
    assert numbers_in(after.val_set) - {100} == numbers_in(before.val_set)


@pytest.mark.parametrize(("val_fraction", "moved"), [(0.001, min), (0.999, max)])
def test_few_documents_still_leave_the_nearest_on_the_empty_side(tmp_path, val_fraction, moved):
    data = data_module(corpus(tmp_path, count=5), val_fraction=val_fraction, sequence_length=8, seed=1)
    data.setup()
    nearest = moved(range(5), key=lambda number: split_point(data.seed, f"{number:03}.txt"))
    assert nearest != 0  # otherwise taking just the first would pass
    alone, rest = (data.val_set, data.train_set) if moved is min else (data.train_set, data.val_set)
    assert numbers_in(alone) == {nearest}
    assert numbers_in(rest) == set(range(5)) - {nearest}


def test_a_lone_document_is_cut_in_two_and_the_summary_says_so(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"{number:04}" for number in range(250)))
    data = data_module(tmp_path, val_fraction=0.1)
    data.setup()
    decode = ByteTokenizer().decode
    assert decode(data.val_set.stream.tokens) == "".join(f"{number:04}" for number in range(225, 250))
    assert decode(data.train_set.stream.tokens) == "".join(f"{number:04}" for number in range(225))
    assert "the only document is cut in two: its last 10% validate" in data.summary()


def test_validation_paths_are_used_whole_and_kept_out_of_training(tmp_path):
    corpus(tmp_path, count=20)
    data = data_module(tmp_path, val_paths=[tmp_path / "00[0-4].txt"])
    data.setup()
    assert numbers_in(data.val_set) == set(range(5))
    assert numbers_in(data.train_set) == set(range(5, 20))
    with pytest.raises(DataError, match=r"data\.val_paths names every file of data\.paths"):
        data_module(tmp_path, val_paths=tmp_path).setup()


def test_fraction_zero_means_no_validation_and_uses_every_document(tmp_path):
    data = data_module(corpus(tmp_path), val_fraction=0.0)
    assert data.val_dataloader() == data.test_dataloader() == data.predict_dataloader() == []
    assert numbers_in(data.train_set) == set(range(60))
    assert "validation: none" in data.summary()


def test_limits_bound_each_side(tmp_path):
    data = data_module(corpus(tmp_path), max_tokens=300, max_val_tokens=50)
    data.setup()
    assert (data.train_set.stream.num_tokens, data.val_set.stream.num_tokens) == (300, 50)
    data = data_module(tmp_path, max_documents=3)
    data.setup()
    assert data.train_set.stream.num_documents == 3
    assert numbers_in(data.val_set)  # the limit is on training documents


def test_reading_stops_when_both_sides_have_enough(tmp_path):
    (corpus(tmp_path) / "999.txt").write_bytes(b"\xff")
    data_module(tmp_path, max_tokens=300, max_val_tokens=50).setup()
    with pytest.raises(DataError, match=r"999\.txt is not UTF-8 text"):
        data_module(tmp_path, max_tokens=300).setup()  # validation still wants more


def test_files_are_read_once_for_all_stages(tmp_path):
    data = data_module(corpus(tmp_path))
    data.setup("fit")
    for file in tmp_path.iterdir():
        file.unlink()
    for stage in ("validate", "test", "predict"):
        data.setup(stage)
    assert len(list(data.val_dataloader()))


def test_validation_keeps_its_last_incomplete_sequence(tmp_path):
    data = data_module(corpus(tmp_path))
    data.setup()
    tokens = data.val_set.stream.num_tokens
    assert (tokens - 1) % 31  # the last sequence is incomplete, or the test shows nothing
    assert (data.val_set.num_predicted, data.val_set.num_dropped) == (tokens - 1, 0)


def test_documents_without_text_are_counted(tmp_path):
    corpus(tmp_path, count=30)
    (tmp_path / "a.txt").write_text("")
    data = data_module(tmp_path)
    assert "skipped: 1 empty documents" in data.summary()
    assert data.train_set.stream.num_documents + data.val_set.stream.num_documents == 30


# Order


def test_an_epoch_is_a_new_order_of_the_same_sequences_set_by_the_seed(tmp_path):
    def epoch(data, number):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat(inputs(loader))

    data = data_module(corpus(tmp_path), batch_size=1)
    first, second = epoch(data, 0), epoch(data, 1)
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())
    torch.manual_seed(99)  # the run's own seed has no say
    assert torch.equal(epoch(data_module(tmp_path, batch_size=1), 1), second)
    # Without validation the seed cannot change the split, and what differs is the order.
    orders = [epoch(data_module(tmp_path, batch_size=1, val_fraction=0, seed=seed), 0) for seed in (0, 1)]
    assert not torch.equal(*orders)
    assert sorted(orders[0].tolist()) == sorted(orders[1].tolist())
    ordered = epoch(data_module(tmp_path, batch_size=1, shuffle=False), 1)
    assert torch.equal(ordered, torch.stack([item["input_ids"] for item in data.train_set]))


def batches_digest() -> str:
    data = TextDataModule(max_tokens=50_000, max_val_tokens=5_000)
    digest = hashlib.sha256()
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()


def test_a_process_with_another_hash_seed_builds_the_same_batches():
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    code = "import test_data_text; print(test_data_text.batches_digest())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == batches_digest()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_loader_processes_change_nothing(tmp_path):
    alone, helped = data_module(corpus(tmp_path)), data_module(tmp_path, num_workers=1)
    for ours, theirs in zip(inputs(alone.train_dataloader()), inputs(helped.train_dataloader()), strict=True):
        assert torch.equal(ours, theirs)


# Ranks


def test_ranks_of_one_data_rank_see_the_same_batches(tmp_path):
    corpus(tmp_path)
    first, second = (on_data_rank(data_module(tmp_path), rank=1, of=2) for _ in range(2))
    for ours, theirs in zip(inputs(first.train_dataloader()), inputs(second.train_dataloader()), strict=True):
        assert torch.equal(ours, theirs)


def test_data_ranks_together_see_the_batches_of_one_process(tmp_path):
    corpus(tmp_path)
    alone = inputs(data_module(tmp_path, batch_size=8).train_dataloader())
    ranks = [inputs(on_data_rank(data_module(tmp_path), rank, of=2).train_dataloader()) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(alone)
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert sorted(whole.tolist()) == sorted(torch.cat(parts).tolist())


def test_no_training_sequence_is_given_twice_to_even_ranks_out(tmp_path):
    data = data_module(corpus(tmp_path), batch_size=1)
    data.setup()
    replicas = next(number for number in range(2, 9) if len(data.train_set) % number)
    ranks = [inputs(on_data_rank(data, rank, of=replicas).train_dataloader()) for rank in range(replicas)]
    assert len({len(of_rank) for of_rank in ranks}) == 1
    given = [tuple(row.flatten().tolist()) for of_rank in ranks for row in of_rank]
    stored = Counter(tuple(item["input_ids"].tolist()) for item in data.train_set)
    assert len(given) == len(data.train_set) // replicas * replicas
    assert not Counter(given) - stored


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_validation_counts_every_sequence_once_in_batches_of_one_shape(tmp_path, replicas):
    corpus(tmp_path)
    data = data_module(tmp_path)
    data.setup()
    assert data.val_set.num_sequences % (4 * replicas)  # otherwise the test shows nothing
    batches = [
        list(on_data_rank(data_module(tmp_path), rank, of=replicas).val_dataloader()) for rank in range(replicas)
    ]
    assert len({len(of_rank) for of_rank in batches}) == 1
    flat = [batch for of_rank in batches for batch in of_rank]
    assert {tuple(batch["labels"].shape) for batch in flat} == {(4, 32)}
    real = [row for batch in flat for row in batch["labels"].tolist() if set(row) != {-100}]
    assert sorted(real) == sorted(item["labels"].tolist() for item in data.val_set)
    assert sum(label != -100 for row in real for label in row) == data.val_set.num_predicted


class Recorder(LightningModule):
    """Trains one number and remembers the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.validated = 0

    def training_step(self, batch):
        self.seen.append(batch["input_ids"].clone())
        return self.weight * 1.0

    def validation_step(self, batch):
        self.validated += int((batch["labels"] != -100).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
# Lightning's own: our loaders need no worker processes, and torch 2.13 deprecates a class that it still calls.
lightnings_warnings = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec:FutureWarning"
)


@lightnings_warnings
def test_lightning_sets_the_epoch_and_validates_every_token(tmp_path):
    data, model = data_module(corpus(tmp_path), batch_size=8), Recorder()
    Trainer(max_epochs=2, devices=1, **QUIET).fit(model, datamodule=data)
    per_epoch = len(data.train_dataloader())
    assert len(model.seen) == 2 * per_epoch
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        expected = torch.cat(inputs(loader))
        assert torch.equal(torch.cat(model.seen[epoch * per_epoch : (epoch + 1) * per_epoch]), expected)
    assert model.validated == 2 * data.val_set.num_predicted


class SecondOfTwoDataRanks(DDPStrategy):
    """One process that says what a tensor-parallel strategy would say on data rank 1 of 2."""

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": 2, "rank": 1}


@lightnings_warnings
def test_lightning_shards_once_under_a_distributed_strategy(tmp_path):
    model = Recorder()
    strategy = SecondOfTwoDataRanks(process_group_backend="gloo")
    trainer = Trainer(max_epochs=1, devices=1, strategy=strategy, **QUIET)
    trainer.fit(model, datamodule=data_module(corpus(tmp_path)))
    expected = inputs(on_data_rank(data_module(tmp_path), rank=1, of=2).train_dataloader())
    assert len(model.seen) == len(expected) > 1
    assert torch.equal(torch.cat(model.seen), torch.cat(expected))


@lightnings_warnings
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_lightning_skips_a_validation_that_does_not_exist(tmp_path):
    model = Recorder()
    trainer = Trainer(max_steps=1, devices=1, **QUIET)
    trainer.fit(model, datamodule=data_module(corpus(tmp_path), val_fraction=0))
    assert (len(model.seen), model.validated) == (1, 0)


# Tokenizers and settings


def test_a_tokenizer_object_is_used_as_it_is(tmp_path):
    class Letters:
        name, vocab_size, eos_id, pad_id = "letters", 3, 0, 0

        def encode(self, text):
            return [1 + ord(letter) % 2 for letter in text]

        def decode(self, ids):
            return ""

    data = data_module(corpus(tmp_path), tokenizer=Letters())
    data.setup()
    assert set(data.train_set.stream.tokens.tolist()) == {0, 1, 2}
    assert "tokenizer letters (3 ids)" in data.summary()


def test_the_summary_counts_what_there_is(tmp_path):
    data = data_module(corpus(tmp_path))
    summary = data.summary()
    stream = data.train_set.stream
    assert f"train: {stream.num_documents} documents, {stream.num_tokens:,} tokens, " in summary
    assert f"{data.train_set.num_dropped} tokens dropped at the end" in summary
    assert f"validation: {data.val_set.stream.num_documents} documents" in summary


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "web"}, r"data\.source='web' is unknown"),
        ({"paths": ["x"]}, r"data\.paths .* need data\.source=text"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0 is not in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"data\.val_fraction=-0\.1 is not in \[0, 1\)"),
        ({"sequence_length": 1}, r"data\.sequence_length=1 is too small\. Set it to 2 or more"),
        ({"batch_size": 0}, r"data\.batch_size=0 is too small"),
        ({"max_tokens": 100}, r"data\.max_tokens=100 is too small\. Set it to 256 or more"),
        ({"tokenizer": "/does/not/exist"}, r"data\.tokenizer='/does/not/exist' does not exist"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, message):
    with pytest.raises(DataError, match=message):
        TextDataModule(**settings)


def test_text_that_does_not_suffice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.paths is empty"):
        TextDataModule(source="text").setup()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.txt.* holds no text to train on \(1 empty documents found\)"):
        data_module(tmp_path / "a.txt").setup()
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(DataError, match=r"3 tokens in 1 documents do not fill .* data\.sequence_length=32"):
        data_module(tmp_path / "a.txt", val_fraction=0).setup()
    (tmp_path / "a.txt").write_text("abcd" * 16)
    with pytest.raises(DataError, match=r"No text is left to validate on \(data\.val_fraction=0\.001"):
        data_module(tmp_path / "a.txt", val_fraction=0.001).setup()
    with pytest.raises(DataError, match=r"2 training sequences do not fill one batch of data\.batch_size=4 on each"):
        data_module(tmp_path / "a.txt", val_fraction=0).train_dataloader()


# The configuration


def test_the_default_configuration_builds_in_under_two_seconds():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    data = instantiate(OmegaConf.load(CONF / "stdlib.yaml"))
    start = time.process_time()  # seconds of this process: neighbours on the machine do not count
    data.setup()
    assert time.process_time() - start < 2
    assert 1_000_000 < data.train_set.stream.num_tokens <= 6_000_000
    assert 100_000 < data.val_set.stream.num_tokens <= 250_000
    assert "train" in data.summary()


def test_the_text_configuration_takes_overrides_and_refuses_misspelt_ones(tmp_path, monkeypatch):
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import MissingMandatoryValue, OmegaConf

    config = OmegaConf.load(CONF / "text.yaml")
    with pytest.raises((MissingMandatoryValue, InstantiationException), match="paths"):
        instantiate(config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config.paths = [str(corpus(tmp_path))]
    data = instantiate(config, sequence_length=32)
    data.setup()
    (kept,) = (tmp_path / "cache" / "lightning_npu_tp" / "tokens").glob("*/cache.json")
    assert f"note: tokens in {kept.parent}" in data.summary()
    assert type(data.paths) is list and type(data.paths[0]) is str
    with pytest.raises(InstantiationException, match="sequence_lenght"):
        instantiate(config, sequence_lenght=32)
