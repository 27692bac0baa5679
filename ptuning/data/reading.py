"""Step 1 of 4: a data file to checked rows, or `file:line: what is wrong, what is needed`.

Nothing is left out silently: a row without a prompt or an answer is dropped and counted with its
reason. Every other fault ends the reading; `check` goes on after it.
"""

import difflib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ptuning.data.encoding import UTF_8, DecodedText, conversion_command, decode_text
from ptuning.data.formatting import RowFormat
from ptuning.data.parsing import (
    CSV_SUFFIX,
    JSON_SUFFIXES,
    DataError,
    Row,
    iterate_rows,
    kind_of,
    parse_json,
)

# Names that people give the two columns, most usual first; a guess where no name is similar.
PROMPT_NAMES = ("content", "prompt", "question", "instruction", "query", "input")
RESPONSE_NAMES = ("summary", "response", "answer", "output", "completion", "target")


class Rows(NamedTuple):
    """What a file held: the rows kept, how many were read, and why the others were dropped."""

    kept: list[Row]
    num_read: int
    dropped: dict[str, int]


def read_rows(path: Path | str, row_format: RowFormat, *, max_rows: int | None = None) -> Rows:
    """Read and check the columns of row_format in a .json, .jsonl or .csv file.

    max_rows stops after that many rows, dropped ones included; None reads all. Raises DataError for
    everything a file can get wrong.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(
            f"the number of rows to read is {max_rows}; use 1 or more, or leave it out."
        )
    path = Path(path)
    decoded = read_text(path)
    if decoded.first_foreign_line is not None:
        message = "not UTF-8, nor GBK or UTF-16; save the file again as UTF-8."
        if decoded.encoding != UTF_8:
            command = conversion_command(path, decoded.encoding)
            message = f"not UTF-8; it looks like {decoded.encoding}. Convert it: {command}"
        raise DataError(path, decoded.first_foreign_line, message)
    raw_rows = []
    for item in iterate_rows(path, decoded.text):
        if isinstance(item, DataError):
            raise item
        raw_rows.append(item)
        if len(raw_rows) == max_rows:
            break
    if not raw_rows:
        raise DataError(path, None, "no rows; write one JSON object per line, or a JSON array.")
    _check_columns(path, raw_rows, row_format.columns)
    kept = []
    dropped: Counter[str] = Counter()
    for row in raw_rows:
        columns, empty = to_fields(path, row, row_format)
        if empty is None:
            kept.append(Row(row.line, columns))
        else:
            dropped[f'empty "{empty}"'] += 1
    return Rows(kept, len(raw_rows), dict(dropped))


def guess_column(wanted: str, found: Iterable[str], usual: tuple[str, ...] = ()) -> str | None:
    """Return the column that was probably meant; None where no name is similar or usual.

    >>> guess_column("content", ["contents", "title"])
    'contents'
    >>> guess_column("content", ["answer", "question"], PROMPT_NAMES)
    'question'
    """
    by_lower = {name.strip().lower(): name for name in reversed(list(found))}
    similar = difflib.get_close_matches(wanted.lower(), by_lower, n=1)
    known = [name for name in usual if name in by_lower]
    best = (similar or known)[:1]
    return by_lower[best[0]] if best else None


def _check_columns(path: Path, rows: list[Row], columns: dict[str, str]) -> None:
    """Refuse a column that no row has; one that only some rows lack drops those rows later."""
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(row.columns))
    for flag, column in columns.items():
        if column not in found:
            names = ", ".join(found) or "none"
            guess = guess_column(column, found)
            meant = f' Was "{guess}" meant?' if guess is not None else ""
            raise DataError(
                path,
                rows[0].line,
                f'no column "{column}"; the columns here are: {names}.{meant} Name the right one '
                f"with {flag}.",
            )


def to_fields(path: Path, row: Row, row_format: RowFormat) -> tuple[dict[str, Any], str | None]:
    """Return the named columns of a row as text, and the first that is empty though needed.

    DataError where one is neither text nor a number.
    A column that the row lacks is empty; so is one that holds null or blanks only.
    """
    columns: dict[str, Any] = {}
    empty = None
    for column in (row_format.prompt_column, row_format.response_column):
        if column is None:
            continue
        text = _to_text(path, row.line, f'the field "{column}"', row.columns.get(column))
        columns[column] = text
        if empty is None and not text.strip():
            empty = column
    column = row_format.history_column
    if column is not None:
        columns[column] = _to_history(path, row.line, column, row.columns.get(column))
    return columns, empty


def _to_text(path: Path, line: int, name: str, value: Any) -> str:
    """Return a field as text: null is "", a number its own digits (the JSON reader keeps them)."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            path,
            line,
            f"{name} is {kind_of(value)}; make it a string (numbers may stay as they are).",
        )
    if value.isprintable():
        return value
    # Half of a surrogate pair, as in "\ud83d", is no character and can be written to no file.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _to_history(path: Path, line: int, column: str, value: Any) -> tuple[tuple[str, str], ...]:
    """Return the earlier turns; a string (as in CSV) is read as JSON."""

    def error(problem: str) -> DataError:
        return DataError(
            path,
            line,
            f'the history "{column}" has the wrong shape: {problem}; it must be a list of pairs '
            '[["question", "answer"], ...], or [].',
        )

    if isinstance(value, str):
        try:
            value = value.strip() and parse_json(value)
        except ValueError as problem:
            raise error(str(problem)) from problem
    if not value:
        return ()
    if not isinstance(value, list):
        raise error(f"it is {kind_of(value)}")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, list) or len(turn) != 2:
            size = f" of {len(turn)} items" if isinstance(turn, list) else ""
            raise error(f"turn {index} is {kind_of(turn)}{size}")
        name = f'turn {index} of the history "{column}"'
        turns.append((_to_text(path, line, name, turn[0]), _to_text(path, line, name, turn[1])))
    return tuple(turns)


def read_text(path: Path) -> DecodedText:
    """Read a whole file in the encoding it seems to have; DataError where there is none to read."""
    suffix = path.suffix.lower()
    if suffix not in (*JSON_SUFFIXES, CSV_SUFFIX):
        raise DataError(
            path, None, f"the ending {suffix or '(none)'} is unknown; use .json, .jsonl or .csv."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    return decode_text(content)


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the DataError for a file that the operating system does not let be read."""
    return DataError(
        path,
        None,
        f"cannot be read ({error.strerror}) at {path.absolute()}; check the path and its "
        "permissions.",
    )
