"""The files a prediction run leaves: `generated_predictions.txt` and `predict_results.json`.

Predictions have the published format, one JSON line {"labels", "predict"} per row in row order.
They reach the file as rows finish, so a run that was stopped goes on where it ended. A state file
beside them holds the caller's fingerprint of everything that shapes an answer (data, model, prefix,
decoding); rows made under another fingerprint are never mixed with new ones.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from ptuning.atomic_file import write_atomically

PREDICTIONS_NAME = "generated_predictions.txt"
RESULTS_NAME = "predict_results.json"
STATE_VERSION = 1

logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """One finished row: the answer that was wanted and the one that was generated."""

    label: str
    prediction: str


class PredictionFile:
    """`generated_predictions.txt`, open for the rows that are still missing.

    `finished` holds the rows found at opening, in row order: generate from row `len(finished)` on.
    An earlier run's file is replaced when the first new row is written, or at closing when there
    was none, so a run that fails before its first answer costs nobody the old ones. One process
    writes at a time.
    """

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        """Open for rows made under `fingerprint`, and find those that are already there."""
        self.path = path
        self.state_path = path.with_name(f"{path.stem}.state.json")
        self.fingerprint = fingerprint
        self.finished: list[Prediction] = []
        self._waiting: dict[int, Prediction] = {}
        self._file: BinaryIO | None = None
        if path.is_file() and _read_fingerprint(self.state_path) == fingerprint:
            self._resume()
        self.next_index = len(self.finished)

    def __enter__(self) -> Self:
        """Return the file itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; after an error, without asking whether rows are missing."""
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def add(self, index: int, label: str, prediction: str) -> None:
        """Write row `index`, counted from 0, or hold it until the rows before it have come.

        Rows that are held are lost if the run is stopped: keep the window of rows in flight small.
        """
        if index < self.next_index or index in self._waiting:
            raise ValueError(
                f"Row {index} was added twice to {self.path.name}; the next row it needs is "
                f"{self.next_index}. Start generating from row len(finished)."
            )
        self._waiting[index] = Prediction(label, prediction)
        while self.next_index in self._waiting:
            self._write(self._waiting.pop(self.next_index))
            self.next_index += 1

    def restart(self) -> None:
        """Forget the finished rows: the file is replaced when the first new row is written."""
        self.finished = []
        self.next_index = 0

    def close(self) -> None:
        """Finish the file; every row up to the highest one added must have come."""
        self._open_file().close()
        if self._waiting:
            raise ValueError(
                f"Row {self.next_index} of {self.path.name} never came, so {len(self._waiting)} "
                f"later rows were not written. Run again to go on from row {self.next_index}."
            )

    def _write(self, row: Prediction) -> None:
        line = json.dumps({"labels": row.label, "predict": row.prediction}, ensure_ascii=False)
        file = self._open_file()
        # Half of a surrogate pair has no UTF-8 form; its backslash form is its JSON escape.
        file.write(line.encode("utf-8", "backslashreplace") + b"\n")
        file.flush()

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            if not self.finished:
                self._start_anew()
            self._file = self.path.open("ab")
        return self._file

    def _start_anew(self) -> None:
        """Empty the file and claim it; without a state file, half-way, it belongs to nobody."""
        self.state_path.unlink(missing_ok=True)
        write_atomically(self.path, b"")
        state = {"version": STATE_VERSION, "fingerprint": self.fingerprint}
        write_atomically(self.state_path, _json_bytes(state))

    def _resume(self) -> None:
        """Take over the whole rows and cut off whatever follows them."""
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
                "%s: cut off %d bytes after row %d, which a stopped run left unfinished.",
                self.path.name,
                len(content) - kept_bytes,
                len(self.finished),
            )


def write_results(path: Path, metrics: Mapping[str, float | int | str | None]) -> None:
    """Write `predict_results.json`, keys sorted; a number JSON cannot hold (NaN) becomes null."""
    finite = {name: None if _is_not_finite(value) else value for name, value in metrics.items()}
    write_atomically(path, _json_bytes(finite))


def _read_fingerprint(state_path: Path) -> str | None:
    """Return the fingerprint a predictions file belongs to; None if nobody can tell."""
    if not state_path.is_file():
        return None
    try:
        state = json.loads(state_path.read_bytes())
    except ValueError:
        logger.warning("%s is not JSON; the predictions beside it start anew.", state_path)
        return None
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        return None
    fingerprint = state.get("fingerprint")
    return fingerprint if isinstance(fingerprint, str) else None


def _parse_line(line: bytes) -> Prediction | None:
    """Return the row a line holds, None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:  # broken JSON or broken UTF-8
        return None
    if not isinstance(row, dict):
        return None
    label, prediction = row.get("labels"), row.get("predict")
    if not isinstance(label, str) or not isinstance(prediction, str):
        return None
    return Prediction(label, prediction)


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _json_bytes(content: Mapping[str, object]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, indent=4, sort_keys=True)
    return text.encode("utf-8", "backslashreplace") + b"\n"
