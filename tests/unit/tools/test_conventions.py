"""What every command does alike. Catches a time-out of ranks told as a mistake in the arguments, and the reverse."""

from __future__ import annotations

import json

import pytest
import typer

from lightning_npu_tp.errors import ConfigError, ConversionError, RankFailure
from lightning_npu_tp.tools.commands.conventions import exit_codes, layout_of, write_json


@pytest.mark.parametrize(
    ("error", "work", "code", "told"),
    [
        (ConfigError("--tensor 3\n cannot be."), "the ranks", 2, "error: --tensor 3 cannot be."),
        (FileNotFoundError(2, "No such file", "x"), "", 2, "error: [Errno 2] No such file: 'x'"),
        (ConversionError("no rule for a.b"), "the ranks", 1, "error: no rule for a.b"),
        (RankFailure("rank 1 died"), "the ranks", 1, "error: the ranks did not come to an end: rank 1 died"),
        # A TimeoutError is an OSError too.
        (TimeoutError("after 3 s"), "the ranks", 1, "error: the ranks did not come to an end: after 3 s"),
        (TimeoutError("the hub does not answer"), "", 2, "error: the hub does not answer"),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error, work, code, told, capsys) -> None:
    with pytest.raises(typer.Exit) as left, exit_codes(work, otherwise=1):
        raise error
    assert left.value.exit_code == code and left.value.__cause__ is error
    assert capsys.readouterr().err.strip() == told


def test_what_is_no_error_of_ours_passes_with_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_codes("the ranks", otherwise=1):
        _ = 1 / 0


def test_ranks_that_are_no_number_are_told_by_their_option() -> None:
    with pytest.raises(ConfigError, match="--tensor 0 is no number of ranks"):
        layout_of(1, 0, None)
    layout = layout_of(2, 4, None)
    assert (layout.data, layout.tensor, layout.expert) == (2, 4, 4)


def test_json_is_written_where_it_was_asked_for(tmp_path) -> None:
    write_json(None, {"a": 1})
    write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
