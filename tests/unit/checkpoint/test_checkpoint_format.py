"""The folder that a training checkpoint is: manifest, checksums, names while saving, safe reading.

Catches damage that a load would not notice, a save that dies and takes the previous checkpoint along, two processes at
one checkpoint, and a file that runs code when it is read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_npu_tp.checkpoint import files, locks, manifest, training_state, writer
from lightning_npu_tp.checkpoint.locks import Holder, hold, holder_of, lock_file, reader_of
from lightning_npu_tp.checkpoint.manifest import Manifest, incomplete, newest_complete, read_manifest, verify
from lightning_npu_tp.checkpoint.peers import PeerFailure, Peers
from lightning_npu_tp.checkpoint.reader import open_checkpoint, read_index, read_object
from lightning_npu_tp.errors import CheckpointError


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int = 3) -> dict[str, Any]:
    return {
        "global_step": step,
        "state_dict": training_state.model_state(model),
        "optimizer_states": [training_state.optimizer_state(model, optimizer)],
    }


def save(path: Path, step: int = 3) -> nn.Module:
    """A small checkpoint folder of one process; returns the model in it."""
    model, optimizer = model_and_optimizer()
    tensors, rest = training_state.split(state_of(model, optimizer, step))
    content = writer.serialized(rest)
    writer.save_folder(tensors, content, writer.serialized({}), path, Manifest(step=step), Peers())
    return model


def load(path: Path) -> nn.Module:
    model, optimizer = nn.Linear(8, 4), None
    optimizer = torch.optim.AdamW(model.parameters())
    training_state.load(path, model, [optimizer], strict=True, weights_only=None)
    return model


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- manifest ---------------------------------------------------------------------------------------


def test_a_saved_folder_comes_back_bit_for_bit_and_lists_every_file(tmp_path: Path) -> None:
    model = save(tmp_path / "a.ckpt")
    assert torch.equal(load(tmp_path / "a.ckpt").weight, model.weight)
    found = read_manifest(tmp_path / "a.ckpt")
    assert sorted(found.files) == [".metadata", "__0_0.distcp", "meta.pt", "rank_0.pt"]
    assert all((tmp_path / "a.ckpt" / name).stat().st_size == entry["bytes"] for name, entry in found.files.items())
    assert found.step == 3
    assert names(tmp_path) == ["a.ckpt"], "a temporary name or a lock was left"
    # The index would otherwise hold the name of a folder that is gone.
    assert b"partial" not in (tmp_path / "a.ckpt" / ".metadata").read_bytes()


def test_every_truncation_and_forty_changed_bytes_are_noticed_and_the_file_named(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "checkpoint_damage.py"
    spec = importlib.util.spec_from_file_location("checkpoint_damage", script)
    damage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(damage)
    save(tmp_path / "a.ckpt")
    tried, missed = damage.count_noticed(tmp_path / "a.ckpt", flips=40, seed=3)
    assert missed == []
    assert tried["byte changed"] == 40
    assert set(tried) >= {"cut to nothing", "cut in the header", "cut in the first tensor", "last byte gone"}


def test_completeness_is_cheap_and_checksums_see_the_rest(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt")
    file = tmp_path / "a.ckpt" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert not incomplete(tmp_path / "a.ckpt")
    (problem,) = verify(tmp_path / "a.ckpt")
    assert str(file) in problem and "has changed: checksum" in problem
    assert verify(tmp_path / "a.ckpt", ["meta.pt"]) == []
    file.write_bytes(content[:-1])
    assert incomplete(tmp_path / "a.ckpt")


def test_a_newer_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt")
    newer = read_manifest(tmp_path / "a.ckpt")
    newer.format, newer.versions = 7, {"lightning_npu_tp": "9.1"}
    (tmp_path / "a.ckpt" / "manifest.json").write_bytes(newer.as_bytes())
    with pytest.raises(CheckpointError, match=r"has format 7, .* reads up to 1\. .*\(9\.1\)"):
        load(tmp_path / "a.ckpt")


def test_the_newest_complete_checkpoint_is_found_and_what_is_skipped_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / f"step{step}.ckpt", step)
    (tmp_path / "link.ckpt").symlink_to("step4.ckpt")
    (tmp_path / "step4.ckpt" / "manifest.json").unlink()
    content = bytearray((tmp_path / "step3.ckpt" / "meta.pt").read_bytes())
    content[0] ^= 1
    (tmp_path / "step3.ckpt" / "meta.pt").write_bytes(content)
    skipped: dict[str, str] = {}
    take = lambda path, reason: skipped.update({path.name: reason})  # noqa: E731
    assert newest_complete(tmp_path, skipped=take) == tmp_path / "step3.ckpt"
    assert list(skipped) == ["step4.ckpt"] and "incomplete: no manifest.json" in skipped["step4.ckpt"]
    assert newest_complete(tmp_path, skipped=take, checksums=True) == tmp_path / "step2.ckpt"
    assert "meta.pt has changed" in skipped["step3.ckpt"]
    assert newest_complete(tmp_path / "nowhere") is None


# --- names while saving -----------------------------------------------------------------------------


def test_a_save_that_dies_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    model = save(tmp_path / "last.ckpt", 1)
    rename = os.rename

    class Died(BaseException):
        pass

    def die(source: Any, target: Any) -> None:
        rename(source, target)
        if ".previous-" in str(target):
            raise Died

    monkeypatch.setattr(files.os, "rename", die)
    with pytest.raises(Died):
        save(tmp_path / "last.ckpt", 2)
    monkeypatch.undo()
    kinds = sorted(kind for _, _, kind in files.left_beside(tmp_path))
    assert not (tmp_path / "last.ckpt").exists() and kinds == ["partial", "previous"]
    # A reader takes the one that was moved aside; a listing too.
    assert torch.equal(load(tmp_path / "last.ckpt").weight, model.weight)
    found = newest_complete(tmp_path)
    assert found is not None and read_manifest(found).step == 1
    # The next save to the folder, of whatever name, puts it back.
    save(tmp_path / "other.ckpt", 3)
    assert names(tmp_path) == ["last.ckpt", "other.ckpt"]
    assert read_manifest(tmp_path / "last.ckpt").step == 1


def test_the_old_checkpoint_is_there_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: Any) -> None:
    save(tmp_path / "last.ckpt", 1)
    seen = []
    complete = writer._complete

    def look(*arguments: Any) -> None:
        seen.append(read_manifest(tmp_path / "last.ckpt").step)
        complete(*arguments)

    monkeypatch.setattr(writer, "_complete", look)
    save(tmp_path / "last.ckpt", 2)
    assert seen == [1] and read_manifest(tmp_path / "last.ckpt").step == 2
    assert names(tmp_path) == ["last.ckpt"]


def test_everything_is_on_the_disk_before_the_name_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(source: Any, target: Any) -> None:
        events.append(f"rename to {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(files.os, "fsync", note_fsync)
    monkeypatch.setattr(files.os, "rename", note_rename)
    save(tmp_path / "a.ckpt")
    monkeypatch.undo()
    named = events.index("rename to a.ckpt")
    before, after = events[:named], events[named + 1 :]
    # torch gives the index its name after it was written.
    wanted = {".metadata.tmp", "__0_0.distcp", "meta.pt", "rank_0.pt", "manifest.json"}
    assert set(before[:-1]) == wanted | {"rename to .metadata"} and before[-2] == "manifest.json"
    assert before[-1].startswith(".a.ckpt.partial-"), "the folder itself"
    assert after == [tmp_path.name], "the folder above"


def test_a_disk_that_loses_bytes_is_caught(tmp_path: Path, monkeypatch: Any) -> None:
    written = files.Written()
    with pytest.raises(OSError, match="a has 3 bytes on disk after 5 were written"):
        with written.open(tmp_path / "a") as stream:
            stream.write(b"12345")
            stream.flush()
            os.truncate(tmp_path / "a", 3)
    assert written.files == {}


def test_a_rename_that_fails_puts_the_old_checkpoint_back(tmp_path: Path, monkeypatch: Any) -> None:
    save(tmp_path / "last.ckpt", 1)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(source).name.startswith(".last.ckpt.partial-"):
            raise PermissionError(13, "Permission denied", str(target))
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(CheckpointError, match="rank 0: Permission denied"):
        save(tmp_path / "last.ckpt", 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["last.ckpt"] and read_manifest(tmp_path / "last.ckpt").step == 1


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    def partial(name: str, holder: Holder | None) -> Path:
        left = tmp_path / f".{name}.partial-0123456789ab"
        left.mkdir()
        (left / "__0_0.distcp").touch()
        if holder is not None:
            lock_file(tmp_path / name).write_text(json.dumps(vars(holder)))
        return left

    me = Holder.me("saving")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = partial("dead.ckpt", Holder(me.host, gone.pid, me.started, "saving"))
    reused = partial("reused.ckpt", Holder(me.host, me.pid, me.started - 100, "saving"))
    nobody = partial("nobody.ckpt", None)
    living = partial("living.ckpt", me)
    elsewhere = partial("elsewhere.ckpt", Holder("another-host", 1, 0.0, "saving"))
    silent = partial("silent.ckpt", Holder("another-host", 1, 0.0, "saving"))
    long_ago = time.time() - locks.STALE_AFTER_S - 60
    os.utime(lock_file(tmp_path / "silent.ckpt"), (long_ago, long_ago))
    save(tmp_path / "new.ckpt")
    assert [left.exists() for left in (dead, reused, nobody, silent)] == [False] * 4
    assert [left.exists() for left in (living, elsewhere)] == [True] * 2
    assert sorted(tmp_path.glob(".*.lock")) == [tmp_path / ".elsewhere.ckpt.lock", tmp_path / ".living.ckpt.lock"]


def test_one_process_at_a_time_and_the_other_is_named(tmp_path: Path) -> None:
    with hold(tmp_path / "a.ckpt", "saving"):
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} of this host .* is saving it"):
            save(tmp_path / "a.ckpt")
        assert names(tmp_path) == [".a.ckpt.lock"]
        save(tmp_path / "b.ckpt")
    other = Holder("another-host", 77, 0.0, "saving")
    lock_file(tmp_path / "a.ckpt").write_text(json.dumps(vars(other)))
    with pytest.raises(CheckpointError, match=r"process 77 of another-host is saving it.* remove .*\.a\.ckpt\.lock"):
        with hold(tmp_path / "a.ckpt", "saving"):
            pytest.fail("has taken it")
    lock_file(tmp_path / "a.ckpt").write_text(json.dumps(vars(Holder(socket.gethostname(), 1, 5.0, "saving"))))
    assert holder_of(tmp_path / "a.ckpt") is None, "process 1 did not start then"
    save(tmp_path / "a.ckpt")
    assert names(tmp_path) == ["a.ckpt", "b.ckpt"]


def test_who_finds_a_lock_stale_does_not_remove_its_successor(tmp_path: Path, monkeypatch: Any) -> None:
    """Of several ranks that wait for a process that is killed, one takes its lock over; the others saw the old one."""
    file = lock_file(tmp_path / "a.ckpt")
    stale, fresh = (json.dumps(vars(Holder("another-host", pid, 0.0, "building"))) for pid in (1, 2))
    file.write_text(stale)

    def overtaken(path: Path) -> Holder | None:
        monkeypatch.undo()
        file.unlink()
        (tmp_path / "keeps the inode from being used again").touch()
        file.write_text(fresh)
        return None

    monkeypatch.setattr(locks, "holder_of", overtaken)
    with pytest.raises(CheckpointError, match="process 2 of another-host is building it"):
        with hold(tmp_path / "a.ckpt", "building"):
            pytest.fail("has taken it")
    assert file.read_text() == fresh


def test_who_waits_for_a_lock_is_told_of_its_holder_and_gets_it(tmp_path: Path) -> None:
    file = lock_file(tmp_path / "a")
    file.write_text(json.dumps(vars(Holder("another-host", 7, 0.0, "building"))))
    seen = []
    with hold(tmp_path / "a", "building", waiting=lambda holder: seen.append(holder.pid) or file.unlink()):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert seen == [7] and not file.exists()


def test_a_held_lock_shows_signs_of_life(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(locks, "TOUCH_EVERY_S", 0.01)
    with hold(tmp_path / "a.ckpt", "saving"):
        os.utime(lock_file(tmp_path / "a.ckpt"), (0, 0))
        deadline = time.monotonic() + 10
        while lock_file(tmp_path / "a.ckpt").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    save(tmp_path / "step1.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("step1.ckpt")
    save(tmp_path / "last.ckpt", 2)
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert [read_manifest(tmp_path / name).step for name in ("step1.ckpt", "last.ckpt")] == [1, 2]
    (tmp_path / "link.ckpt").symlink_to("step1.ckpt")
    with hold(tmp_path / "link.ckpt", "reading"):
        assert reader_of(tmp_path / "step1.ckpt") is not None
        save(tmp_path / "link.ckpt", 3)
        files.remove_whole(tmp_path / "link.ckpt")
    (tmp_path / "link.ckpt").symlink_to("absent.ckpt")
    with pytest.raises(CheckpointError, match=r"is a link to absent\.ckpt, which does not exist"):
        load(tmp_path / "link.ckpt")
    files.remove_whole(tmp_path / "link.ckpt")
    assert names(tmp_path) == ["last.ckpt", "step1.ckpt"] and not incomplete(tmp_path / "step1.ckpt")


def test_the_bytes_needed_are_those_on_disk(tmp_path: Path) -> None:
    model, optimizer = nn.Linear(512, 512), None
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 512)).sum().backward()
    optimizer.step()
    tensors, _ = training_state.split(state_of(model, optimizer))
    training_state.save_sharded(state_of(model, optimizer), tmp_path / "a.ckpt", is_main=True)
    on_disk = sum(entry["bytes"] for entry in read_manifest(tmp_path / "a.ckpt").files.values())
    assert on_disk == pytest.approx(writer.bytes_needed(tensors), rel=0.02)


# --- a file of plain Lightning ------------------------------------------------------------------------


def test_of_a_file_of_plain_lightning_optimizer_states_in_another_order_are_refused_and_the_weights_loaded(
    tmp_path: Path,
) -> None:
    path, other = tmp_path / "plain.ckpt", nn.Linear(8, 4)
    model, optimizer = model_and_optimizer()
    in_another_order = dict(reversed(model.state_dict().items()))
    torch.save({"state_dict": in_another_order, "optimizer_states": [optimizer.state_dict()]}, path)
    with pytest.raises(CheckpointError, match=r"say the numbers .* Set strategy\.resume_weights_only=true"):
        load(path)
    training_state.load(path, other, [], strict=True, weights_only=None)
    assert torch.equal(other.weight, model.weight)


def test_a_file_of_another_program_is_checked_by_its_own_checksums(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {"weight": torch.arange(4000.0)}}, path)
    assert verify(path) == []
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "does not have its checksum" in verify(path)[0]
    path.write_bytes(content[:-3])
    assert "no whole checkpoint file" in incomplete(path)


# --- reading runs nothing ----------------------------------------------------------------------------


class Evil:
    """Pickles into a call that makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def sealed_again(folder: Path) -> None:
    """Give a folder that was tampered with a manifest with the right checksums, as an attacker would."""
    found = manifest.parse_manifest(folder)
    for name in found.files:
        file = folder / name
        found.files[name] = {"bytes": file.stat().st_size, "crc32": files.crc32_of(file)}
    (folder / "manifest.json").write_bytes(found.as_bytes())


