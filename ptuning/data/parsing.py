"""Step 1 of 5: a data file to rows as they stand, or `file:line: what is wrong`.

JSON may be one array, one object per line (ADGEN's .json files are the latter) or an object that
holds all rows; tables.py reads CSV and Parquet. A fault is yielded and not raised,
so that a caller may stop there or go on with the other lines.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ptuning.data.raw_file import (
    DELIMITED_SUFFIXES,
    MARK,
    MARKS,
    PARQUET_MAGIC,
    PARQUET_SUFFIX,
    TEXT_NAMES,
    TEXT_SUFFIX,
    TURN_NAMES,
    UTF_8,
    DataError,
    DecodedText,
    RawRow,
    Skipped,
    decode_text,
    read_contents,
    say_encoding_fault,
    shown,
)
from ptuning.data.tables import open_parquet, read_delimited, read_header, read_parquet

_LINES_CURE = "write one whole object per line, or one array of objects."
_BLANK = re.compile(rf"[ \t\r\n{MARK}]*")
_EMPTY_ARRAY = re.compile(rf"\[{_BLANK.pattern}\]")
Reader = Callable[[Skipped], Iterator[RawRow | DataError]]


@dataclass
class DataFile:
    """A file that has rows, or faults where they should be.

    unit: what places count, "line", or "row" where rows have no lines of their own. decoded: the
    text and its encoding; that of Parquet is "". num_rows: where that is known before reading.
    header_line: the line of the columns' names, where there is one.
    """

    path: Path
    unit: str
    decoded: DecodedText
    is_gzip: bool
    read: Reader
    opening_notes: list[str] = field(default_factory=list)
    num_rows: int | None = None
    header_line: int | None = None
    skipped: Skipped = field(default_factory=lambda: Skipped(list))

    @property
    def size(self) -> int | None:
        """How many places there are, for a progress bar; None where only reading tells."""
        return self.decoded.text.count("\n") + 1 if self.unit == "line" else self.num_rows

    def rows(self) -> Iterator[RawRow | DataError]:
        """Yield the rows as they stand; a fault is yielded, and the rows after it follow."""
        self.skipped.clear()
        return self.read(self.skipped)

    @property
    def notes(self) -> list[str]:
        """Say what was not read as written; complete once rows() has been read."""
        notes = list(self.opening_notes)
        for noun, places in self.skipped.items():
            unit = self.unit if len(places) == 1 else f"{self.unit}s"
            named = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
            plural = "s" * (len(places) != 1)
            notes.append(
                f"{len(places):,} {noun}{plural} inside the file left out ({unit} {named})"
            )
        return notes


def open_data(path: Path | str) -> DataFile:
    """Open a file of any form that training reads; DataError where nothing in it can be read."""
    path = Path(path)
    contents = read_contents(path)
    content, suffix = contents.content, contents.suffix
    notes = ["unpacked from gzip"] if contents.is_gzip else []
    if suffix == PARQUET_SUFFIX or content.startswith(PARQUET_MAGIC):
        num_rows = open_parquet(path, content).metadata.num_rows
        nothing = DecodedText("", UTF_8, False)
        read: Reader = partial(read_parquet, path, content)
        file = DataFile(path, "row", nothing, contents.is_gzip, read, notes, num_rows)
        is_empty = num_rows == 0
    else:
        decoded = decode_text(content)
        text = decoded.text
        read = partial(_read_lines, path, text)
        file = DataFile(path, "line", decoded, contents.is_gzip, read, notes)
        start = _skip_blank(text, 0)
        begin = text[start : start + 1]
        is_json = begin in ("{", "[") if suffix == TEXT_SUFFIX else suffix not in DELIMITED_SUFFIXES
        is_empty = is_json and _EMPTY_ARRAY.match(text, start) is not None
        if not is_json:
            _open_delimited(file, suffix)
        elif begin == "[":
            _open_array(file)
        elif begin == "{":
            _open_object(file)
            is_empty = file.num_rows == 0
        else:  # nothing, or blanks that JSON does not know, or a fault
            is_empty = next(file.rows(), None) is None
    if is_empty:
        raise DataError(path, None, "no rows; write one JSON object per line, or a JSON array.")
    return file


def encoding_fault(file: DataFile) -> DataError | None:
    """Return why training refuses the file's encoding; None for UTF-8."""
    message = say_encoding_fault(file.path, file.decoded, is_gzip=file.is_gzip)
    if message is None:
        return None
    return DataError(file.path, file.decoded.first_foreign_line, message)


