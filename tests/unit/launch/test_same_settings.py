"""Catches: a setting that is left out of the comparison, a value that differs only by an object's address."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.launch.same_settings import flatten, require_agreement, require_equal_batches, run_settings
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.trainer.checkpoint_settings import CheckpointSettings


class Module(L.LightningModule):
    def __init__(self, width: int, optimizer: object = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model_config = SimpleNamespace(to_dict=lambda: {"hidden_size": width, "rope": {"theta": 1e4}})


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        # Kept as many data modules do, without save_hyperparameters.
        self.batch_size = batch_size
        self.position = 0


def settings_of(*, width: int = 8, batch_size: int = 2, layout: Layout | None = None, **trainer) -> dict[str, str]:
    strategy = SimpleNamespace(
        layout=layout or Layout(data=2, tensor=1, expert=1), options=Options(), checkpoint_settings=CheckpointSettings()
    )
    its = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **trainer)
    its.datamodule = Data(batch_size)
    return flatten(run_settings(its, Module(width, optimizer=lambda: None), strategy))


def test_keys_are_dotted_and_addresses_do_not_count() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, "x"]}) == {"a.b": "1", "a.c": "{}", "d": "[1, 'x']"}
    one, other = (flatten({"hook": object()}) for _ in range(2))
    assert one == other == {"hook": "<object object>"}


def test_each_kind_of_setting_is_compared_under_its_own_name(monkeypatch) -> None:
    base = settings_of()
    assert settings_of() == base and "data.batch_size" in base and "data.position" not in base

    def changed(**setting) -> set[str]:
        other = settings_of(**setting)
        return {key for key in base.keys() | other.keys() if base.get(key) != other.get(key)}

    assert changed(max_steps=5) >= {"trainer.max_steps"}
    for setting in ({"accumulate_grad_batches": 4}, {"gradient_clip_val": 0.5}, {"val_check_interval": 3}):
        assert changed(**setting) == {f"trainer.{key}" for key in setting}
    assert changed(precision="bf16-true") == {"trainer.precision"}
    assert changed(limit_val_batches=3) == {"trainer.limit_val_batches"}
    assert changed(width=16) == {"module.width", "model.config.hidden_size"}
    assert changed(batch_size=3) == {"data.batch_size"}
    assert changed(layout=Layout(data=1, tensor=2, expert=2)) == {
        f"strategy.{key}" for key in ("data", "tensor", "expert")
    }
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert changed() == {"seed"}


def test_one_process_has_nobody_to_disagree_with() -> None:
    require_agreement({"a": 1})
    require_equal_batches(3, layout=Layout(data=1, tensor=1, expert=1))
