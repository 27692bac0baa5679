"""Step 1 of 5: a data file to rows as they are, or `file:line: what is wrong`.

JSON may be one object per line (as in ADGEN's .json files), one array, or one object of all rows:
as pandas' `DataFrame.to_json(orient=...)` writes them, or under a name, as in {"data": [...]}.
tables.py reads CSV and Parquet. A fault is yielded, not raised: the caller stops there or goes on.
Source: https://pandas.pydata.org/docs/user_guide/io.html#json
"""

import io
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
    BOM,
    BOM_NAME,
    DELIMITED_SUFFIXES,
    PARQUET_MAGIC,
    PARQUET_SUFFIX,
    TEXT_SUFFIX,
    DataError,
    DecodedText,
    RawRow,
    Skipped,
    as_places,
    decode_text,
    find_encoding_fault,
    number_of,
    quoted,
    read_contents,
)
from ptuning.data.tables import open_parquet, read_delimited, read_header, read_parquet

# Usual column names in lower case, the most usual first
PROMPT_NAMES = (
    *("content", "prompt", "question", "instruction", "query", "input"),
    *("问题", "提问", "指令", "输入"),
)
RESPONSE_NAMES = (
    *("summary", "response", "answer", "output", "completion", "target"),
    *("答案", "回答", "回复", "输出", "摘要"),
)
INPUT_NAMES = ("input", "context", "输入")  # what an instruction is about: Alpaca, Dolly
INSTRUCTION_NAMES = ("instruction", "指令")
HISTORY, SYSTEM, TOOLS = "history", "system", "tools"
CONVERSATION_NAMES = ("messages", "conversations")
LIMA_NAMES = ("conversations", "conversation")  # whose turns may be texts without a speaker
DIALOGUE_NAMES = ("conversation", "dialogue", "dialog", "paragraph", "turns")  # texts or turns
TURN_NAMES = (*CONVERSATION_NAMES, *DIALOGUE_NAMES, HISTORY)
_TEXT_NAMES = (*PROMPT_NAMES, *RESPONSE_NAMES, *INPUT_NAMES, "text")

_LINES_CURE = "write one whole object per line, or one array of objects."
_BLANK = re.compile(rf"[ \t\r\n{BOM}]*")
_EMPTY_ARRAY = re.compile(rf"\[{_BLANK.pattern}\]")
_LINE = re.compile(r"[^\n]*")
_INDEX = re.compile(r"-?\d+(\.\d+)?")  # a row label that pandas writes
Reader = Callable[[Skipped], Iterator[RawRow | DataError]]


@dataclass
class DataFile:
    """A file that has rows, or faults where they should be.

    unit: what places count, "line", or "row" if rows do not begin on lines of their own.
    decoded: the text and its encoding; "" for Parquet.
    header_line: the line of the column names; None in JSON and Parquet.
    """

    path: Path
    unit: str
    decoded: DecodedText
    is_gzip: bool
    read: Reader
    opening_notes: list[str] = field(default_factory=list)
    header_line: int | None = None
    skipped: Skipped = field(default_factory=lambda: Skipped(list))

    @property
    def encoding_fault(self) -> DataError | None:
        """Why training refuses the encoding; None for UTF-8."""
        return find_encoding_fault(self.path, self.decoded, is_gzip=self.is_gzip)

    def rows(self) -> Iterator[RawRow | DataError]:
        """Yield rows, and faults between them."""
        self.skipped.clear()
        return self.read(self.skipped)

    @property
    def notes(self) -> list[str]:
        """What was not read as written; complete once rows() has been read."""
        return self.opening_notes + [
            f"{number_of(len(places), noun)} inside the file left out "
            f"({as_places(places, self.unit)})"
            for noun, places in self.skipped.items()
        ]


def open_data(path: Path | str) -> DataFile:
    """Open a data file of any form; DataError if nothing in it can be read."""
    path = Path(path)
    content, suffix, is_gzip = read_contents(path)
    notes = ["unpacked from gzip"] if is_gzip else []
    if suffix == PARQUET_SUFFIX or content.startswith(PARQUET_MAGIC):
        is_empty = open_parquet(path, content).metadata.num_rows == 0
        read: Reader = partial(read_parquet, path, content)
        file = DataFile(path, "row", DecodedText("", False), is_gzip, read, notes)
    else:
        decoded = decode_text(content)
        text = decoded.text
        file = DataFile(path, "line", decoded, is_gzip, partial(_read_lines, path, text), notes)
        start = _skip_blank(text, 0)
        begin = text[start : start + 1]
        is_json = begin in ("{", "[") if suffix == TEXT_SUFFIX else suffix not in DELIMITED_SUFFIXES
        is_empty = is_json and _EMPTY_ARRAY.match(text, start) is not None
        if not is_json:
            header = read_header(path, text, "\t" if suffix == ".tsv" else ",")
            file.read = partial(read_delimited, path, text, header)
            file.header_line = header.line
            file.opening_notes += header.notes()
        elif begin == "[":
            _open_array(file, start)
        elif begin == "{":
            is_empty = _open_object(file, start)
        else:  # nothing, or whitespace that JSON does not know, or a fault
            is_empty = next(file.rows(), None) is None
    if is_empty:
        raise DataError(path, None, "no rows; write one JSON object per line, or a JSON array.")
    return file


