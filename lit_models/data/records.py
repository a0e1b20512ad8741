"""Records of files: the lines of .jsonl, the entries of a .json array, the rows of .csv, .parquet and .arrow.

A record has the name that its split goes by and the place that an error names. No more of a file is held than a batch
of rows; of a .json array, its text. What a record means is not known here.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_npu_tp import DataError
from lit_models.data.source_files import SourceFile, decode, open_bytes

_ROWS = 128  # of a batch


@dataclass(frozen=True)
class Record:
    """One line or row: its name as a document's, the place that an error names, and what it holds."""

    name: str
    where: str
    values: dict[str, Any]


def read_records(
    file: SourceFile, *, keys: Sequence[str], setting: str, optional: Sequence[str] = ()
) -> Iterator[Record]:
    """The records of a file, all of which must have `keys`.

    setting:  which names the keys, for the error.
    optional: columns of .parquet and .arrow that are read as well; the other kinds give all that they have.

    In a column of structs every row has the fields of all; those that are null are left out.
    Raises DataError with file and line or row.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if file.kind in readers:
        for record in readers[file.kind](file, keys):
            for key in keys:
                if key not in record.values:
                    raise DataError(
                        f"{record.where} has no key {key!r}; its keys are {sorted(record.values)}. Set {setting} to "
                        "the one that holds it."
                    )
            yield record
    else:
        yield from _read_table(file, keys, optional, setting)


def _read_jsonl(file: SourceFile, keys: Sequence[str]) -> Iterator[Record]:
    """One record a line; empty lines are passed over."""
    offset = 0
    # Bytes, so that an error can name the byte, and so that only \n ends a line (JSON may hold U+2028).
    with open_bytes(file.path) as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{str(file.path)!r} line {number}"
            line = decode(raw, where=where, offset=offset).removeprefix("\ufeff").strip()
            offset += len(raw)
            if line:
                yield Record(f"{file.name}:{number}", where, _object(line, where, keys))


def _object(line: str, where: str, keys: Sequence[str]) -> dict[str, Any]:
    example = f'{{"{keys[0] if keys else "messages"}": ...}}'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON: {error.msg} at column {error.colno}. Each line must be one object such as {example}."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets in brackets
        raise DataError(f"{where} cannot be read as JSON: {error}. Repair or drop the line.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object. Each line must be one such as {example}.")
    return record


def _read_json(file: SourceFile, keys: Sequence[str]) -> Iterator[Record]:
    """One record an entry of an array; a file that does not begin with a bracket holds lines."""
    with open_bytes(file.path) as stream:
        data = stream.read()
    text = decode(data, where=str(file.path), offset=0).removeprefix("\ufeff")
    del data
    at = _next(text, 0)
    if text[at : at + 1] != "[":
        yield from _read_jsonl(file, keys)
        return
    decoder, number, line, counted = json.JSONDecoder(), 0, 1, 0
    at = _next(text, at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{str(file.path)!r} line {line} (entry {number} of its array)"
        try:
            values, at = decoder.raw_decode(text, at)
            at = _next(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' behind an entry", text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} is not JSON: {error.msg} at line {error.lineno} column {error.colno}. A .json file must hold "
                "one array of objects, or an object a line."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} cannot be read as JSON: {error}. Repair or drop the entry.") from error
        if not isinstance(values, dict):
            raise DataError(f"{where} is not a JSON object. Each entry must be one.")
        yield Record(f"{file.name}:{number}", where, values)
        number += 1
        if text[at] == ",":
            at = _next(text, at + 1)


def _next(text: str, at: int) -> int:
    """The place of the next character that is not blank."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_csv(file: SourceFile, keys: Sequence[str]) -> Iterator[Record]:
    """One record a row under the names of the first row; UTF-8, commas."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 131,072 characters
    with open_bytes(file.path) as stream:
        try:
            rows = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
            names = next(rows, [])
            number, line = 0, rows.line_num
            for row in rows:
                where = f"{str(file.path)!r} line {line + 1}"
                line = rows.line_num
                if not row:
                    continue
                if len(row) != len(names):
                    raise DataError(
                        f"{where} has {len(row)} fields, but the file's first line names {len(names)}. Repair or drop "
                        "the row; a field with commas, quotes or line ends must stand in quotes."
                    )
                yield Record(f"{file.name}:{number}", where, dict(zip(names, row, strict=True)))
                number += 1
        except csv.Error as error:
            raise DataError(f"{str(file.path)!r} line {rows.line_num} cannot be read as CSV: {error}.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{str(file.path)!r} is not UTF-8 text behind line {rows.line_num}: {error.reason}. Convert it (for "
                "Chinese often: iconv -f GB18030 -t UTF-8), or leave the file out of data.paths."
            ) from error


def _read_table(file: SourceFile, keys: Sequence[str], optional: Sequence[str], setting: str) -> Iterator[Record]:
    """One record a row, read batch by batch and no other column."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            f"{str(file.path)!r} needs pyarrow. Install it: pip install 'lightning-npu-tp[train]'."
        ) from error
    try:
        with open_table(file) as (columns, batches):
            for key in keys:
                if key not in columns:
                    raise DataError(
                        f"{str(file.path)!r} has no column {key!r}; its columns are {columns}. "
                        f"Set {setting} to the one that holds it."
                    )
            wanted = [*keys, *(name for name in optional if name in columns and name not in keys)]
            if not wanted:
                raise DataError(
                    f"{str(file.path)!r} has none of the columns {', '.join(optional)}; its columns are {columns}. Set "
                    f"{setting} to the one that holds it."
                )
            row = 0
            for batch in batches(wanted):
                for values in batch.to_pylist():
                    values = {name: _without_nulls(value) for name, value in values.items()}
                    yield Record(f"{file.name}:{row}", f"{str(file.path)!r} row {row}", values)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{str(file.path)!r} cannot be read as {file.kind[1:]}: {error} Replace the file or leave it out."
        ) from error


def open_table(file: SourceFile) -> Any:
    """A context of the columns' names and of a function from some of them to their batches."""
    from contextlib import contextmanager

    import pyarrow as pa

    @contextmanager
    def opened() -> Iterator[Any]:
        if file.kind == ".parquet":
            import pyarrow.parquet as parquet

            with parquet.ParquetFile(file.path) as table:
                yield table.schema_arrow.names, lambda names: table.iter_batches(batch_size=_ROWS, columns=names)
            return
        with pa.memory_map(str(file.path)) as source:
            try:
                reader = pa.ipc.open_file(source)
            except pa.ArrowInvalid:  # `datasets` writes streams
                source.seek(0)
                reader = pa.ipc.open_stream(source)
            names = reader.schema.names

            def batches(wanted: list[str]) -> Iterator[Any]:
                stream = hasattr(reader, "num_record_batches")
                whole = (reader.get_batch(n) for n in range(reader.num_record_batches)) if stream else iter(reader)
                for batch in whole:
                    chosen = batch.select(wanted)
                    for begin in range(0, chosen.num_rows, _ROWS):
                        yield chosen.slice(begin, _ROWS)

            yield names, batches

    return opened()


def _without_nulls(value: Any) -> Any:
    """The value without the fields that a struct has only because another row's has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
