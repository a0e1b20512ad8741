"""Loggers that write into the run folder: metrics.csv itself, and TensorBoard where it is installed.

`CSVMetrics` is not Lightning's CSVLogger because that one deletes an existing file, and empties it to
add a column: a full disk at that moment loses every row. Here rows that cannot be written stay in
memory and are tried again.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_npu_tp import ConfigError

log = logging.getLogger(__name__)


class CSVMetrics(Logger):
    """One row per logging call, one column per metric, in the file `path`; rank 0 writes.

    flush_every_n_rows: rows kept in memory between writes.

    Never raises for a full disk: it logs an error that names path and cause, and tries again later.
    """

    def __init__(self, path: str | os.PathLike[str], flush_every_n_rows: int = 50) -> None:
        super().__init__()
        self.path = Path(path)
        self._flush_every_n_rows = flush_every_n_rows
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] | None = None
        self._failed = False
        # Rows of the step from which a resumed run goes on: (step, names), which it may log once more.
        self._there: set[tuple[int, frozenset[str]]] = set()

    @property
    @override
    def name(self) -> str:
        """Part of no path: the file is named in full."""
        return ""

    @property
    @override
    def version(self) -> str:
        """Part of no path: the file is named in full."""
        return ""

    @property
    @override
    def log_dir(self) -> str:
        """The folder of the file, for callbacks that ask the trainer where to write."""
        return str(self.path.parent)

    @rank_zero_only
    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Not kept here: the run folder has the whole config."""

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """metrics: name -> number; step: optimizer step."""
        if step is not None and (row := (step, frozenset(metrics))) in self._there:
            self._there.discard(row)
            return
        self._rows.append({"step": step, **metrics})
        if len(self._rows) >= self._flush_every_n_rows:
            self.save()

    @rank_zero_only
    @override
    def save(self) -> None:
        """Write the rows that are still in memory."""
        if not self._rows:
            return
        try:
            self._write()
        except OSError as error:
            if not self._failed:
                log.error(
                    f"{self.path} cannot be written: {error.strerror}. Its rows ({len(self._rows)} so far) stay in "
                    f"memory and are tried again; free some space. Training goes on."
                )
            self._failed = True
        else:
            self._failed = False

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Drop the rows on disk of optimizer step `step` and later, which a resumed run logs again."""
        self.save()
        columns, rows, unreadable = read_rows(self.path)
        if not columns and self.path.exists():
            aside = self.path.with_name(f"{self.path.name}.damaged")
            self.path.replace(aside)
            self._columns = None
            log.warning(f"{self.path} has no header, a power cut may have taken it: it is {aside.name} now.")
            return
        kept = [row for row in rows if not row["step"] or int(row["step"]) < step]
        if unreadable:
            log.warning(f"{self.path}: {unreadable} lines cannot be read, a power cut may have taken them. They go.")
        if len(kept) < len(rows) or unreadable:
            self._replace(columns, kept)
        self._there = {
            (step - 1, frozenset(name for name, value in row.items() if value and name != "step"))
            for row in kept
            if row["step"] == str(step - 1)
        }

    def go_on(self, step: int, row: Mapping[str, float] | None) -> None:
        """Be as if the run had just made `step` optimizer steps.

        row: of the last step, with its `step`; logged unless it is there. What else that step logged stays, and is not
        logged again.
        """
        self.cut(step)
        if row is not None:
            self.add_missing(row)

    @rank_zero_only
    def add_missing(self, row: Mapping[str, float]) -> None:
        """Log `row`, which has its `step`, unless a row of that step with one of its metrics is there."""
        names = row.keys() - {"step", "epoch"}
        _, rows, _ = read_rows(self.path)
        if any(old["step"] == str(row["step"]) and any(old.get(name) for name in names) for old in rows):
            return
        self.log_metrics(_without_step(row), int(row["step"]))
        self.save()

    @rank_zero_only
    @override
    def finalize(self, status: str) -> None:
        """Write what is left at the end of a trainer call."""
        self._failed = False
        self.save()

    def _write(self) -> None:
        if self._columns is None:
            self._columns = self._columns_on_disk()
        missing = [name for row in self._rows for name in row if name not in self._columns]
        if missing:
            self._rewrite([*self._columns, *dict.fromkeys(missing)])
        else:
            self._append()
        self._rows = []

    def _columns_on_disk(self) -> list[str]:
        return read_rows(self.path)[0]

    def _append(self) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(_as_csv(self._columns or [], self._rows, header=False))
        except OSError:
            # Half a row would make the file unreadable.
            os.truncate(self.path, size)
            raise

    def _rewrite(self, columns: list[str]) -> None:
        """New columns: a new file beside the old one, which it replaces only when it is whole."""
        _, old, _ = read_rows(self.path)
        self._replace(columns, [*old, *self._rows])

    def _replace(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{self.path.name}.new")
        try:
            fresh.write_text(_as_csv(columns, rows, header=True), encoding="utf-8", newline="")
            fresh.replace(self.path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        self._columns = columns


def read_rows(path: Path) -> tuple[list[str], list[dict[str, Any]], int]:
    """(columns, rows, number of lines that cannot be read) of a metrics.csv; no columns where there is none.

    After a power cut the end of a file may be zeros, or its header cut: then nothing says what the numbers mean.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], [], 0
    lines = text.splitlines()
    columns = next(csv.reader(lines[:1]), [])
    if "step" not in columns or "\0" in lines[0] or not text.startswith(f"{lines[0]}\n"):
        return [], [], len(lines)
    rows, unreadable = [], 0
    for line in lines[1:]:
        values = next(csv.reader([line]), []) if "\0" not in line else []
        if len(values) == len(columns) and all(map(_is_number_or_empty, values)):
            rows.append(dict(zip(columns, values, strict=True)))
        else:
            unreadable += 1
    return columns, rows, unreadable


def _is_number_or_empty(text: str) -> bool:
    try:
        return not text or float(text) is not None
    except ValueError:
        return False


def _as_csv(columns: list[str], rows: list[dict[str, Any]], *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _without_step(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger, for a run that may go on in its folder."""

    @rank_zero_only
    def go_on(self, step: int, row: Mapping[str, float] | None) -> None:
        """Have TensorBoard drop the points of optimizer step `step` and later that earlier event files hold.

        row: of the last step, with its `step`. It cannot be known whether it is there, so that step goes as well, with
        all that was logged for it, and the row is logged again.
        """
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None
        self._kwargs["purge_step"] = step if row is None else int(row["step"])
        try:
            _ = self.experiment
        finally:
            # Of this writer alone.
            del self._kwargs["purge_step"]
        if row is not None:
            self.log_metrics(_without_step(row), int(row["step"]))
            self.save()


def tensorboard(folder: str | os.PathLike[str], required: bool = True) -> Logger | None:
    """A TensorBoard logger that writes its events into `folder`, or None.

    required: whether a missing tensorboard package is an error; otherwise the run goes without.
    """
    if importlib.util.find_spec("tensorboard") is None:
        if required:
            raise ConfigError(
                "logger.tensorboard needs the package tensorboard, which is not installed. "
                "Run `pip install 'lightning-npu-tp[tracking]'`, or set logger=csv."
            )
        return None
    return TensorBoard(save_dir=str(folder), name="", version="", default_hp_metric=False)