def _open_delimited(file: DataFile, suffix: str) -> None:
    text = file.decoded.text
    header = read_header(file.path, text, "\t" if suffix == ".tsv" else ",")
    file.read = partial(read_delimited, file.path, text, header)
    file.header_line = header.line
    file.opening_notes += header.notes()


def _open_array(file: DataFile) -> None:
    """Read one array; its rows have lines if the first two do."""
    text = file.decoded.text
    begin = text.index("[")
    first = _skip_blank(text, begin + 1)
    try:
        index = _skip_blank(text, DECODER.raw_decode(text, first)[1])
    except (ValueError, RecursionError):
        index = len(text)  # the reader says what is wrong
    if text[index : index + 1] == ",":
        between = text[first : _skip_blank(text, index + 1)]
    else:
        between = text[begin:].rstrip()
    if "\n" not in between:
        file.unit = "row"
    file.read = partial(_read_values, file.path, text, file.unit)


def _open_object(file: DataFile) -> None:
    """Tell one object per line from one that is the whole file, and from several over more lines.

    Only the first value is decoded for that.
    """
    text = file.decoded.text
    start = _skip_blank(text, 0)
    line_end = text.find("\n", start)
    first_line = text[start : line_end if line_end >= 0 else len(text)].rstrip()
    try:
        value, end = DECODER.raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        if first_line.endswith(("{", "[", ",", ":")):  # as no whole object does
            file.read = partial(_read_values, file.path, text, file.unit)
        return
    except ValueError:
        value, end = None, _end_of_value(text, start)  # the reader says what is wrong
    is_whole = _skip_blank(text, end) == len(text)
    try:
        found = find_rows(value) if is_whole and isinstance(value, dict) else None
    except ValueError as error:
        raise DataError(file.path, None, str(error)) from error
    if found is not None:
        rows, note = found
        file.unit, file.num_rows = "row", len(rows)
        file.opening_notes.append(note)
        file.read = partial(_read_document, file.path, rows)
    elif end - start > len(first_line):
        file.read = partial(_read_values, file.path, text, file.unit)


def _read_lines(path: Path, text: str, skipped: Skipped) -> Iterator[RawRow | DataError]:
    """Yield one object per line; blank lines are skipped."""
    decode = DECODER.raw_decode
    number, end_of_line = 0, -1
    while end_of_line < len(text):
        number += 1
        begin, end_of_line = end_of_line + 1, text.find("\n", end_of_line + 1)
        if end_of_line < 0:
            end_of_line = len(text)
        line = text[begin:end_of_line]
        bare = line.strip()
        if not bare:
            continue
        try:
            value, end = decode(bare)
        except (ValueError, RecursionError):
            value, end = None, -1
        if end == len(bare) and isinstance(value, dict):
            yield RawRow(number, value)
        else:
            yield from _read_odd_line(path, number, line, skipped)


def _read_odd_line(
    path: Path, number: int, line: str, skipped: Skipped
) -> Iterator[RawRow | DataError]:
    """Yield what is wrong with a line, or its row without a byte order mark before it."""
    bare = line.lstrip(f" \t\r{MARK}")
    margin = len(line) - len(bare)
    if MARK in line[:margin]:
        skipped[MARKS].append(number)
    if not bare:
        return
    try:
        value = DECODER.decode(" " * margin + bare)  # so that columns are right
    except json.JSONDecodeError as error:
        yield DataError(path, number, f"broken JSON: {_say_fault(error)}; {_LINES_CURE}")
    except RecursionError:
        yield DataError(path, number, f"broken JSON: nested too deeply; {_LINES_CURE}")
    except ValueError as error:
        yield DataError(path, number, str(error))
    else:
        yield RawRow(number, value) if isinstance(value, dict) else _no_row(path, number, value)


def _read_document(path: Path, rows: list[Any], skipped: Skipped) -> Iterator[RawRow | DataError]:
    """Yield the rows that one object holds. Nothing is ever left out."""
    for number, value in enumerate(rows, start=1):
        if isinstance(value, dict):
            yield RawRow(number, value, "row")
        else:
            yield _no_row(path, number, value, "row")