def _open_array(file: DataFile, start: int) -> None:
    """Read one array; its rows have lines if the first two do."""
    text = file.decoded.text
    first = _skip_blank(text, start + 1)
    try:
        index = _skip_blank(text, DECODER.raw_decode(text, first)[1])
    except ValueError:
        index = len(text)  # the reader says what is wrong
    has_second = text.startswith(",", index)
    between = text[first : _skip_blank(text, index + 1)] if has_second else text[start:].rstrip()
    if "\n" not in between:
        file.unit = "row"
    file.read = partial(_read_values, file.path, text, file.unit)


def _open_object(file: DataFile, start: int) -> bool:
    """Tell one object per line from one that is the whole file, and from several over more lines.

    Only the first value is decoded for that. Return whether it is the whole file and has no row.
    """
    text = file.decoded.text
    line = _LINE.match(text, start)
    first_line = line[0].rstrip() if line else ""
    try:
        value, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        spans_lines = first_line.endswith(("{", "[", ",", ":"))  # as no whole object does
    except ValueError:  # the reader says what is wrong
        spans_lines = _end_of_value(text, start) - start > len(first_line)
    else:
        spans_lines = end - start > len(first_line)
        found = find_rows(file.path, value) if _skip_blank(text, end) == len(text) else None
        if found is not None:
            rows, arrangement = found
            file.unit = "row"
            file.opening_notes.append(f"{arrangement}: read as {number_of(len(rows), 'row')}")
            file.read = lambda _: (
                _to_row(file.path, number, one, "row") for number, one in enumerate(rows, start=1)
            )
            return not rows
    if spans_lines:
        file.read = partial(_read_values, file.path, text, file.unit)
    return False


def _to_row(path: Path, place: int, value: Any, unit: str = "line") -> RawRow | DataError:
    if isinstance(value, dict):
        return RawRow(path, place, value, unit)
    message = (
        f'a row must be an object such as {{"content": "...", "summary": "..."}}, and this is '
        f"{kind_of(value)}."
    )
    return DataError(path, place, message, unit)


def _read_lines(path: Path, text: str, skipped: Skipped) -> Iterator[RawRow | DataError]:
    """Yield one object per line; blank lines are skipped."""
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        bare = line.strip()
        if bare.startswith(BOM):
            skipped[BOM_NAME].append(number)
            bare = bare.lstrip(f" \t\r{BOM}")
        if not bare:
            continue
        try:
            value = DECODER.decode(bare)
        except json.JSONDecodeError as error:
            message = f"broken JSON: {_explain(error, line.index(bare))}; {_LINES_CURE}"
            yield DataError(path, number, message)
        except ValueError as error:
            yield DataError(path, number, str(error))
        else:
            yield _to_row(path, number, value)


def _read_values(
    path: Path, text: str, unit: str, skipped: Skipped
) -> Iterator[RawRow | DataError]:
    """Yield the objects of one array, or several objects that span lines.

    Broken syntax ends the reading: where the next object begins is not known any more.
    """

    def fault(message: str, index: int) -> DataError:
        place = text.count("\n", 0, index) + 1 if unit == "line" else number
        return DataError(path, place, message, unit)

    end = index = _skip_blank(text, 0)  # end: of the value before
    is_array = text[index] == "["
    if is_array:
        index = _skip_blank(text, index + 1)
    number, line, counted = 0, 1, 0  # text[:counted] has line - 1 line breaks
    is_over = is_array and text.startswith("]", index)
    while not is_over:
        number += 1
        line += text.count("\n", counted, index)
        counted = index
        place = line if unit == "line" else number
        if BOM in text[end:index]:
            skipped[BOM_NAME].append(place)
        try:
            value, end = DECODER.raw_decode(text, index)
        except json.JSONDecodeError as error:
            begin = "" if unit == "row" else f" in the row that begins on line {line}"
            cure = "write an array of objects." if is_array else _LINES_CURE
            yield fault(f"broken JSON{begin}: {_explain(error)}; {cure}", error.pos)
            return
        except ValueError as error:
            yield DataError(path, place, str(error), unit)
            end = _end_of_value(text, index)
        else:
            yield _to_row(path, place, value, unit)
        index = _skip_blank(text, end)
        if not is_array:
            is_over = index == len(text)
        elif text.startswith(",", index):
            index = _skip_blank(text, index + 1)
        elif text.startswith("]", index):
            is_over = True
        else:
            yield fault("broken JSON: a comma or ] is due between or after rows.", index)
            return
    index = _skip_blank(text, index + 1)
    if index < len(text):
        yield fault("text after the end of the array; write one array only.", index)


def _skip_blank(text: str, index: int) -> int:
    """Return the next index that is neither whitespace nor a byte order mark."""
    found = _BLANK.match(text, index)
    return found.end() if found else index


# JSON values


