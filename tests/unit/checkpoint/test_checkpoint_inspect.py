"""`lightning-npu-tp inspect`: what it says and its exit codes.

Catches a damaged checkpoint called good, a good one called damaged, and a run folder whose newest checkpoint is not
the one that a resume takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from test_checkpoint_format import save
from typer.testing import CliRunner

from lightning_npu_tp.checkpoint.files import beside
from lightning_npu_tp.tools.commands.inspect_command import inspect

app = typer.Typer()
app.command()(inspect)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_good_checkpoint_is_described(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", step=7)
    result = run(tmp_path / "a.ckpt")
    assert result.exit_code == 0, result.output
    for text in ("complete, verified", "7, 0", "any layout", "size of weights", "size of optimizers"):
        assert text in result.output
    content = json.loads(run(tmp_path / "a.ckpt", "--json").output)
    assert content["complete"] and content["verified"] and content["manifest"]["step"] == 7
    sizes = content["sizes"]
    on_disk = sum(file.stat().st_size for file in (tmp_path / "a.ckpt").iterdir())
    assert sum(sizes.values()) == on_disk and sizes["optimizers"] > sizes["weights"] > 4 * 36


def test_damage_is_named_and_only_checksums_see_it(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt")
    flip(tmp_path / "a.ckpt" / "__0_0.distcp")
    result = run(tmp_path / "a.ckpt")
    assert result.exit_code == 1 and "__0_0.distcp has changed" in result.output
    quick = run(tmp_path / "a.ckpt", "--no-verify")
    assert quick.exit_code == 0 and "complete, not verified" in quick.output
    (tmp_path / "a.ckpt" / "meta.pt").unlink()
    assert run(tmp_path / "a.ckpt", "--no-verify").exit_code == 1


def test_a_folder_of_checkpoints_shows_which_one_a_resume_takes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(folder / f"step{step}.ckpt", step)
    (folder / "last.ckpt").symlink_to("step2.ckpt")
    flip(folder / "step3.ckpt" / "meta.pt")
    beside(folder / "step4.ckpt", "partial").mkdir()
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "step3.ckpt/meta.pt has changed" in result.output and "left by a run that died" in result.output
    content = json.loads(run(tmp_path, "--json").output)
    assert content["auto"] == content["last"] == str(folder / "step2.ckpt")
    assert [one["complete"] for one in content["checkpoints"]] == [True, True, False]


def test_a_file_of_plain_lightning_is_checked_and_has_no_manifest(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.arange(4000.0)}}, tmp_path / "a.ckpt")
    content = json.loads(run(tmp_path / "a.ckpt", "--json").output)
    assert content["verified"] and content["manifest"] is None
    flip(tmp_path / "a.ckpt")
    assert run(tmp_path / "a.ckpt").exit_code == 1


def test_what_is_no_checkpoint_is_a_mistake_in_the_arguments(tmp_path: Path) -> None:
    for path, text in ((tmp_path, "is a folder without checkpoints"), (tmp_path / "absent", "does not exist")):
        result = run(path)
        assert result.exit_code == 2 and text in result.output
        assert len(result.output.strip().splitlines()) == 1
