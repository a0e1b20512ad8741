"""Errors at the boundary of a trainer call. Catches: a fault without rank, operation or remedy, an original error that
is lost, an error without a code that is changed, an out-of-memory error without what held the memory, a fault of this
rank taken for a lost peer.
"""

from __future__ import annotations

import gc
import os
import traceback
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from memory_texts import NPU_TEXT

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.devices.fault_text import may_be_lost_peer
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.trainer import explain_memory
from lightning_npu_tp.trainer.explain_error import noted
from lit_models.causal_lm import LitCausalLM

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*treespec", "ignore:.*no `val_dataloader`"
)

AICORE = (
    "NPU function error: call aclnnIndexSelect failed, error code is 507015\n"
    "[ERROR] 2026-11-01-10:45:23 (PID:1, Device:0, RankID:0) ERR00100 PTA call acl api failed"
)


def raised(error: BaseException, function: str = "do_work") -> BaseException:
    """The error with a traceback, from a function of that name in this file."""
    scope: dict = {}
    exec(compile(f"def {function}(error):\n    raise error\n", __file__, "exec"), scope)
    with pytest.raises(type(error)) as caught:
        scope[function](error)
    return caught.value


def note_of(error: BaseException, trainer: Any = None) -> str | None:
    """What is noted on the error, which stays the same one; None for nothing."""
    found = noted(error, trainer)
    assert found is error or isinstance(found, torch.OutOfMemoryError)
    notes = getattr(found, "__notes__", [])
    assert len(notes) <= 1
    return notes[0] if notes else None


def a_trainer(device: str = "npu", rank: int = 3) -> SimpleNamespace:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=SimpleNamespace(type=device), global_rank=rank))


def test_operation_rank_cause_and_remedy_are_told() -> None:
    error = raised(RuntimeError(AICORE))
    text = note_of(error, a_trainer())
    assert str(error) == AICORE and not may_be_lost_peer(error)
    assert text is not None and text.startswith("aclnnIndexSelect failed on rank 3 of host ")
    assert "507015" in text and "strategy.kernels" in text and "token ids and labels" in text


def test_a_code_that_torch_npu_leaves_out_is_found_in_the_log(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ASCEND_PROCESS_LOG_PATH", str(tmp_path))

    def bare() -> BaseException:
        return raised(RuntimeError("The Inner error is reported as above.\n[ERROR] ERR00100 PTA call acl api failed."))

    assert "ERR00100: " in str(note_of(bare(), a_trainer()))
    log = tmp_path / "debug" / "plog" / f"plog-{os.getpid()}_1.log"
    log.parent.mkdir(parents=True)
    line = "[ERROR] APP(1,python):2026-11-01-10:45:23 [OpParamMaker.cpp:645]aclrtRecordEvent error! ret = 507015"
    log.write_text(f"[INFO] ret = 507018\n{line}\n")
    text = str(note_of(bare(), a_trainer()))
    assert "507015: " in text and "507018" not in text and text.endswith(f"From {log}:\n{line}")
    # An error that names its code needs no log.
    assert str(log) not in str(note_of(raised(RuntimeError(AICORE)), a_trainer()))


def test_without_an_operator_in_the_text_the_place_in_the_users_code_is_told() -> None:
    text = str(note_of(raised(RuntimeError("error code is 507018"), "my_layer"), a_trainer()))
    assert text.startswith("my_layer (test_explain_error.py:2) failed on rank 3")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x107020 and 3x4)"),
        RuntimeError("NPU function error: f, error code is 999999"),
        ConfigError("error code is 507015"),
        KeyError("x"),
    ],
)
def test_errors_without_a_known_code_pass_untouched(error: BaseException) -> None:
    assert note_of(raised(error), a_trainer()) is None


def test_a_broken_pipe_is_the_compilers_on_a_card_and_nobodys_on_the_cpu() -> None:
    for device, told in (("npu", True), ("cpu", False)):
        assert ("warmup=compile" in str(note_of(raised(BrokenPipeError(32, "Broken pipe")), a_trainer(device)))) is told


