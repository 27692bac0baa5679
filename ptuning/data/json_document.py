"""One JSON value that is a whole file, to the rows that it holds in another order.

The layouts are those of pandas' `DataFrame.to_json(orient=...)` and of rows under a name, as in
{"version": "1", "data": [...]}. Source: https://pandas.pydata.org/docs/user_guide/io.html#json.
"""

import re
from typing import Any

from ptuning.data.raw_row import TEXT_NAMES, TURN_NAMES, shown

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
