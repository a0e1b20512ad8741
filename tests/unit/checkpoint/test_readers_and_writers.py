"""A reader and a writer of one checkpoint, and several of each.

Catches a training that an export or `inspect` of its last.ckpt ends, a reader that is given half of one checkpoint and
half of the next, a lock that a job rescheduled to another host gives up at, and two winners of one lock.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_npu_tp.checkpoint import locks, training_state, writer
from lightning_npu_tp.checkpoint.files import remove_whole
from lightning_npu_tp.checkpoint.locks import Holder, hold, holder_of, lock_file, reader_of, reading
from lightning_npu_tp.checkpoint.manifest import Manifest, read_manifest, verify
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.tools.commands.inspect_command import look_at
from lightning_npu_tp.weights.sources import FolderSource


def save(path: Path, step: int) -> None:
    """A small checkpoint whose weights are its step."""
    model = nn.Linear(8, 4)
    nn.init.constant_(model.weight, step)
    tensors, rest = training_state.split({"global_step": step, "state_dict": training_state.model_state(model)})
    content = writer.serialized(rest)
    writer.save_folder(tensors, content, writer.serialized({}), path, Manifest(step=step), Peers())


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_reader_stops_no_writer_and_reads_its_own_to_the_end(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    save(last, 1)
    with reading(last) as first:
        source = FolderSource(first)
        for step in (2, 3):
            save(last, step)
        with reading(last) as second:
            assert torch.equal(FolderSource(second).read("weight", ((0, 4), (0, 8))), torch.full((4, 8), 3.0))
        assert verify(first) == [] and read_manifest(first).step == 1 and read_manifest(last).step == 3
        assert torch.equal(source.read("weight", ((0, 4), (0, 8))), torch.ones(4, 8))
        with pytest.raises(CheckpointError) as caught, reading(last):
            (last / "manifest.json").unlink()
            verify(last)
            raise CheckpointError(f"{first} is it")
        assert str(caught.value) == f"{first} is it"
    assert names(tmp_path) == ["last.ckpt"], "what was kept for the reader, or its lock, is left"


def test_an_error_says_the_checkpoints_own_path(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", 1)
    (tmp_path / "a.ckpt" / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught, reading(tmp_path / "a.ckpt") as pinned:
        read_manifest(pinned)
    assert f"The checkpoint {tmp_path / 'a.ckpt'} is incomplete" in str(caught.value)
    assert "/proc/" not in "".join(look_at(tmp_path / "a.ckpt", checksums=True).problems)


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_ranks_that_load_notice_that_the_checkpoint_is_another_now(tmp_path: Path, monkeypatch: Any, how: str) -> None:
    save(tmp_path / "last.ckpt", 1)
    read = training_state.load_tensors

    def slowly(*arguments: Any, **options: Any) -> None:
        read(*arguments, **options)
        save(tmp_path / "last.ckpt", 2) if how == "replaced" else remove_whole(tmp_path / "last.ckpt")

    training_state.load(tmp_path / "last.ckpt", nn.Linear(8, 4), [], strict=True, weights_only=None)
    monkeypatch.setattr(training_state, "load_tensors", slowly)
    with pytest.raises(CheckpointError, match=r"last\.ckpt was replaced or removed while it was read"):
        training_state.load(tmp_path / "last.ckpt", nn.Linear(8, 4), [], strict=True, weights_only=None)


def test_what_is_kept_for_a_reader_that_died_goes_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt", 1)
    dead = Holder(Holder.me("reading").host, os.getpid(), 5.0, "reading")
    lock = tmp_path / ".last.ckpt.reading-0123456789ab.lock"
    with hold(tmp_path / "last.ckpt", "reading"):
        save(tmp_path / "last.ckpt", 2)
        assert any(".previous-" in name for name in names(tmp_path))
        kept = [tmp_path / name for name in names(tmp_path) if ".previous-" in name]
        (file,) = (tmp_path / name for name in names(tmp_path) if name.endswith(".lock"))
        lock.write_text(json.dumps(vars(dead)))
        file.unlink()
        assert reader_of(tmp_path / "last.ckpt") is None
        save(tmp_path / "other.ckpt", 3)
        assert not kept[0].exists() and names(tmp_path) == ["last.ckpt", "other.ckpt"]


def test_a_lock_of_another_host_is_waited_for_until_it_expires(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """A job that was killed on one host goes on at another, whose first save finds the lock of the first."""
    monkeypatch.setattr(locks, "STALE_AFTER_S", 0.6)
    lock_file(tmp_path / "a.ckpt").write_text(json.dumps(vars(Holder("another-host", 7, 0.0, "saving"))))
    begun = time.monotonic()
    save(tmp_path / "a.ckpt", 1)
    assert 0.3 < time.monotonic() - begun < 10 and names(tmp_path) == ["a.ckpt"]
    assert "process 7 of another-host is saving it, or was ended there. Waiting" in capfd.readouterr().err


def test_a_process_of_another_host_that_lives_is_refused_in_the_end(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(locks, "STALE_AFTER_S", 0.5)
    monkeypatch.setattr(locks, "TOUCH_EVERY_S", 0.05)
    monkeypatch.setattr(Holder, "alive", lambda self, silent_s: True)
    lock_file(tmp_path / "a.ckpt").write_text(json.dumps(vars(Holder("another-host", 7, 0.0, "saving"))))
    with pytest.raises(CheckpointError, match="process 7 of another-host is saving it"):
        save(tmp_path / "a.ckpt", 1)


@pytest.mark.parametrize("nameless", [True, False])
def test_a_lock_says_whose_it_is_from_its_first_moment(tmp_path: Path, monkeypatch: Any, nameless: bool) -> None:
    opened, linked = os.open, os.link

    def without(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return opened(path, flags, *more)

    def link(source: str, target: Path, **options: Any) -> None:
        assert json.loads(Path(source).read_text())["pid"] == os.getpid(), "it is there before its content"
        linked(source, target, **options)
        made.append(target)

    made: list[Path] = []
    monkeypatch.setattr(os, "link", link)
    if not nameless:
        # A filesystem of a server may have no files without a name.
        monkeypatch.setattr(os, "open", without)
    with hold(tmp_path / "a.ckpt", "saving"):
        assert holder_of(tmp_path / "a.ckpt") == Holder.me("saving")
        with pytest.raises(CheckpointError, match="is saving it"), hold(tmp_path / "a.ckpt", "saving"):
            pytest.fail("taken twice")
    assert names(tmp_path) == [] and len(made) == nameless


def test_twelve_take_a_stale_lock_at_once_and_one_wins(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "a.ckpt")
    lock.write_text(json.dumps(vars(Holder("another-host", 7, 0.0, "saving"))))
    os.utime(lock, (0, 0))
    children, start = [], time.time() + 0.5
    for number in range(12):
        if (pid := os.fork()) == 0:
            code = 9
            try:
                time.sleep(max(0.0, start - time.time()))
                with hold(tmp_path / "a.ckpt", "saving"):
                    (tmp_path / f"won-{number}").touch()
                    time.sleep(2.0)
                code = 0
            except CheckpointError as error:
                # The winner is named, though it may have had no time yet to say who it is.
                code = 1 if " is saving it" in str(error) and "unknown" not in str(error) else 2
            finally:
                os._exit(code)
        children.append(pid)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    assert codes == [0] + [1] * 11 and len(list(tmp_path.glob("won-*"))) == 1
    assert holder_of(tmp_path / "a.ckpt") is None and not lock.exists()
