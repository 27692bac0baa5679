"""The files a prediction run leaves: `generated_predictions.txt` and `predict_results.json`.

Predictions have the published format, one JSON line {"labels", "predict"} per row in row order.
They are written as rows finish, so a stopped run resumes where it ended. A state file next to them
holds a fingerprint of everything that determines an answer (data, model, prefix, decoding), so that
rows of another run are never mixed with new ones.
"""

import json
import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ptuning.storage import write_atomically

PREDICTIONS_NAME = "generated_predictions.txt"
RESULTS_NAME = "predict_results.json"
STATE_VERSION = 1

logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """One row's reference answer and generated answer."""

    label: str
    prediction: str


class PredictionFile(AbstractContextManager["PredictionFile"]):
    """`generated_predictions.txt`, open for the missing rows.

    `finished` holds the rows found on opening: generate from row `len(finished)` on. Another run's
    file is replaced when the first new row is written, or on closing if there is none, so a run
    that fails before its first answer keeps the old rows. One process writes at a time.
    """

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        """Open for rows of this fingerprint, and read those that are already there."""
        self.path = path
        self.state_path = path.with_name(f"{path.stem}.state.json")
        self.finished: list[Prediction] = []
        self._waiting: dict[int, Prediction] = {}
        self._file: BinaryIO | None = None
        self._state = {"version": STATE_VERSION, "fingerprint": fingerprint}
        if path.is_file() and self._has_our_state():
            self._resume()
        self.next_index = len(self.finished)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; after an error, without checking for missing rows."""
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def add(self, index: int, label: str, prediction: str) -> None:
        """Write row `index` (from 0), or hold it until the rows before it have arrived.

        Held rows are lost if the run is stopped.
        """
        self._waiting[index] = Prediction(label, prediction)
        while self.next_index in self._waiting:
            self._write(self._waiting.pop(self.next_index))
            self.next_index += 1

    def restart(self) -> None:
        """Drop the finished rows: the first new row replaces the file."""
        self.finished = []
        self.next_index = 0

    def close(self) -> None:
        """Finish the file; every row up to the highest one added must be there."""
        self._open_file().close()
        assert not self._waiting, f"row {self.next_index} of {self.path.name} was added once"

    def _write(self, row: Prediction) -> None:
        line = json.dumps({"labels": row.label, "predict": row.prediction}, ensure_ascii=False)
        file = self._open_file()
        # Half of a surrogate pair has no UTF-8 form; its backslash form is its JSON escape.
        file.write(line.encode("utf-8", "backslashreplace") + b"\n")
        file.flush()

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            if not self.finished:
                self._start_over()
            self._file = self.path.open("ab")
        return self._file

    def _start_over(self) -> None:
        """Empty the file, then write its state: a file without a state belongs to no run."""
        self.state_path.unlink(missing_ok=True)
        write_atomically(self.path, b"")
        write_atomically(self.state_path, _json_bytes(self._state))

    def _has_our_state(self) -> bool:
        try:
            return bool(json.loads(self.state_path.read_bytes()) == self._state)
        except FileNotFoundError:
            return False
        except ValueError:
            logger.warning("%s is not JSON; its predictions will be regenerated.", self.state_path)
            return False

    def _resume(self) -> None:
        """Read the complete rows and truncate the file after them."""
        content = self.path.read_bytes()
        kept_bytes = 0
        for line in content.splitlines(keepends=True):
            row = _parse_line(line) if line.endswith(b"\n") else None
            if row is None:
                break
            self.finished.append(row)
            kept_bytes += len(line)
        if kept_bytes < len(content):
            with self.path.open("r+b") as file:
                file.truncate(kept_bytes)
            logger.warning(
                "%s: removed %d bytes of an unfinished row after row %d.",
                self.path.name,
                len(content) - kept_bytes,
                len(self.finished),
            )


def write_results(path: Path, metrics: Mapping[str, float | int | str | None]) -> None:
    """Write `predict_results.json` with sorted keys; NaN and infinity become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    write_atomically(path, _json_bytes(finite))


def _parse_line(line: bytes) -> Prediction | None:
    """Return the row in a line; None for broken JSON or UTF-8, or another object."""
    try:
        row: Any = json.loads(line)
        return Prediction(row["labels"], row["predict"])
    except (ValueError, TypeError, KeyError):
        return None


def _json_bytes(content: Mapping[str, object]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, indent=4, sort_keys=True)
    return text.encode("utf-8", "backslashreplace") + b"\n"
