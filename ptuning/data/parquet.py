"""Step 1b of 5 for Parquet: the bytes of a file to rows, through pyarrow.

Values become what the JSON of the same rows would hold: numbers their digits, NaN and null None.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptuning.data.raw_row import DataError, Row, Skipped, shown


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


def read_parquet(path: Path, content: bytes, skipped: Skipped) -> Iterator[Row | DataError]:
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
                yield Row(number, {name: _as_json(value) for name, value in row.items()}, "row")
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
