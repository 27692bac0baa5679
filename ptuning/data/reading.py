"""Step 1 of 4: a data file to checked rows, or `file:line: what is wrong, what is needed`.

JSON may be one array or one object per line (ADGEN's .json files are the latter). Nothing is left
out silently: a row without a prompt or an answer is dropped and counted with its reason.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

JSON_SUFFIXES = (".json", ".jsonl")
CSV_SUFFIX = ".csv"
# Keeps numbers as they were written, so that 1.50 stays "1.50".
DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


class DataError(ValueError):
    """A fault in a data file; its text is `file:line: what is wrong, what is needed`."""

    def __init__(self, path: Path | str, line: int | None, message: str) -> None:
        """Keep the place beside the message; line is None when the whole file is meant."""
        self.path = Path(path)
        self.line = line
        place = f"{path}:{line}" if line is not None else f"{path}"
        super().__init__(f"{place}: {message}")


class Row(NamedTuple):
    """One checked row: its line in the file, and its columns as text (a history as pairs)."""

    line: int
    columns: dict[str, Any]


class Rows(NamedTuple):
    """What a file held: the rows kept, how many were read, and why the others were dropped."""

    kept: list[Row]
    num_read: int
    dropped: dict[str, int]


def read_rows(
    path: Path | str,
    *,
    prompt_column: str,
    response_column: str | None,
    history_column: str | None = None,
    max_rows: int | None = None,
) -> Rows:
    """Read and check the named columns of a .json, .jsonl or .csv file.

    max_rows stops after that many rows, dropped ones included; None reads all. response_column
    None asks for no answers. Raises DataError for everything a file can get wrong.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(
            f"the number of rows to read is {max_rows}; use 1 or more, or leave it out."
        )
    path = Path(path)
    columns = [
        (flag, column)
        for flag, column in (
            ("--prompt_column", prompt_column),
            ("--response_column", response_column),
            ("--history_column", history_column),
        )
        if column is not None
    ]
    raw_rows = []
    for raw_row in _read_objects(path):
        raw_rows.append(raw_row)
        if len(raw_rows) == max_rows:
            break
    if not raw_rows:
        raise DataError(path, None, "no rows; write one JSON object per line, or a JSON array.")
    _check_columns(path, raw_rows, columns)
    return _check_rows(path, raw_rows, prompt_column, response_column, history_column)


def _check_columns(path: Path, rows: list[Row], columns: list[tuple[str, str]]) -> None:
    """Refuse a column that no row has; one that only some rows lack drops those rows later."""
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(row.columns))
    for flag, column in columns:
        if column not in found:
            names = ", ".join(found) or "none"
            raise DataError(
                path,
                rows[0].line,
                f'no column "{column}"; the columns here are: {names}. Name the right one with '
                f"{flag}.",
            )


def _check_rows(
    path: Path,
    rows: list[Row],
    prompt_column: str,
    response_column: str | None,
    history_column: str | None,
) -> Rows:
    """Turn the fields to text and drop, with a count, the rows that lack one."""
    kept = []
    dropped: Counter[str] = Counter()
    for line, values in rows:
        columns: dict[str, Any] = {}
        empty = None
        for column in (prompt_column, response_column):
            if column is None:
                continue
            text = _to_text(path, line, f'the field "{column}"', values.get(column))
            columns[column] = text
            if empty is None and not text.strip():
                empty = column
        if history_column is not None:
            columns[history_column] = _to_history(path, line, history_column, values)
        if empty is None:
            kept.append(Row(line, columns))
        else:
            dropped[f'empty "{empty}"'] += 1
    return Rows(kept, len(rows), dict(dropped))