class Digits(str):
    """A number as it was written, so that 1.50 stays "1.50"."""

    __slots__ = ()


class _Decoder(json.JSONDecoder):
    """Python's decoder, to which deep nesting is broken syntax as well."""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        try:
            return super().raw_decode(s, idx)
        except RecursionError as error:
            raise json.JSONDecodeError("nested too deeply", s, idx) from error


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {quoted(repeated)} appears twice in one object; delete one.")
    return value


def _read_constant(name: str) -> None:
    """Return None for NaN, which pandas writes for a missing cell."""
    if name != "NaN":
        raise ValueError(f"{name} is not valid JSON; write a finite number, or null.")


DECODER = _Decoder(
    parse_int=Digits,
    parse_float=Digits,
    parse_constant=_read_constant,
    object_pairs_hook=_refuse_repeated_keys,
)
_SYNTAX_DECODER = _Decoder(parse_int=str)


def _end_of_value(text: str, index: int) -> int:
    """Return where a value ends that DECODER refuses; the end of text if its syntax is broken."""
    try:
        return _SYNTAX_DECODER.raw_decode(text, index)[1]
    except json.JSONDecodeError:
        return len(text)


def parse_json(text: str) -> Any:
    """Decode one JSON value, numbers as their digits; ValueError says what is wrong."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(_explain(error)) from error


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


def _explain(error: json.JSONDecodeError, margin: int = 0) -> str:
    """Say what is wrong, in which column (margin are those before the text), and the usual cause.

    >>> _explain(json.JSONDecodeError("Unterminated string starting at", '{"a', 1))
    'Unterminated string starting at column 2'
    """
    at = "" if error.msg.endswith(" at") else " at"
    before, found = error.doc[: error.pos].rstrip()[-1:], error.doc[error.pos : error.pos + 1]
    cause = ""
    if before == "," and found in ("]", "}"):
        cause = f" (a comma too many before {found})"
    elif found == "'":
        cause = " (single quotes: Python's notation; json.dumps writes JSON)"
    elif error.msg == "Extra data" and found == "{":
        cause = " (a second object on the line)"
    return f"{error.msg}{at} column {error.colno + margin}{cause}"


def kind_of(value: Any) -> str:
    """Name a JSON value's kind in words."""
    names = {bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), "a string or a number")


# One object that holds all rows


def find_rows(path: Path, document: dict[str, Any]) -> tuple[list[Any], str] | None:
    """Return the rows of an object, and how they were arranged; None if it is one row.

    >>> find_rows(Path("a.json"), {"content": {"0": "a", "1": "b"}})
    ([{'content': 'a'}, {'content': 'b'}], 'columns, not rows')
    >>> find_rows(Path("a.json"), {"messages": [{"role": "user", "content": "a"}]}) is None
    True
    """
    if any(
        name.strip().lower() in TURN_NAMES and isinstance(value, list)
        for name, value in document.items()
    ):
        return None
    values = list(document.values())
    has_text = any(name.lower() in _TEXT_NAMES for name in document)
    if values and all(isinstance(value, dict) and value for value in values):
        return _rows_of_objects(document, has_text=has_text)
    lists = [name for name, value in document.items() if _holds_objects(value)]
    if _is_split(document):
        names = document["columns"]
        rows = [
            dict(zip(names, cells, strict=True)) if len(cells) == len(names) else cells
            for cells in document["data"]
        ]
        return rows, "columns, not rows"
    are_lists = all(isinstance(value, list) for value in values) and len(lists) < len(values)
    if are_lists and len({len(value) for value in values}) == 1:
        cells = zip(*values, strict=True)
        return [dict(zip(document, row, strict=True)) for row in cells], "columns, not rows"
    if not lists or has_text:
        return None
    if len(lists) > 1:
        names = ", ".join(map(quoted, lists))
        message = f"several lists of rows: {names}; save each in its own file."
        raise DataError(path, None, message)
    return document[lists[0]], f"rows under {quoted(lists[0])}"


def _rows_of_objects(
    document: dict[str, dict[str, Any]], *, has_text: bool
) -> tuple[list[Any], str] | None:
    """Read an object of objects: rows by index or by a name of their own, or columns by index."""
    parts = list(document.values())
    is_alike = len(parts) > 1 and len(parts[0]) > 1 and not has_text
    is_alike = is_alike and all(part.keys() == parts[0].keys() for part in parts)
    if all(_INDEX.fullmatch(key) for key in document):
        return parts, "rows under their keys"
    if all(_INDEX.fullmatch(key) for part in parts for key in part):
        indices = dict.fromkeys(key for part in parts for key in part)
        rows = [
            {name: part[index] for name, part in document.items() if index in part}
            for index in indices
        ]
        return rows, "columns, not rows"
    return (parts, "rows under their keys") if is_alike else None


def _is_split(document: dict[str, Any]) -> bool:
    """Recognise orient="split": column names, and a list of cells for each row."""
    names, data = document.get("columns"), document.get("data")
    if not isinstance(names, list) or not isinstance(data, list) or not data:
        return False
    are_names = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return are_names and all(isinstance(cells, list) for cells in data)


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