def _read_values(
    path: Path, text: str, unit: str, skipped: Skipped
) -> Iterator[RawRow | DataError]:
    """Yield the objects of one array, or of several one after another that take lines each.

    Broken syntax ends them: where the next one begins is not known any more.
    """

    def fault(message: str, index: int, number: int) -> DataError:
        place = text.count("\n", 0, index) + 1 if unit == "line" else number
        return DataError(path, place, message, unit)

    decode, match_blank = DECODER.raw_decode, _BLANK.match
    has_marks = MARK in text
    before = index = _skip_blank(text, 0)  # before: where the last value ended
    is_array = text[index] == "["
    if is_array:
        index = _skip_blank(text, index + 1)
    number, line, counted = 0, 1, 0  # the lines of text[:counted] are in `line`
    closed = is_array and text[index : index + 1] == "]"
    if closed:
        index = _skip_blank(text, index + 1)
    while not closed:
        number += 1
        line += text.count("\n", counted, index)
        counted = index
        place = line if unit == "line" else number
        if has_marks and MARK in text[before:index]:
            skipped[MARKS].append(place)
        try:
            value, before = decode(text, index)
        except json.JSONDecodeError as error:
            begin = "" if unit == "row" else f" in the row that begins on line {line}"
            cure = "write an array of objects." if is_array else _LINES_CURE
            yield fault(f"broken JSON{begin}: {_say_fault(error)}; {cure}", error.pos, number)
            return
        except RecursionError:
            yield fault("nested too deeply; write an array of objects.", index, number)
            return
        except ValueError as error:
            yield DataError(path, place, str(error), unit)
            before = _end_of_value(text, index)
        else:
            is_row = isinstance(value, dict)
            yield RawRow(place, value, unit) if is_row else _no_row(path, place, value, unit)
        if is_array and text.startswith(",", before):
            found = match_blank(text, before + 1)
            index = found.end() if found else before + 1
            continue
        index = _skip_blank(text, before)
        if is_array:
            separator = text[index : index + 1]
            if separator not in (",", "]") or not separator:
                message = "broken JSON: a comma or ] is due between or after rows."
                yield fault(message, index, number)
                return
            closed = separator == "]"
            index = _skip_blank(text, index + 1)
        else:
            closed = index == len(text)
    if index < len(text):
        yield fault("text after the end of the array; write one array only.", index, number)


def _skip_blank(text: str, index: int) -> int:
    """Return the next index that is neither blank nor a byte order mark."""
    found = _BLANK.match(text, index)
    return found.end() if found else index


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(repeated)} appears twice in one object; delete one.")
    return value


def _read_constant(name: str) -> None:
    """Return None for NaN, which pandas writes for a missing cell; the others are no values."""
    if name != "NaN":
        raise ValueError(f"{name} is not valid JSON; write a finite number, or null.")


class Digits(str):
    """A number as it was written, so that 1.50 stays "1.50"."""

    __slots__ = ()


