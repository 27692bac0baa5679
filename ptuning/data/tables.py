"""Step 1b of 5 for tables: CSV with any delimiter, and Parquet, to rows by column name.

The first line names the columns. Its delimiter is detected, unless Excel's `sep=;` is before it.
Values are those that the JSON of the same rows would have: a number is its digits as a string.
"""

import csv
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ptuning.data.raw_file import BOM, BOM_NAME, DataError, RawRow, Skipped, quoted

DELIMITERS = {
    ",": "commas",
    "\t": "tabs",
    ";": "semicolons",
    "|": "vertical bars",
    "，": "full-width commas",
    "；": "full-width semicolons",
}
_HEADERS = "repeated header line"  # a key of Skipped
_BLANK_LINES = re.compile(rf"(?:[{BOM} \t]*(?:\r\n|\r|\n))*{BOM}*")
_SEPARATOR_LINE = re.compile(r'"?sep=([^"\r\n ])"?[ \t,;]*(?:\r\n|\r|\n|$)', re.IGNORECASE)
_BLANK = " \t\x1a"  # old Windows programs end a file in the last one
_LINE_END = re.compile(r"\r\n|\r|\n")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class Header(NamedTuple):
    """Where the table begins in the text, and how it is written.

    nameless: the first column has no name. It is the index that pandas writes, and is left out.
    """

    start: int  # of the names, in characters
    line: int
    delimiter: str
    names: list[str]
    nameless: bool
    separator_record: list[str]  # the fields of Excel's `sep=;` line; [] if there is none

    def notes(self) -> list[str]:
        """Say what was detected, since it may not be what was meant."""
        notes = []
        if self.delimiter != ",":
            notes.append(f"fields are separated by {_name_of(self.delimiter)}")
        if self.nameless:
            notes.append("column 1 has no name and is left out, as the index that pandas writes")
        return notes


def read_header(path: Path, text: str, default: str) -> Header:
    """Find the column names and the delimiter; DataError if they cannot be used.

    default: the delimiter if the header has none, and the first choice if it has several.
    """
    csv.field_size_limit(2**31 - 1)  # the maximum of every platform; JSON has no limit either
    blank = _BLANK_LINES.match(text)
    start = blank.end() if blank else 0
    line = len(_LINE_END.findall(text, 0, start)) + 1
    if start == len(text):
        raise DataError(
            path, None, "no rows; write the names of the columns, and one row per line under them."
        )
    separator_line = _SEPARATOR_LINE.match(text, start)
    separator_record: list[str] = []
    if separator_line:
        candidates = [separator_line[1]]
        separator_record = next(csv.reader([separator_line[0]], delimiter=candidates[0]))
        start, line = separator_line.end(), line + 1
    else:
        end = _LINE_END.search(text, start)
        first_line = text[start : end.start() if end else len(text)]
        present = [one for one in DELIMITERS if one in first_line]
        candidates = [default] if default in present and default != "," else present or [default]
    found: dict[str, list[str]] = {}
    fits: dict[str, bool] = {}  # whether the first row has as many fields
    for delimiter in candidates:
        lines = (match[0] for match in _LINE.finditer(text, start))  # no more than are needed
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            found[delimiter] = names = next(reader, [])
            fits[delimiter] = 1 < len(names) == len(next(filter(None, reader), []))
        except csv.Error as error:
            fault, fits[delimiter] = _broken(error, delimiter), False
    if not found:
        raise DataError(path, line, fault)
    delimiter = max(found, key=lambda one: (fits[one], len(found[one])))
    names = found[delimiter]
    nameless = len(names) > 1 and not names[0].strip()
    named = names[nameless:]
    blank_at = next((index for index, name in enumerate(named) if not name.strip()), None)
    if blank_at is not None:
        number = blank_at + nameless + 1
        message = f"column {number} of {len(names)} has no name; name or delete it."
        raise DataError(path, line, message)
    refuse_repeated_names(path, line, named)
    if not names:
        raise DataError(path, line, "no names; write the names of the columns on this line.")
    return Header(start, line, delimiter, names, nameless, separator_record)


def refuse_repeated_names(path: Path, line: int | None, names: list[str]) -> None:
    """Refuse columns of one name."""
    name, count = (Counter(names).most_common(1) or [("", 0)])[0]
    if count > 1:
        message = f"two columns are named {quoted(name)}; rename or delete one."
        raise DataError(path, line, message)


