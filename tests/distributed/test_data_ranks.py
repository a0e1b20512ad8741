"""Catches: a token cache that two processes build at once or read differently, and ranks that store other positions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from lit_models.data import TextDataModule


def _build_and_iterate(rank: int, world_size: int, folder: str) -> tuple:
    built = []

    class Counting(TextDataModule):
        def _encode(self, *arguments):
            built.append(rank)
            return super()._encode(*arguments)

    settings = {"sequence_length": 32, "batch_size": 2, "val_fraction": 0.1}
    data = Counting(source="text", paths=folder, cache_dir=f"{folder}/../cache", **settings)
    # Two data ranks of two tensor ranks each.
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank // 2})
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    batches = iter(loader)
    first = [next(batches)["input_ids"].tolist() for _ in range(3)]
    state = loader.state_dict()
    rest = [batch["input_ids"].tolist() for batch in batches]
    again = Counting(source="text", paths=folder, cache_dir=f"{folder}/../cache", **settings)
    again.trainer = data.trainer
    resumed = again.train_dataloader()
    resumed.load_state_dict(state)
    assert [batch["input_ids"].tolist() for batch in resumed] == rest
    return len(built), state, [row for rows in [*first, *rest] for row in rows]


def test_one_of_four_processes_encodes_and_data_ranks_share_nothing(on_ranks, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text("".join(f"{number:03}{line:04} " for line in range(200)))
    results = on_ranks(_build_and_iterate, 4, str(folder))
    assert sum(built for built, _, _ in results) == 1
    states = [state for _, state, _ in results]
    assert states == [states[0]] * 4 and states[0]["samples"] == 12
    rows = [{tuple(row) for row in given} for _, _, given in results]
    assert rows[0] == rows[1] and rows[2] == rows[3] and not rows[0] & rows[2]