def write_json(value: Any) -> str:
    """Write a value that DECODER read, its numbers as numbers.

    >>> write_json(parse_json('{"x": [1, 2.5, "3"]}'))
    '{"x": [1, 2.5, "3"]}'
    """
    try:
        return json.dumps(_with_numbers(value), ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _with_numbers(value: Any) -> Any:
    if isinstance(value, Digits):
        try:
            number = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:  # more digits than Python reads
            return str(value)
        return number if math.isfinite(number) else str(value)
    if isinstance(value, dict):
        return {name: _with_numbers(part) for name, part in value.items()}
    return [_with_numbers(part) for part in value] if isinstance(value, list) else value


DECODER = json.JSONDecoder(
    parse_int=Digits,
    parse_float=Digits,
    parse_constant=_read_constant,
    object_pairs_hook=_refuse_repeated_keys,
)
_LENIENT_DECODER = json.JSONDecoder(parse_int=str)  # of syntax alone


def _end_of_value(text: str, index: int) -> int:
    """Return where a value ends that DECODER refuses; at the end, if its syntax is broken too."""
    try:
        return _LENIENT_DECODER.raw_decode(text, index)[1]
    except (json.JSONDecodeError, RecursionError):
        return len(text)


def parse_json(text: str) -> Any:
    """Decode one JSON value, numbers as their digits; ValueError says what is wrong."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(_say_fault(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _say_fault(error: json.JSONDecodeError) -> str:
    """Say what is wrong and in which column; some of json's messages end in a word for the place.

    >>> _say_fault(json.JSONDecodeError("Unterminated string starting at", '{"a', 1))
    'Unterminated string starting at column 2'
    """
    place = "" if error.msg.endswith(" at") else " at"
    before, found = error.doc[: error.pos].rstrip()[-1:], error.doc[error.pos : error.pos + 1]
    cause = ""
    if before == "," and found in ("]", "}"):
        cause = f" (a comma too many before {found})"
    elif found == "'":
        cause = " (single quotes: Python's notation; json.dumps writes JSON)"
    elif error.msg == "Extra data" and found == "{":
        cause = " (a second object on the line)"
    return f"{error.msg}{place} column {error.colno}{cause}"


def _no_row(path: Path, place: int, value: Any, unit: str = "line") -> DataError:
    return DataError(
        path,
        place,
        f'a row must be an object such as {{"content": "...", "summary": "..."}}, and this is '
        f"{kind_of(value)}.",
        unit,
    )


def kind_of(value: Any) -> str:
    """Name a JSON value's kind in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", dict: "an object", list: "a list", str: "a string or a number"}
    return next(name for kind, name in names.items() if isinstance(value, kind))


# A list under one of these is a field of a row, and the object is that row.
_TURN_FIELDS = {*TURN_NAMES}
# So is a list, or an object, next to one of these.
_TEXT_FIELDS = {*TEXT_NAMES, "text"}
_INDEX = re.compile(r"-?\d+(\.\d+)?")


def find_rows(document: dict[str, Any]) -> tuple[list[Any], str] | None:
    """Return the rows of an object, and a note of how they stood; None where it is one row.

    ValueError where it holds several lists of rows.

    >>> find_rows({"content": {"0": "a", "1": "b"}})
    ([{'content': 'a'}, {'content': 'b'}], 'columns, not rows: read as 2 rows')
    >>> find_rows({"messages": [{"role": "user", "content": "a"}]}) is None
    True
    """
    if any(
        name.strip().lower() in _TURN_FIELDS and isinstance(value, list)
        for name, value in document.items()
    ):
        return None
    values = list(document.values())
    if values and all(isinstance(value, dict) and value for value in values):
        return _from_objects(document)
    if values and all(isinstance(value, list) for value in values):
        sizes = {len(value) for value in values}
        is_columns = any(not _holds_objects(value) for value in values)
        if is_columns and len(sizes) == 1 and not _is_split(document):
            cells = zip(*values, strict=True)
            return _as_columns([dict(zip(document, row, strict=True)) for row in cells])
    if _is_split(document):
        names = document["columns"]
        rows = [
            dict(zip(names, cells, strict=True)) if len(cells) == len(names) else cells
            for cells in document["data"]
        ]
        return _as_columns(rows)
    return _under_name(document)


def _from_objects(document: dict[str, dict[str, Any]]) -> tuple[list[Any], str] | None:
    """Read an object of objects: columns by index, or rows by index or by a name of their own."""
    parts = list(document.values())
    if all(_INDEX.fullmatch(key) for key in document):
        return _by_key(parts)
    if all(_INDEX.fullmatch(key) for part in parts for key in part):
        indices = dict.fromkeys(key for part in parts for key in part)
        return _as_columns(
            [
                {name: part[index] for name, part in document.items() if index in part}
                for index in indices
            ]
        )
    same = len(parts) > 1 and all(part.keys() == parts[0].keys() for part in parts)
    return _by_key(parts) if same and len(parts[0]) > 1 and not _text_fields(document) else None


def _under_name(document: dict[str, Any]) -> tuple[list[Any], str] | None:
    """Read the one list of objects in a document; values next to it describe the file."""
    lists = [name for name, value in document.items() if _holds_objects(value)]
    if not lists or _text_fields(document):
        return None
    if len(lists) > 1:
        raise ValueError(
            f"several lists of rows: {', '.join(map(shown, lists))}; save each in its own file."
        )
    rows = document[lists[0]]
    return rows, f"rows under {shown(lists[0])}: read as {_count(rows)}"


def _is_split(document: dict[str, Any]) -> bool:
    """Tell orient="split": names of columns, and a list of the cells of each row."""
    names, data = document.get("columns"), document.get("data")
    return (
        isinstance(names, list)
        and isinstance(data, list)
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
        and bool(data)
        and all(isinstance(cells, list) for cells in data)
    )


def _text_fields(document: dict[str, Any]) -> list[str]:
    return [name for name in document if name.lower() in _TEXT_FIELDS]


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _as_columns(rows: list[Any]) -> tuple[list[Any], str]:
    return rows, f"columns, not rows: read as {_count(rows)}"


def _by_key(rows: list[Any]) -> tuple[list[Any], str]:
    return rows, f"rows under their keys: read as {_count(rows)}"


def _count(rows: list[Any]) -> str:
    return f"{len(rows):,} row{'s' * (len(rows) != 1)}"