def _to_text(path: Path, line: int, name: str, value: Any) -> str:
    """Return a field as text: null is "", a number its own digits (the JSON reader keeps them)."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            path,
            line,
            f"{name} is {_kind(value)}; make it a string (numbers may stay as they are).",
        )
    if value.isprintable():
        return value
    # Half of a surrogate pair, as in "\ud83d", is no character and can be written to no file.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _to_history(
    path: Path, line: int, column: str, values: dict[str, Any]
) -> tuple[tuple[str, str], ...]:
    """Return the earlier turns; a string (as in CSV) is read as JSON."""
    value = values.get(column)
    if isinstance(value, str):
        value = value.strip() and _parse_json(
            value, lambda problem: _history_error(path, line, column, problem)
        )
    if not value:
        return ()
    if not isinstance(value, list):
        raise _history_error(path, line, column, f"it is {_kind(value)}")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, list) or len(turn) != 2:
            size = f" of {len(turn)} items" if isinstance(turn, list) else ""
            raise _history_error(path, line, column, f"turn {index} is {_kind(turn)}{size}")
        name = f'turn {index} of the history "{column}"'
        turns.append((_to_text(path, line, name, turn[0]), _to_text(path, line, name, turn[1])))
    return tuple(turns)


def _history_error(path: Path, line: int, column: str, problem: str) -> DataError:
    return DataError(
        path,
        line,
        f'the history "{column}" has the wrong shape: {problem}; it must be a list of pairs '
        '[["question", "answer"], ...], or [].',
    )


def _read_objects(path: Path) -> Iterator[Row]:
    """Yield each row of the file as it stands, with the line it begins on."""
    suffix = path.suffix.lower()
    if suffix not in (*JSON_SUFFIXES, CSV_SUFFIX):
        raise DataError(
            path, None, f"the ending {suffix or '(none)'} is unknown; use .json, .jsonl or .csv."
        )
    text = _read_text(path)
    if suffix == CSV_SUFFIX:
        yield from _read_csv(path, text)
    elif text.lstrip().startswith("["):
        yield from _read_array(path, text)
    else:
        yield from _read_lines(path, text)


def _read_text(path: Path) -> str:
    """Read a whole file as UTF-8, with or without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            path, None, f"cannot be read ({error.strerror}); check the path and its permissions."
        ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(path, line, _explain_encoding(path, content)) from error


def _explain_encoding(path: Path, content: bytes) -> str:
    """Say which encoding the bytes look like, and the command that converts them."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        guess = "UTF-16"
    else:
        try:
            content.decode("gb18030")
            guess = "GB18030"
        except UnicodeDecodeError:
            return "not UTF-8, nor GBK or UTF-16; save the file again as UTF-8."
    looks = "GBK" if guess == "GB18030" else guess
    return (
        f"not UTF-8; it looks like {looks}. Convert it: "
        f"iconv -f {guess} -t UTF-8 {path} > {path.stem}-utf8{path.suffix}"
    )


def _read_lines(path: Path, text: str) -> Iterator[Row]:
    """Yield one object per line; blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Row(number, _as_object(path, number, _parse_line(path, number, line)))


def _parse_line(path: Path, number: int, line: str) -> Any:
    return _parse_json(
        line,
        lambda problem: DataError(
            path,
            number,
            f"broken JSON: {problem}; write one whole object per line, or one array of objects.",
        ),
    )


def _read_array(path: Path, text: str) -> Iterator[Row]:
    """Yield the objects of one JSON array, element by element, so that a fault has a line."""
    index, line = _skip_blank(text, text.index("[") + 1), 1
    counted = 0  # the lines of text[:counted] are in `line`
    closed = text[index : index + 1] == "]"
    while not closed:
        line += text.count("\n", counted, index)
        counted = index
        try:
            value, index = DECODER.raw_decode(text, index)
        except json.JSONDecodeError as error:
            raise DataError(
                path,
                error.lineno,
                f"broken JSON in the row that begins on line {line}: {error.msg} at column "
                f"{error.colno}; write an array of objects.",
            ) from error
        except RecursionError as error:
            raise DataError(path, line, "nested too deeply; write an array of objects.") from error
        yield Row(line, _as_object(path, line, value))
        index = _skip_blank(text, index)
        separator = text[index : index + 1]
        if separator not in (",", "]") or not separator:
            number = text.count("\n", 0, index) + 1
            raise DataError(path, number, "broken JSON: a comma or ] is due between or after rows.")
        closed = separator == "]"
        if not closed:
            index = _skip_blank(text, index + 1)
    end = _skip_blank(text, index + 1)
    if end != len(text):
        number = text.count("\n", 0, end) + 1
        raise DataError(path, number, "text after the end of the array; write one array only.")


def _skip_blank(text: str, index: int) -> int:
    while index < len(text) and text[index] in " \t\r\n":
        index += 1
    return index


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    """Yield the rows of a comma-separated file under the names of its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                path,
                number,
                f"broken CSV: {error}; put quotes around fields with commas or quotes.",
            ) from error
        if not fields:
            continue
        if header is None:
            header = fields
        elif len(fields) != len(header):
            raise DataError(
                path,
                number,
                f"{len(fields)} fields, but the first line names {len(header)}; put quotes around "
                "fields with commas.",
            )
        else:
            yield Row(number, dict(zip(header, fields, strict=True)))


def _parse_json(text: str, to_error: Callable[[str], DataError]) -> Any:
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise to_error(f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise to_error("nested too deeply") from error


def _as_object(path: Path, line: int, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise DataError(
        path,
        line,
        f'a row must be an object such as {{"content": "...", "summary": "..."}}, and this is '
        f"{_kind(value)}.",
    )


def _kind(value: Any) -> str:
    """Name a JSON value's kind in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", dict: "an object", list: "a list", str: "a string or a number"}
    return names[type(value)]
