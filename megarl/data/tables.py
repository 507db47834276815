"""Rows of a data file or a hub data set, as they are written there: no type is guessed. Torch-free.

JSON and CSV say no types, so a JSON's numbers keep their own text (`megarl.data.cells.Written`) and a CSV's cells are
texts; a Parquet file's and a hub data set's cells have the types that these give them.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megarl.config.data import DATA_SUFFIXES, OneSource
from megarl.data.cells import Places, Written
from megarl.errors import Refusal

Row = Mapping[str, Any]

#: Rows that a Parquet file gives at a time.
_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that can be gone through any number of times, each time read anew.

    `names` are the columns of all rows, those of records below their name, where the file says them once for all rows.
    """

    rows: Callable[[], Iterator[Row]]
    names: Mapping[str, Any] | None = None


def open_table(source: OneSource, columns: Sequence[str]) -> Table:
    """The table of a source; of typed tables only what holds `columns` is read.

    Raises `Refusal`, here or while rows are read, for what cannot be read, and names the line where there is one.
    """
    path = Path(str(source.settings.path))
    value, suffix = f"{source.key}={source.settings.path}", path.suffix.lower()
    if is_hub_name(str(path)):
        return _hub(source, value, columns)
    if suffix not in DATA_SUFFIXES:
        what = "is a folder" if path.is_dir() else f"must end in one of {', '.join(DATA_SUFFIXES)}"
        raise Refusal(value, what, "give a file of such a kind, or a hub name")
    if not path.is_file():
        raise Refusal(value, "is not a file", "correct the path; it is relative to where you start megarl")
    try:
        if path.stat().st_size == 0:
            raise Refusal(value, "is an empty file", "write it again")
        with path.open("rb"):
            pass
    except OSError as error:
        raise Refusal(value, f"cannot be read ({error.strerror})", "make it readable for you") from None
    if suffix == ".parquet":
        return _parquet(path, value, columns)
    if suffix in (".csv", ".tsv"):
        return Table(lambda: _csv_rows(path, value, "\t" if suffix == ".tsv" else ","))
    return Table(lambda: _json_rows(path, value))


def is_hub_name(name: str) -> bool:
    """Whether `name` is looked for on the hub: it neither is a path nor looks like one."""
    path = Path(name)
    return not (path.suffix.lower() in DATA_SUFFIXES or path.exists() or path.is_absolute() or name.startswith("."))


def _broken(value: str, where: str, what: str, fix: str = "correct the file there") -> Refusal:
    return Refusal(f"{value}, {where}" if where else value, f"cannot be read ({what})", fix)


def _lines(file: BinaryIO, value: str) -> Iterator[str]:
    """Lines as text, whatever the locale, without a byte-order mark. Only a line feed ends one: JSON texts and cells
    may hold the other characters that Python takes for line ends."""
    for number, raw in enumerate(file, 1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            what = f"byte 0x{raw[error.start]:02x} is not UTF-8"
            raise _broken(value, f"line {number}", what, "convert the file to UTF-8, as with iconv") from None


def _json_rows(path: Path, value: str) -> Iterator[Row]:
    """A row a line, or one array of rows."""
    with path.open("rb") as file:
        begin = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if begin.startswith(b"["):
            yield from _json_array(file, value)
            return
        for number, line in enumerate(_lines(file, value), 1):
            if not line.strip():
                continue
            try:
                row = _parsed(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and isinstance(error, json.JSONDecodeError) and _is_one_object(path):
                    yield from _json_array(path.open("rb"), value)
                    return
                raise _broken(value, f"line {number}", _said(error)) from None
            yield _object(row, value, f"line {number}")


def _is_one_object(path: Path) -> bool:
    """Whether the file is one row, written over several lines."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def _json_array(file: BinaryIO, value: str) -> Iterator[Row]:
    with file:
        text = "".join(_lines(file, value))
    try:
        found = _parsed(text)
    except json.JSONDecodeError as error:
        raise _broken(value, f"line {error.lineno}", error.msg) from None
    except (ValueError, RecursionError) as error:
        raise _broken(value, "", _said(error)) from None
    for number, row in enumerate(found if isinstance(found, list) else [found], 1):
        yield _object(row, value, f"row {number}")


def _said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _object(row: Any, value: str, where: str) -> Row:
    if not isinstance(row, dict):
        raise _broken(value, where, "no object of columns and their cells")
    return row


def _parsed(text: str) -> Any:
    return json.loads(
        text,
        parse_int=Written,
        parse_float=Written,
        # Python's own JSON writes a missing number as NaN.
        parse_constant=lambda name: None if name == "NaN" else Written(name),
        object_pairs_hook=_once,
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return table


def _csv_rows(path: Path, value: str, delimiter: str) -> Iterator[Row]:
    """Cells as texts under the names of the first line; None for empty ones."""
    csv.field_size_limit(sys.maxsize)
    with path.open("rb") as file:
        reader = csv.reader(_lines(file, value), delimiter=delimiter, strict=True)
        try:
            header = next((cells for cells in reader if cells), [])
            _once([(name, None) for name in header])
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"{len(cells)} cells under the {len(header)} columns of the first line")
                yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except (csv.Error, ValueError) as error:
            raise _broken(value, f"line {reader.line_num}", str(error)) from None


def _parquet(path: Path, value: str, columns: Sequence[str]) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
        _once([(name, None) for name in schema.names])
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _broken(value, "", _one_line(error), "write it again") from None
    names = _schema_names(schema)
    needed = _outer(names, columns)

    def rows() -> Iterator[Row]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                # Ranks read side by side, and a forked process has none of the threads that it was forked with.
                batches = file.iter_batches(_BATCH_ROWS, columns=needed, use_threads=False)
                for batch in batches:
                    for row in batch.to_pylist():
                        number += 1
                        yield row
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise _broken(value, f"after row {number}", _one_line(error), "write it again") from None

    return Table(rows, names)


def _schema_names(fields: Any) -> dict[str, Any]:
    """Names of an Arrow schema's columns, those of records and the places of lists below them."""
    return {field.name: _names_in(field.type) for field in fields}


def _names_in(kind: Any) -> Any:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return _schema_names(kind)
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return Places(_names_in(kind.value_type)) if is_list else None


def _outer(names: Mapping[str, Any], columns: Sequence[str]) -> list[str] | None:
    """The outermost columns that hold `columns`; None, for all, where a name has dots: readers take it for a path."""
    wanted = {column if column in names else column.split(".")[0] for column in columns}
    needed = [name for name in names if name in wanted]
    return None if any("." in name for name in needed) else needed


def _hub(source: OneSource, value: str, columns: Sequence[str]) -> Table:
    """A data set of the hub, by the library that knows it."""
    import datasets

    settings = source.settings
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found: Any = datasets.load_dataset(str(settings.path), name=settings.subset, split=settings.split)
        names = _schema_names(found.features.arrow_schema)
        needed = _outer(names, columns)
        table = found if needed is None else found.select_columns(needed)
    except Exception as error:  # the library raises whatever its readers, its file systems and the network raise
        fix = "check the hub name, subset, split and the connection"
        cause = error.__cause__ or error
        raise _broken(value, "", f"{type(cause).__name__}: {_one_line(cause)}", fix) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    return Table(lambda: iter(table), names)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