def test_a_fault_that_only_waits_for_another_rank_stays_one_with_its_explanation_and_others_do_not() -> None:
    late = raised(RuntimeError("error code is 507048"))
    assert "507048: " in str(note_of(late, a_trainer())) and may_be_lost_peer(late)
    own = raised(torch.OutOfMemoryError("NPU out of memory. Tried to allocate"))
    # Its remedies name HCCL's settings.
    assert "strategy.hccl" in str(note_of(own, a_trainer())) and not may_be_lost_peer(own)


def test_full_memory_is_one_class_whatever_the_device_calls_it_and_explained_once() -> None:
    told = raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "my_layer")
    assert noted(told, a_trainer("cuda")) is told
    driver = raised(RuntimeError("aclrtMalloc failed, runtime result = 207018."), "my_layer")
    found = noted(driver, a_trainer())
    assert type(found) is torch.OutOfMemoryError and str(found) == str(driver)
    assert found.__traceback__ is driver.__traceback__ and "__notes__" not in vars(driver)
    assert noted(found, a_trainer()) is found
    (note,) = found.__notes__
    assert note.startswith("my_layer (test_explain_error.py:2) failed on rank 3") and "strategy.hccl.buffer_mb" in note


# --- collectives ------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def collective_that_raises(monkeypatch, text: str) -> BaseException:
    def fail(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(dist.ProcessGroup, "allreduce", fail)
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(1))
    return caught.value


def test_a_code_of_hccl_adds_cause_and_remedy_to_operation_and_group(alone, monkeypatch) -> None:
    text = "OPS function error: HcclAllreduce, error code is 6\nEI0006: Getting socket times out. Reason: x"
    found = str(note_of(collective_that_raises(monkeypatch, text)))
    assert found.startswith("all_reduce over the world group (rank 0) failed")
    assert "EI0006: the ranks could not be linked in time." in found
    assert "strategy.hccl.connect_timeout_s" in found


def test_an_operators_fault_that_shows_in_a_collective_is_the_devices(alone, monkeypatch) -> None:
    error = collective_that_raises(monkeypatch, AICORE + "\nthe task timed out")
    assert str(note_of(error, a_trainer())).startswith("aclnnIndexSelect failed on rank 3")


def test_a_broken_pipe_in_a_collective_is_another_ranks(alone, monkeypatch) -> None:
    found = note_of(collective_that_raises(monkeypatch, "[gloo] writev: Broken pipe"), a_trainer())
    assert found is not None and found.startswith("all_reduce") and "warmup=compile" not in str(found)


# --- a whole trainer call ---------------------------------------------------------------------------

CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1,
    "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


class Fails(LitCausalLM):
    """Raises `text` in the second training step, which holds a tensor."""

    text = ""
    held: weakref.ref[torch.Tensor] | None = None

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            activation = torch.ones(1)
            self.held = weakref.ref(activation)
            raise RuntimeError(self.text)
        return super().training_step(batch, batch_idx)


def fit(model: Fails, *, accumulate: int = 1) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (4, 4, 128))]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=NPUTensorParallelStrategy(),
        max_steps=3,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(rows, batch_size=None))


