"""Step 1b of 5 for CSV and its kin: text to rows, under the names of the first line.

Which character separates the fields is found in that line, or obeyed where Excel's `sep=;` stands
before it.
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

from ptuning.data.raw_file import MARK, MARKS, DataError, RawRow, Skipped, shown

DELIMITERS = {
    ",": "commas",
    "\t": "tabs",
    ";": "semicolons",
    "|": "vertical bars",
    "，": "full-width commas",
    "；": "full-width semicolons",
}
_HEADERS = "repeated header line"  # a kind of Skipped
_BLANK_LINES = re.compile(rf"(?:[{MARK} \t]*(?:\r\n|\r|\n))*{MARK}*")
_SEPARATOR_LINE = re.compile(r'"?sep=([^"\r\n ])"?[ \t,;]*(?:\r\n|\r|\n|$)', re.IGNORECASE)
_NOTHING = " \t\x1a"  # a line of these is blank; old Windows programs end a file in the last
_LINE_END = re.compile(r"\r\n|\r|\n")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class Header(NamedTuple):
    """Where the table begins in the text, and how it is written.

    nameless: the first column has no name; it is the index that pandas writes, and left out.
    """

    start: int  # of the names, in characters
    line: int
    delimiter: str
    names: list[str]
    nameless: bool
    separator_record: list[str]  # Excel's line as a record of its own; [] where there is none

    @property
    def delimiter_name(self) -> str:
        """The separating character in words, plural."""
        return DELIMITERS.get(self.delimiter, repr(self.delimiter))

    def notes(self) -> list[str]:
        """Say what was found that need not be what was meant."""
        notes = []
        if self.delimiter != ",":
            notes.append(f"fields are separated by {self.delimiter_name}")
        if self.nameless:
            notes.append("column 1 has no name and is left out, as the index that pandas writes")
        return notes


def read_header(path: Path, text: str, default: str) -> Header:
    """Find the names and the delimiter; DataError where they are not usable.

    default: the delimiter where the header has none, and the first choice where it has several.
    """
    csv.field_size_limit(2**31 - 1)  # none, as in JSON; the most that every platform takes
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
        separator_record = next(csv.reader([separator_line[0]], delimiter=separator_line[1]))
        start, line = separator_line.end(), line + 1
        candidates = [separator_line[1]]
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
            found[delimiter] = next(reader, [])
            fits[delimiter] = len(found[delimiter]) > 1
            fits[delimiter] &= len(next(filter(None, reader), [])) == len(found[delimiter])
        except csv.Error as error:
            fault, fits[delimiter] = _say_broken(error, delimiter), False
    if not found:
        raise DataError(path, line, fault)
    delimiter = max(found, key=lambda one: (fits[one], len(found[one])))
    names = found[delimiter]
    nameless = len(names) > 1 and not names[0].strip()
    _check_names(path, line, names, int(nameless))
    return Header(start, line, delimiter, names, nameless, separator_record)


def _check_names(path: Path, line: int, names: list[str], first: int) -> None:
    """Refuse names that are blank or not unique, from the column with index `first` on."""
    for index, name in enumerate(names[first:], start=first):
        if not name.strip():
            raise DataError(
                path, line, f"column {index + 1} of {len(names)} has no name; name or delete it."
            )
        if name in names[first:index]:
            raise DataError(
                path, line, f"two columns are named {shown(name)}; rename or delete one."
            )
    if not names:
        raise DataError(path, line, "no names; write the names of the columns on this line.")


def read_delimited(
    path: Path, text: str, header: Header, skipped: Skipped
) -> Iterator[RawRow | DataError]:
    """Yield the rows under the header; a record that repeats the header is left out."""
    begins_record = True

    def lines() -> Iterator[str]:
        """Leave out a mark before a record; inside a quoted field it is text."""
        nonlocal begins_record
        for number, line in enumerate(body, start=header.line):
            if begins_record and line.startswith(MARK):
                skipped[MARKS].append(number)
                line = line.lstrip(MARK)
            begins_record = False
            yield line

    body = io.StringIO(text[header.start :], newline="")
    source = lines() if MARK in text else body
    reader = csv.reader(source, delimiter=header.delimiter, strict=True)
    names, nameless, offset = next(reader), header.nameless, header.line
    known = {*names, *header.separator_record[:1]}  # what a repeated header may begin with
    place = "first line" if header.line == 1 else f"header on line {header.line}"
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
            yield DataError(path, number, _say_broken(error, header.delimiter))
            continue
        if not fields or (len(fields) == 1 < len(names) and not fields[0].strip(_NOTHING)):
            continue
        if fields[0] in known and sorted(fields) == sorted(names):  # files joined with cat
            names = fields  # which need not have their columns in one order
            skipped[_HEADERS].append(number)
        elif fields[0] in known and fields == header.separator_record:
            skipped[_HEADERS].append(number)
        elif len(fields) != len(names):
            is_empty = False
            yield DataError(
                path,
                number,
                f"{len(fields)} fields, but the {place} names {len(names)}; put quotes around "
                f"fields with {header.delimiter_name}.",
            )
        else:
            columns = dict(zip(names, fields, strict=True))
            if nameless:
                del columns[header.names[0]]
            is_empty = False
            yield RawRow(number, columns)
    if is_empty:
        cure = "write one row per line under it."
        yield DataError(path, header.line, f"no rows, the header alone; {cure}")


def _say_broken(error: csv.Error, delimiter: str) -> str:
    kind = "TSV" if delimiter == "\t" else "CSV"
    noun = DELIMITERS.get(delimiter, repr(delimiter))
    if "unexpected end of data" in str(error):
        return (
            f"broken {kind}: a quote that opens in this row is never closed; close it, and write a "
            'quote inside a field as "".'
        )
    return f"broken {kind}: {error}; put quotes around fields with {noun} or quotes."


def open_parquet(path: Path, content: bytes) -> Any:
    """Return pyarrow's ParquetFile; DataError where there is none, or no pyarrow."""
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
        names = Counter(file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(path, None, _say_fault(error)) from error
    for name, count in names.items():
        if count > 1:
            raise DataError(
                path, None, f"two columns are named {shown(name)}; rename or delete one."
            )
    return file


def read_parquet(path: Path, content: bytes, skipped: Skipped) -> Iterator[RawRow | DataError]:
    """Yield the rows; a broken part of the file ends them. Nothing is ever left out."""
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
            yield DataError(path, number + 1, _say_fault(error), "row")
            return
        for row in rows:
            number += 1
            try:
                yield RawRow(number, {name: _as_json(value) for name, value in row.items()}, "row")
            except ValueError as error:
                yield DataError(path, number, str(error), "row")


def _as_json(value: Any) -> Any:
    """Return a value as parsing.DECODER would; ValueError says what has no such form."""
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


def _say_fault(error: Exception) -> str:
    """Return pyarrow's message on one line."""
    what = " ".join(str(error).split())
    return f"a Parquet file that cannot be read ({what}); download or write it again."