def read_delimited(
    path: Path, text: str, header: Header, skipped: Skipped
) -> Iterator[RawRow | DataError]:
    """Yield the rows under the header; a record that repeats the header is skipped."""
    begins_record = True

    def lines() -> Iterator[str]:
        """Skip a mark before a record; inside a quoted field it is text."""
        nonlocal begins_record
        for number, line in enumerate(body, start=header.line):
            if begins_record and line.startswith(BOM):
                skipped[BOM_NAME].append(number)
                line = line.lstrip(BOM)
            begins_record = False
            yield line

    body = io.StringIO(text[header.start :], newline="")
    source = lines() if BOM in text else body
    reader = csv.reader(source, delimiter=header.delimiter, strict=True)
    names, offset = next(reader), header.line
    known = {*names, *header.separator_record[:1]}  # first fields of a repeated header
    is_empty = True
    while True:
        begins_record = True
        number = offset + reader.line_num
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            is_empty = False
            yield DataError(path, number, _broken(error, header.delimiter))
            continue
        if not fields or (len(fields) == 1 < len(names) and not fields[0].strip(_BLANK)):
            continue
        if fields[0] in known and sorted(fields) == sorted(names):  # files joined with cat
            names = fields  # which need not have their columns in one order
            skipped[_HEADERS].append(number)
            continue
        if fields[0] in known and fields == header.separator_record:
            skipped[_HEADERS].append(number)
            continue
        is_empty = False
        if len(fields) != len(names):
            place = "first line" if header.line == 1 else f"header on line {header.line}"
            yield DataError(
                path,
                number,
                f"{len(fields)} fields, but the {place} names {len(names)}; put quotes around "
                f"fields with {_name_of(header.delimiter)}.",
            )
            continue
        columns = dict(zip(names, fields, strict=True))
        if header.nameless:
            del columns[header.names[0]]
        yield RawRow(path, number, columns)
    if is_empty:
        message = "no rows, the header alone; write one row per line under it."
        yield DataError(path, header.line, message)


def _name_of(delimiter: str) -> str:
    return DELIMITERS.get(delimiter, repr(delimiter))


def _broken(error: csv.Error, delimiter: str) -> str:
    """Say what is wrong with a record, and how to fix it."""
    kind = "TSV" if delimiter == "\t" else "CSV"
    if "unexpected end of data" in str(error):
        return (
            f"broken {kind}: a quote that opens in this row is never closed; close it, and write a "
            'quote inside a field as "".'
        )
    name = _name_of(delimiter)
    return f"broken {kind}: {error}; put quotes around fields with {name} or quotes."


# Parquet


def open_parquet(path: Path, content: bytes) -> Any:
    """Return pyarrow's ParquetFile; DataError if it cannot be read, or pyarrow is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            path,
            None,
            "a Parquet file, which only pyarrow can read; type: "
            f"{sys.executable} -m pip install pyarrow",
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(path, None, _unreadable(error)) from error
    refuse_repeated_names(path, None, names)
    return file


def read_parquet(path: Path, content: bytes, skipped: Skipped) -> Iterator[RawRow | DataError]:
    """Yield the rows up to a broken part of the file; nothing is ever skipped."""
    import pyarrow

    number = 0
    batches = open_parquet(path, content).iter_batches()
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            columns = [
                # Python's datetime has no nanoseconds, which pandas writes by default.
                column.cast(pyarrow.string()) if pyarrow.types.is_timestamp(column.type) else column
                for column in batch.columns
            ]
            rows = pyarrow.record_batch(columns, names=batch.schema.names).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            yield DataError(path, number + 1, _unreadable(error), "row")
            return
        for row in rows:
            number += 1
            try:
                yield RawRow(path, number, _as_json(row), "row")
            except ValueError as error:
                yield DataError(path, number, str(error), "row")


def _as_json(value: Any) -> Any:
    """Return a value as parsing.DECODER would; ValueError if JSON has no such value."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError("an infinite number; write a finite one, or leave the cell empty.")
        return None if math.isnan(value) else repr(value)
    if isinstance(value, dict):
        return {str(name): _as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, bytes):  # text without its annotation, as older writers leave it
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("bytes that are not text in UTF-8; leave the column out.") from error
    return str(value)


def _unreadable(error: Exception) -> str:
    what = " ".join(str(error).split())  # pyarrow's message, on one line
    return f"a Parquet file that cannot be read ({what}); download or write it again."
