"""Catches: a batch given twice or never after a resume, a position that another layout reads as another place, an epoch
cut short because Lightning counts the old layout's batches, a resume on other data that nobody is told of, and an
order that depends on the layout or is no permutation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_npu_tp.errors import DataError
from lit_models.data import TextDataModule
from lit_models.data.order import EpochSampler, Permutation

SEQUENCES = 50  # of 16 tokens


def data_module(folder: Path, **settings) -> TextDataModule:
    if not (folder / "a.txt").exists():
        (folder / "a.txt").write_text("".join(f"{number:05}" for number in range(SEQUENCES * 15 // 5)))
    return TextDataModule(source="text", paths=folder, sequence_length=16, val_fraction=0, **settings)


class OneDataRank(Trainer):
    """A trainer in one process that says what a tensor-parallel strategy would say on a data rank."""

    replicas, rank = 1, 0

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": self.replicas, "rank": self.rank}


class Recorder(LightningModule):
    """Remembers the batches that it trains on, by epoch."""

    def __init__(self, total_steps: bool = False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list]] = []
        self.total_steps = total_steps

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.current_epoch, batch_idx, batch["input_ids"].tolist()))
        return self.weight * 1.0

    def validation_step(self, batch):
        """Lightning wants one beside a val_dataloader."""

    def configure_optimizers(self):
        if self.total_steps:
            assert self.trainer.estimated_stepping_batches > 0  # makes Lightning build its loaders early
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, *, replicas=1, rank=0, ckpt_path=None, save=None, total_steps=False, **settings) -> list:
    callbacks = []
    if save is not None:
        folder, every = save
        callbacks = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)]
    settings = {"max_epochs": 3, "limit_val_batches": 0, **settings}
    trainer = OneDataRank(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=save is not None,
        callbacks=callbacks,
        **settings,
    )
    trainer.replicas, trainer.rank = replicas, rank
    model = Recorder(total_steps)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return model.seen


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*treespec, LeafSpec:FutureWarning",
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",
    "ignore:Checkpoint directory .* is not empty",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Total length of `list` across ranks is zero",
)


# The order


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 70_000])
def test_a_computed_order_is_a_permutation_that_seed_and_epoch_change(size):
    def order(**changes):
        return Permutation(size, **{"seed": 3, "epoch": 1, "table_limit": 0, **changes})(np.arange(size))

    places = order()
    assert sorted(places.tolist()) == list(range(size))
    assert np.array_equal(places, order())
    if size > 60:
        assert not np.array_equal(places, order(epoch=2)) and not np.array_equal(places, order(seed=4))
        # Neighbours land anywhere: the mean distance of two random places is a third of the size.
        assert abs(np.abs(np.diff(places)).mean() / size - 1 / 3) < 0.08


def test_a_computed_order_of_a_billion_finds_any_place_without_a_table():
    size = 10**9
    order = Permutation(size, seed=0, epoch=0)
    places = np.arange(size - 1000, size)
    indices = order(places)
    assert len(set(indices.tolist())) == 1000 and 0 <= indices.min() and indices.max() < size
    assert order._table is None and np.array_equal(order(places[500:]), indices[500:])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("start", [0, 6, 9])
def test_ranks_take_disjoint_parts_of_one_order_from_any_place(start, shuffle):
    def taken(replicas, batch_size):
        ranks = []
        for rank in range(replicas):
            sampler = EpochSampler(
                range(20), num_replicas=replicas, rank=rank, batch_size=batch_size, shuffle=shuffle, seed=1
            )
            sampler.set_epoch(2)
            sampler.start = start
            ranks.append(list(sampler))
            sampler.start = 0
            assert len(list(sampler)) == len(sampler) == 20 // (replicas * batch_size) * batch_size
        return [index for step in zip(*ranks, strict=True) for index in step]

    order = taken(1, 1)
    assert len(order) == len(set(order)) == 20 - start
    for replicas, batch_size in ((2, 1), (2, 3), (3, 2)):
        assert taken(replicas, batch_size) == order[: (20 - start) // (replicas * batch_size) * replicas * batch_size]


# Resuming


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [5, 12, 17, 24])  # batches of 4: 12 an epoch, so twice an epoch's very end
def test_a_run_stopped_by_max_steps_goes_on_with_the_batches_of_an_uninterrupted_one(tmp_path, stop, num_workers):
    whole = fit(data_module(tmp_path, batch_size=4))
    assert len(whole) == 36
    workers = {"num_workers": num_workers} if stop in (5, 24) else {}
    first = fit(data_module(tmp_path, batch_size=4, **workers), save=(tmp_path, stop), max_steps=stop)
    rest = fit(data_module(tmp_path, batch_size=4, **workers), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert first + rest == whole


def test_a_run_that_counts_its_steps_for_a_schedule_resumes_at_its_place_too(tmp_path):
    whole = fit(data_module(tmp_path, batch_size=4))
    fit(data_module(tmp_path, batch_size=4), save=(tmp_path, 17), max_steps=17, total_steps=True)
    rest = fit(data_module(tmp_path, batch_size=4), ckpt_path=tmp_path / "step=17.ckpt", total_steps=True)
    assert rest == whole[17:]


def samples(seen, replicas_seen=()) -> list:
    """Per epoch, the sequences that were seen, of all data ranks."""
    by_epoch: dict[int, list] = {}
    for epoch, _, rows in seen:
        by_epoch.setdefault(epoch, []).extend(map(tuple, rows))
    return [sorted(rows) for _, rows in sorted(by_epoch.items())]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"batch_size": 4}, {"batch_size": 2, "replicas": 2}),
        ({"batch_size": 2, "replicas": 2}, {"batch_size": 4}),
        ({"batch_size": 4}, {"batch_size": 2}),
        ({"batch_size": 2}, {"batch_size": 2, "replicas": 2, "num_workers": 2}),
        ({"batch_size": 2, "replicas": 2}, {"batch_size": 1}),
    ],
)
def test_another_layout_goes_on_with_the_samples_that_were_not_seen(tmp_path, old, new):
    def on_all_ranks(batch_size, replicas=1, num_workers=0, **settings):
        data = {"batch_size": batch_size, "num_workers": num_workers}
        return [
            fit(data_module(tmp_path, **data), replicas=replicas, rank=rank, **settings) for rank in range(replicas)
        ]

    old_step = old["batch_size"] * old.get("replicas", 1)
    stop = 50 // old_step + 16 // old_step  # 16 samples into the second epoch
    before = on_all_ranks(**old, save=(tmp_path, stop), max_steps=stop, max_epochs=None)
    after = on_all_ranks(**new, ckpt_path=tmp_path / f"step={stop}.ckpt", max_epochs=3)
    step = new["batch_size"] * new.get("replicas", 1)
    seen = samples([batch for rank in before for batch in rank])
    rest = samples([batch for rank in after for batch in rank])
    assert len(rest) == 2  # the second epoch's rest and the third epoch
    data = data_module(tmp_path)
    data.setup()
    every = {tuple(item["input_ids"].tolist()) for item in data.train_set}
    second = seen[1] + rest[0]
    assert len(seen[1]) == 16 and len(second) == 16 + (50 - 16) // step * step
    assert len(set(second)) == len(second) and set(second) <= every
    assert len(set(rest[1])) == len(rest[1]) == 50 // step * step
    # Lightning's batch numbers go on where the new layout's would be.
    assert [index for _, index, _ in after[0]][:2] == [16 // step, 16 // step + 1]


def test_an_epoch_that_ended_in_one_layout_is_not_begun_again_in_another(tmp_path):
    fit(data_module(tmp_path, batch_size=4), save=(tmp_path, 12), max_steps=12)  # 48 of 50 sequences: a full epoch
    rest = fit(data_module(tmp_path, batch_size=1), ckpt_path=tmp_path / "step=12.ckpt", max_epochs=2)
    assert [epoch for epoch, _, _ in rest] == [1] * 50


def test_an_ended_epoch_stays_ended_for_a_loader_of_another_batch_size(tmp_path):
    """Also where nobody counts batches beside it, and when its state is saved before its next batch."""
    loaders = []
    for size in (4, 1):
        data = data_module(tmp_path, batch_size=size)
        data.setup()
        loaders.append(data.train_dataloader())
    old, new = loaders
    assert len(list(old)) == 12  # 48 of 50 sequences
    new.load_state_dict(old.state_dict())
    assert new.state_dict()["ended"]
    assert list(new) == []


def test_the_state_is_the_same_on_every_rank_and_plain(tmp_path):
    states = []
    for rank in range(2):
        data = data_module(tmp_path, batch_size=2)
        data.trainer = type("Trainer", (), {"distributed_sampler_kwargs": {"num_replicas": 2, "rank": rank}})()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        batches = iter(loader)
        next(batches), next(batches), next(batches)
        states.append(loader.state_dict())
    assert states[0] == states[1]
    assert (states[0]["epoch"], states[0]["samples"], states[0]["ended"]) == (1, 12, False)
    torch.save(states[0], tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == states[0]


def test_a_state_saved_before_the_first_batch_of_a_resumed_run_is_the_one_it_came_with(tmp_path):
    loader = data_module(tmp_path, batch_size=2).train_dataloader()
    next(iter(loader))
    again = data_module(tmp_path, batch_size=2).train_dataloader()
    again.load_state_dict(loader.state_dict())
    iter(again)
    assert again.state_dict() == loader.state_dict()
    assert len(again) == len(loader) == 25


# Other data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 8}, r"data\.sequence_length was 16 and is 8"),
        ({"seed": 5}, r"data\.seed was 0 and is 5"),
        ({"shuffle": False}, r"data\.shuffle was True and is False"),
        ({"max_tokens": 300}, r"content was '\w{8}' and is '\w{8}'; number of sequences was 50 and is 19"),
    ],
)
def test_a_resume_on_other_data_names_what_differs(tmp_path, changes, message):
    (tmp_path / "a.txt").write_text("".join(f"{number:05}" for number in range(150)))
    state = data_module(tmp_path, batch_size=2).train_dataloader().state_dict()
    settings = {"source": "text", "paths": tmp_path, "sequence_length": 16, "val_fraction": 0, "batch_size": 2}
    with pytest.raises(DataError, match=message + r".*data\.on_changed=restart"):
        TextDataModule(**{**settings, **changes}).train_dataloader().load_state_dict(state)


def test_changed_text_is_noticed_and_a_moved_file_is_not_a_change(tmp_path):
    state = data_module(tmp_path, batch_size=2).train_dataloader().state_dict()
    text = (tmp_path / "a.txt").read_text()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    moved = TextDataModule(source="text", paths=tmp_path, sequence_length=16, val_fraction=0, batch_size=2)
    moved.train_dataloader().load_state_dict(state)
    (tmp_path / "b.txt").write_text(text.replace("00001", "00002"))
    changed = TextDataModule(source="text", paths=tmp_path, sequence_length=16, val_fraction=0, batch_size=2)
    with pytest.raises(DataError, match=r"counted over other data: content was"):
        changed.train_dataloader().load_state_dict(state)


def test_a_state_of_another_loader_is_refused(tmp_path):
    with pytest.raises(DataError, match="written by another kind of loader"):
        data_module(tmp_path).train_dataloader().load_state_dict({"_num_yielded": 3})


def test_restart_begins_the_epoch_anew_with_the_other_data_in_full(tmp_path):
    fit(data_module(tmp_path, batch_size=4), save=(tmp_path, 17), max_steps=17)
    other = data_module(tmp_path, batch_size=4, seed=9, on_changed="restart")
    with pytest.warns(UserWarning, match="data.seed was 0 and is 9. The epoch begins anew"):
        rest = fit(other, ckpt_path=tmp_path / "step=17.ckpt", max_epochs=2)
    assert [(epoch, index) for epoch, index, _ in rest] == [(1, index) for index in range(12)]
    with pytest.raises(DataError, match=r"data\.on_changed='ignore' is unknown"):
        data_module(tmp_path, on_changed="ignore")


def test_overfitting_on_few_batches_still_works(tmp_path):
    with pytest.warns(UserWarning, match="overfit"):
        seen = fit(data_module(tmp_path, batch_size=4), overfit_batches=2, max_epochs=2)
    assert [index for _, index, _ in seen] == [0, 1, 0, 1] and seen[0][2] == seen[2][2]
