"""Step 1a of 4: the text of a data file to rows as they stand, or `file:line: what is wrong`.

JSON may be one array or one object per line (ADGEN's .json files are the latter). A fault is
yielded and not raised, so that a caller may stop there or go on with the other lines.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

JSON_SUFFIXES = (".json", ".jsonl")
CSV_SUFFIX = ".csv"
# Keeps numbers as they were written, so that 1.50 stays "1.50".
DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


class DataError(ValueError):
    """A fault in a data file; its text is `file:line: what is wrong, what is needed`."""

    def __init__(self, path: Path | str, line: int | None, message: str, unit="line") -> None:
        """Keep the place beside the message; line is None when the whole file is meant."""
        self.path = Path(path)
        self.line = line
        place = f"{path}:{line}" if line is not None else f"{path}"
        if unit == "row" and line is not None:
            place = f"{path}, row {line}"
        super().__init__(f"{place}: {message}")


class Row(NamedTuple):
    """One checked row: its line in the file, and its columns as text (a history as pairs)."""

    line: int
    columns: dict[str, Any]
    unit: str = "line"

    def fault(self, path, message):
        return DataError(path, self.line, message, self.unit)


def iterate_rows(path: Path, text: str) -> Iterator[Row | DataError]:
    """Yield each row of a file's text as it stands, with the line it begins on, or what is wrong.

    After a fault the rows of the other lines follow; only an array that is broken ends there.
    """
    if path.suffix.lower() == CSV_SUFFIX:
        return _read_csv(path, text)
    if text.lstrip().startswith("["):
        return _read_array(path, text)
    return _read_lines(path, text)


def _read_lines(path: Path, text: str) -> Iterator[Row | DataError]:
    """Yield one object per line; blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                yield DataError(
                    path,
                    number,
                    f"broken JSON: {error}; write one whole object per line, or one array of "
                    "objects.",
                )
            else:
                yield _to_row(path, number, value)


def _read_array(path: Path, text: str) -> Iterator[Row | DataError]:
    """Yield the objects of one JSON array, element by element, so that a fault has a line."""
    try:
        yield from _read_elements(path, text)
    except DataError as error:  # where the next element begins is not known any more
        yield error


def _read_elements(path: Path, text: str) -> Iterator[Row | DataError]:
    """Yield the elements of an array; raise DataError where it is no array any more."""
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
                f"broken JSON in the row that begins on line {line}: {_say_fault(error)}; write an "
                "array of objects.",
            ) from error
        except RecursionError as error:
            raise DataError(path, line, "nested too deeply; write an array of objects.") from error
        yield _to_row(path, line, value)
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


def _read_csv(path: Path, text: str) -> Iterator[Row | DataError]:
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
            yield DataError(
                path,
                number,
                f"broken CSV: {error}; put quotes around fields with commas or quotes.",
            )
            if header is None:
                return  # no names, no columns
            continue
        if not fields:
            continue
        if header is None:
            header = fields
        elif len(fields) != len(header):
            yield DataError(
                path,
                number,
                f"{len(fields)} fields, but the first line names {len(header)}; put quotes around "
                "fields with commas.",
            )
        else:
            yield Row(number, dict(zip(header, fields, strict=True)))


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
    return f"{error.msg}{place} column {error.colno}"


def _to_row(path: Path, line: int, value: Any) -> Row | DataError:
    if isinstance(value, dict):
        return Row(line, value)
    return DataError(
        path,
        line,
        f'a row must be an object such as {{"content": "...", "summary": "..."}}, and this is '
        f"{kind_of(value)}.",
    )


def kind_of(value: Any) -> str:
    """Name a JSON value's kind in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", dict: "an object", list: "a list", str: "a string or a number"}
    return names[type(value)]


class DataFile:
    def __init__(self, path):
        from ptuning.data.encoding import decode_text

        self.path = path
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(
                path,
                None,
                f"cannot be read ({error.strerror}) at {path.absolute()}; check the path and its permissions.",
            ) from error
        if raw[:2] == b"\x1f\x8b":
            import gzip

            raw = gzip.decompress(raw)
            self.path_ = path.with_suffix("")
        else:
            self.path_ = path
        self.text = decode_text(raw)
        self.encoding_fault = None
        if self.text.first_foreign_line is not None:
            self.encoding_fault = DataError(path, self.text.first_foreign_line, "not UTF-8")
        self.notes = []
        self.unit = "line" if self.text.text.strip().count("\n") else "row"
        self.no_rows = "no rows; write one JSON object per line, or a JSON array."

    def rows(self):
        n = 0
        for item in iterate_rows(self.path_, self.text.text):
            n += 1
            if isinstance(item, Row) and self.unit == "row":
                item = item._replace(line=n, unit="row")
            yield item


def open_data(path):
    return DataFile(path)