@pytest.mark.parametrize("place", [".metadata", "meta.pt", "rank_0.pt", "bytes", "tensor"])
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, place: str) -> None:
    folder, proof = tmp_path / "a.ckpt", tmp_path / "it_ran"
    model, optimizer = model_and_optimizer()
    state = state_of(model, optimizer)
    if place == "bytes":
        # An entry that is no tensor: a setting of the optimizer.
        state["optimizer_states"][0]["param_groups"][0]["lr"] = Evil(proof)
    if place == "tensor":
        state["state_dict"]["weight"] = Evil(proof)
    training_state.save_sharded(state, folder, is_main=True)
    named = {"bytes": "__0_0.distcp", "tensor": "__0_0.distcp"}.get(place, place)
    if place == ".metadata":
        index = read_index(folder)
        index.planner_data = Evil(proof)
        (folder / ".metadata").write_bytes(pickle.dumps(index))
    elif place in ("meta.pt", "rank_0.pt"):
        torch.save({"global_step": Evil(proof)}, folder / place)
    sealed_again(folder)
    assert verify(folder) == []
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")) as caught:
        if place == "rank_0.pt":
            # Only a trainer has a use for it.
            read_object(folder / place, None)
        load(folder)
    assert "run code" in str(caught.value)
    assert not proof.exists()


def test_an_index_may_not_point_outside_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a.ckpt"
    save(folder)
    shutil.copy(folder / "__0_0.distcp", tmp_path / "elsewhere.distcp")
    index = read_index(folder)
    for info in index.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    sealed_again(folder)
    with pytest.raises(CheckpointError, match=r"\.metadata points outside of the checkpoint"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"not a pickle", pickle.dumps({"a": 1})])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata (cannot be read|holds dict)"):
        read_index(tmp_path)


def test_checksums_can_be_left_out(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt")
    file = tmp_path / "a.ckpt" / "rank_0.pt"
    file.write_bytes(bytes(file.stat().st_size))
    open_checkpoint(tmp_path / "a.ckpt", Peers(), checksums=False)
    with pytest.raises(CheckpointError, match=r"rank_0\.pt has changed"):
        open_checkpoint(tmp_path / "a.ckpt", Peers(), checksums=True)


def test_what_failed_is_told_once_with_its_ranks() -> None:
    failure = PeerFailure({0: "no room", 2: "no room", 3: "no rights"})
    assert str(failure) == "ranks 0, 2: no room; rank 3: no rights"
