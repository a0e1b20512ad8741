"""Catches: a file in conf/ that no longer composes or whose parts cannot be built, a misspelt key, group or callback
that is silently ignored, a node without `_target_` that is skipped, a run that is written over.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lightning_npu_tp.errors import ConfigError, DataError, LightningNPUTPError
from lightning_npu_tp.tools.testing.models import tiny_config
from lit_models.run import run_folder
from lit_models.run.instantiate import build, build_each
from lit_models.run.run_folder import (
    GuardRunFolder,
    RunFolderError,
    check_writable,
    claim,
    explain_write_errors,
    register_resolvers,
    run_stamp,
)

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
# What a file in conf/ cannot say by itself.
NEEDS = {
    "data/text": ["data.paths=[{tmp}/text.txt]"],
    "data/chat": ["data.paths=[{tmp}/chat.jsonl]", "data.tokenizer={tmp}/tokenizer"],
    "model/pretrained": ["model.path={tmp}/model"],
}

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*treespec")


@pytest.fixture(autouse=True)
def hydra_here() -> Iterator[None]:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def config_of(tmp_path: Path, *overrides: str, **settings) -> DictConfig:
    return compose("train", [f"run_dir={tmp_path}/run", *overrides], **settings)


def build_parts(config: DictConfig) -> SimpleNamespace:
    """Everything that `train()` builds, but for the trainer."""
    return SimpleNamespace(
        strategy=build(config, "strategy"),
        warmup=build(config, "warmup"),
        callbacks=build_each(config, "callbacks"),
        logger=build_each(config, "logger"),
        data=build(config, "data"),
        model=build(config, "model", optimizer=build(config, "optimizer"), scheduler=build(config, "scheduler")),
    )


def build_trainer(config: DictConfig, parts: SimpleNamespace) -> Trainer:
    return build(config, "trainer", strategy=parts.strategy, callbacks=parts.callbacks, logger=parts.logger)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes_and_its_parts_are_built(file: Path, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "assistant", "content": "hello"}]}')
    tiny_config("llama").save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({"hello": 0, "<end>": 1}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    group, name = str(file.parent), file.name
    group = {"hccl": "hccl@strategy.hccl"}.get(group, group)
    chosen = [] if group == "." else [f"{group}={name}"]
    chosen += [override.format(tmp=tmp_path) for override in NEEDS.get(str(file), [])]
    config = config_of(tmp_path, *chosen)
    parts = build_parts(config)
    if config.trainer.accelerator != "cpu":
        # No card here. That this is told at once is tested with the whole command.
        config = config_of(tmp_path, *chosen, "trainer.accelerator=cpu", "trainer.devices=1")
        config.strategy.tensor_parallel_size = 1
        parts = build_parts(config)
    trainer = build_trainer(config, parts)
    parts.model.configure_model()

    assert trainer.max_steps == config.trainer.max_steps
    assert all(parameter.is_meta for parameter in parts.model.parameters())
    assert (parts.warmup is None) == (config.warmup is None)
    left = OmegaConf.missing_keys(config)
    assert not left, f"{file} leaves {left} open"


def test_the_folders_of_conf_are_groups_of_the_run() -> None:
    groups = {str(file.parent) for file in FILES} - {"."}
    defaults = OmegaConf.load(CONF / "train.yaml").defaults
    named = {re.split("[@ ]", key)[0] for entry in defaults if isinstance(entry, DictConfig) for key in entry}
    assert groups == named
    assert defaults[0] == "_self_" and "experiment" in defaults[-1]


def test_deepseek_v2_lite_is_the_published_architecture(tmp_path) -> None:
    config = config_of(tmp_path, "model=deepseek_v2_lite")
    model = build(config, "model")
    model.configure_model()
    numbers = {name: parameter.numel() for name, parameter in model.model.named_parameters()}
    assert sum(numbers.values()) == 15_706_484_224
    assert sum(number for name, number in numbers.items() if ".experts." in name) == 26 * 64 * 3 * 2048 * 1408
    kept = model.model.config
    assert (kept.aux_loss_alpha, kept.seq_aux, kept.rope_parameters["factor"]) == (0.001, True, 40.0)


def test_the_tiny_model_divides_over_one_two_and_four_ranks(tmp_path) -> None:
    values = config_of(tmp_path).model.config
    assert values.num_attention_heads % 4 == 0 and values.n_routed_experts % 4 == 0 and values.n_routed_experts >= 8
    assert values.n_shared_experts > 0 and values.first_k_dense_replace == 1 and values.rope_parameters.factor > 1


def test_the_experiment_is_the_run_of_four_cards(tmp_path) -> None:
    config = config_of(tmp_path, "experiment=deepseek_v2_lite_4npu")
    assert (config.trainer.accelerator, config.trainer.devices, config.trainer.max_steps) == ("npu", 4, 20)
    assert (config.trainer.precision, config.data.batch_size, config.data.sequence_length) == ("bf16-true", 1, 256)
    assert config.model.config.vocab_size == 102400 and config.strategy.tensor_parallel_size == 4
    assert config.warmup._target_.endswith("Warmup") and config.strategy.hccl.connect_timeout_s == 7200
    text = (CONF / "experiment/deepseek_v2_lite_4npu.yaml").read_text()
    assert "python train.py experiment=deepseek_v2_lite_4npu" in text.split("defaults:")[0]


# --- mistakes in the config --------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "optimiser.lr=1",
        "optimizer.learning_rate=1",
        "callbacks.los_curve=null",
        "shceduler=constant",
        "warmup=compiled",
    ],
)
def test_a_misspelt_key_group_or_callback_is_named(tmp_path, override: str) -> None:
    name = override.split("=")[0].split(".")[-1] if override != "warmup=compiled" else "compiled"
    with pytest.raises(Exception, match=name) as caught:
        config_of(tmp_path, override)
    assert isinstance(caught.value, ConfigCompositionException)


def test_a_node_without_a_target_is_an_error_and_not_skipped(tmp_path) -> None:
    config = config_of(tmp_path, "+callbacks.early_stopping.monitor=val/loss")
    with pytest.raises(ConfigError, match=r"callbacks.early_stopping.*_target_.*callbacks.early_stopping=null"):
        build_each(config, "callbacks")
    with pytest.raises(ConfigError, match=r"^model should be built, but it has no _target_"):
        build(OmegaConf.create({"model": {"hidden": 3}}), "model")
    with pytest.raises(ConfigError, match="its value: compile"):
        build(OmegaConf.create({"warmup": "compile"}), "warmup")


def test_one_callback_where_a_group_is_wanted_is_an_error() -> None:
    with pytest.raises(ConfigError, match="callbacks should be a group of named nodes"):
        build_each(OmegaConf.create({"callbacks": {"_target_": "x.Y"}}), "callbacks")


def test_null_means_not_wanted(tmp_path) -> None:
    config = config_of(tmp_path, "callbacks.loss_curve=null")
    kinds = [type(callback).__name__ for callback in build_each(config, "callbacks")]
    assert kinds == ["TokensPerSecond", "TrainingProgressBar", "NonFiniteGuard", "ModelCheckpoint"]
    assert build(OmegaConf.create({"warmup": None}), "warmup") is None
    assert build_each(OmegaConf.create({"callbacks": None}), "callbacks") == []


def test_an_argument_that_a_class_refuses_is_told_with_its_key() -> None:
    config = OmegaConf.create({"data": {"_target_": "lit_models.data.text.TextDataModule", "colour": "red"}})
    with pytest.raises(ConfigError, match=r"data \(lit_models.data.text.TextDataModule\) cannot be built: .*colour"):
        build(config, "data")


def test_the_projects_and_lightnings_own_errors_come_through_as_they_are(tmp_path) -> None:
    with pytest.raises(DataError, match="batch_size=0"):
        build(config_of(tmp_path, "data.batch_size=0"), "data")
    with pytest.raises(MisconfigurationException):
        build(
            OmegaConf.create({"trainer": {"_target_": "lightning.pytorch.Trainer", "val_check_interval": 1.5}}),
            "trainer",
        )


def test_built_objects_hold_plain_containers(tmp_path) -> None:
    model = build(config_of(tmp_path, "optimizer.betas=[0.8,0.9]"), "model")
    assert type(model.hparams["config"]) is dict and type(model.hparams["config"]["rope_parameters"]) is dict
    assert type(build(config_of(tmp_path), "optimizer").keywords["betas"]) is list


# --- the run folder ----------------------------------------------------------------------------


def hydra_config(folder: Path, kind: str = "run") -> DictConfig:
    return OmegaConf.create(
        {"hydra": {"run": {"dir": str(folder)}, "sweep": {"dir": str(folder)}, "output_subdir": "a"}}
    )


@pytest.mark.parametrize("sign", ["config.yaml", "metrics.csv", "checkpoints", "multirun.yaml"])
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_folder_that_holds_a_run_is_refused_before_hydra_writes(tmp_path, capsys, sign: str, kind: str) -> None:
    (tmp_path / sign).mkdir()
    guard = GuardRunFolder()
    start = guard.on_run_start if kind == "run" else guard.on_multirun_start
    with pytest.raises(SystemExit) as stop:
        start(hydra_config(tmp_path))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1
    assert str(tmp_path) in told and sign in told and f"another with hydra.{kind}.dir=" in told


def test_a_folder_in_which_a_run_was_refused_can_be_used_again(tmp_path) -> None:
    (tmp_path / ".hydra").mkdir()
    GuardRunFolder().on_run_start(hydra_config(tmp_path))


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "RANK"])
def test_other_ranks_share_the_folder_and_write_no_config(tmp_path, monkeypatch, variable: str) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setenv(variable, "1")
    config = hydra_config(tmp_path)
    GuardRunFolder().on_run_start(config)
    assert config.hydra.output_subdir is None


def test_the_guard_is_part_of_every_run(tmp_path) -> None:
    hydra = config_of(tmp_path, return_hydra_config=True).hydra
    (callback,) = (instantiate(node) for node in hydra.callbacks.values())
    assert isinstance(callback, GuardRunFolder)
    assert not (hydra.job_logging.handlers.get("file") or hydra.job.chdir)


def test_a_claimed_folder_holds_the_resolved_config_and_cannot_be_claimed_again(tmp_path) -> None:
    folder = tmp_path / "new" / "run"
    config = OmegaConf.create({"a": 1, "b": "${a}"})
    claim(folder, config)
    first = (folder / "config.yaml").read_text()
    assert OmegaConf.to_object(OmegaConf.create(first)) == {"a": 1, "b": 1}
    with pytest.raises(ConfigError, match=r"already holds a run \(config.yaml\).*hydra.run.dir="):
        claim(folder, OmegaConf.create({"a": 2}))
    assert (folder / "config.yaml").read_text() == first


def test_runs_have_names_of_their_own_and_torchruns_ranks_share_one(monkeypatch) -> None:
    assert run_stamp() != run_stamp()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run_stamp() == run_stamp()


def test_a_folder_on_a_full_disk_is_refused_with_what_is_free_and_needed(tmp_path) -> None:
    with pytest.raises(
        RunFolderError, match=r"No space left.* [\d,]+ bytes are free there, at least 4,6.*hydra.run.dir"
    ):
        check_writable(tmp_path / "run", needed_bytes=1 << 62)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=f"{tmp_path}/file/run.*(Not a directory)"):
        check_writable(tmp_path / "file" / "run")


def test_a_probe_leaves_nothing_behind(tmp_path) -> None:
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_during_the_run_is_told_with_file_and_free_bytes(tmp_path) -> None:
    full = tmp_path / "events"
    full.symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=r"No space left on device. [\d,]+ bytes are free"):
        with explain_write_errors(tmp_path):
            descriptor = os.open(full, os.O_WRONLY)
            try:
                os.write(descriptor, b"x")
            except OSError as error:
                # As a library would: its own exception, the cause behind it.
                raise RuntimeError("writing failed") from error
            finally:
                os.close(descriptor)


def test_torchs_wordless_write_failure_is_told_too(tmp_path) -> None:
    with pytest.raises(RunFolderError, match="PytorchStreamWriter failed"), explain_write_errors(tmp_path):
        raise RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed")


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(errno.ENOSPC, "full", "/elsewhere/file"), OSError(errno.ENOENT, "no such file")]
)
def test_errors_that_have_nothing_to_do_with_the_folder_stay_as_they_are(tmp_path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explain_write_errors(tmp_path):
        raise error
    assert caught.value is error


def test_the_projects_errors_pass_the_folders_guard(tmp_path) -> None:
    with pytest.raises(ConfigError), explain_write_errors(tmp_path):
        raise ConfigError("a setting")
    assert issubclass(RunFolderError, LightningNPUTPError) and run_folder.CONFIG_FILE == "config.yaml"