def that_fails(text: str, **model_of: Any) -> Fails:
    model_of = {"architecture": "deepseek_v2", "config": CONFIG, **model_of}
    model = Fails(**model_of, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    model.text = text
    return model


def fit_and_fail(text: str, *, accumulate: int = 1, **model_of: Any) -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        fit(that_fails(text, **model_of), accumulate=accumulate)
    return caught.value


def message_of(error: BaseException) -> str:
    """What Python prints of an error below its one traceback."""
    lines = traceback.format_exception(error)
    assert sum(line.startswith("Traceback") for line in lines) == 1
    return "".join(traceback.format_exception_only(error))


def test_the_original_error_is_raised_with_the_explanation_below_it() -> None:
    error = fit_and_fail(AICORE)
    assert type(error) is RuntimeError and str(error) == AICORE
    assert f"RuntimeError: {AICORE}\naclnnIndexSelect failed on rank 0" in message_of(error)
    untouched = fit_and_fail("something unknown, error code is 999999")
    assert type(untouched) is RuntimeError and not hasattr(untouched, "__notes__")


# As a card of 6 MiB would say it; these runs need more.
SMALL_CARD = (
    "NPU out of memory. Tried to allocate 2.00 MiB (NPU 0; 6.00 MiB total capacity; 4.00 MiB already allocated; "
    "4.00 MiB current active; 1.00 MiB free; 5.00 MiB reserved in total by PyTorch)"
)
TIED = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("text", [SMALL_CARD, "of no known kind"])
def test_an_error_that_was_caught_holds_nothing_of_the_step(text: str) -> None:
    """Without Python's collector of cycles: another batch may be tried at once, and needs the memory."""
    model, told = that_fails(text), ""
    gc.collect()
    gc.disable()
    try:
        fit(model)
    except RuntimeError as error:
        told = str(error)
    finally:
        gc.enable()
    assert text in told and model.held is not None and model.held() is None


def test_a_head_that_is_the_embedding_keeps_no_remedy_from_being_told() -> None:
    message = message_of(fit_and_fail(SMALL_CARD, architecture="qwen3", config=TIED))
    assert "data.batch_size=" in message and "could not be read" not in message


def test_whether_the_run_sums_micro_batches_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(explain_memory, "suggestions", lambda run, usable: seen.append(run.accumulates) or [])
    for accumulate in (1, 2):
        fit_and_fail(SMALL_CARD, accumulate=accumulate)
    assert seen == [False, True]


def test_out_of_memory_tells_what_held_it_and_what_would_fit() -> None:
    error = fit_and_fail(SMALL_CARD)
    message = message_of(error)
    assert isinstance(error, torch.OutOfMemoryError) and str(error) == SMALL_CARD
    assert "The batch had 4 sequences of 128 tokens." in message
    assert (
        "held: weights 0.1 MiB, gradients 0.1 MiB, optimizer states 0.2 MiB, activations and buffers 3.7 MiB."
        in message
    )
    assert "data.batch_size=" in message and "accumulate_grad_batches" in message
    assert "cache was large enough" not in message


def test_memory_in_pieces_is_told_apart_and_a_card_too_small_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = fit_and_fail(NPU_TEXT)
    assert "in pieces: strategy.hccl.expandable_segments=true" in message_of(pieces)
    # These runs need more than 3 MiB, also in one piece.
    little = (
        "NPU out of memory. Tried to allocate 2.00 MiB (NPU 0; 6.00 MiB total capacity; 0.90 MiB already allocated; "
        "0.90 MiB current active; 0 bytes free; 3.00 MiB reserved in total by PyTorch)"
    )
    assert "in pieces" not in message_of(fit_and_fail(little)) and "By arithmetic" in message_of(fit_and_fail(little))
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "max_split_size_mb:64, expandable_segments: True")
    assert "in pieces" not in message_of(fit_and_fail(NPU_TEXT))
    small = fit_and_fail(
        "CUDA out of memory. Tried to allocate 10.00 KiB. GPU 0 has a total capacity of 100.00 KiB of which 50.00 KiB "
        "is free. Of the allocated memory 40.00 KiB is allocated by PyTorch, and 5.00 KiB is reserved by PyTorch but "
        "unallocated."
    )
    assert "no batch is small enough" in message_of(small) and "combine them" in message_of(small)


def test_a_run_that_cannot_be_read_still_tells_the_fault() -> None:
    trainer = a_trainer("cuda")
    trainer.lightning_module = object()
    found = note_of(raised(RuntimeError(NPU_TEXT)), trainer)
    assert "What holds the memory could not be read" in str(found) and "data.batch_size" in str(found)
