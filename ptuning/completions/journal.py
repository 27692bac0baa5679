"""What is finished of a long run, saved line by line, so that a killed run continues with the rest.

The file is JSON lines: an object of what a run must share with this one to continue it, then a
list for each finished item, its key first.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptuning.output import Progress, first_line
from ptuning.storage import lock_file

logger = logging.getLogger(__name__)


class Journal:
    """The journal of one run, locked until the process ends.

    identity: what this run shares with the one that it continues.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        keep: Callable[..., object],
        *,
        adopted: Collection[str] = (),
        at_least: Collection[str] = (),
    ) -> None:
        """Hand what is there to keep; ValueError if it is of another run, or one is writing.

        keep takes the values of a line and refuses others (TypeError): scores.__setitem__ fills a
        dict from lines [key, score]. Of the identity, adopted are names whose earlier values are
        taken, and at_least those whose larger ones are.
        """
        self.identity = dict(json.loads(to_line(identity)))  # its tuples become lists
        self._keep = keep
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            lock_file(self._file.fileno())
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"another process is writing {path}; wait for it.") from error
        except OSError:
            logger.warning("%s has no locks: write to it from one process only", path.parent)
        self._file.seek(0)
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1  # the last line of a killed run may be incomplete
        begun, *lines = whole[:end].splitlines() or [b""]
        self._file.truncate(end if lines else 0)
        if not lines:  # nothing was finished
            self._write(self.identity)
            return
        try:
            earlier = dict(json.loads(begun))
            for line in lines:
                keep(*json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({first_line(error)}); delete it, or give another --out."
            ) from error
        larger = [name for name in at_least if earlier.get(name, 0) > self.identity[name]]
        self.identity |= {name: earlier.get(name) for name in (*adopted, *larger)}
        other = [name for name, value in self.identity.items() if earlier.get(name) != value]
        if other:
            was, now = (
                ", ".join(f"{name} {one.get(name)}" for name in other)
                for one in (earlier, self.identity)
            )
            raise ValueError(
                f"{path} is of a run with other settings ({was[:200]}; now {now[:200]}); type the "
                "command of that run to continue it, or give another --out."
            )

    def add(self, *values: Any) -> None:
        """Keep and save a finished item."""
        self._keep(*values)
        self._write(values)

    def _write(self, value: Any) -> None:
        self._file.write(to_line(value))
        self._file.flush()


def saved_scores(
    path: Path,
    identity: Mapping[str, Any],
    keys: Sequence[str],
    score: Callable[[list[int]], Iterator[tuple[int, float | None]]],
    title: str,
) -> dict[str, float]:
    """Return the scores of keys, with those that an earlier run saved in a journal.

    score takes the indices of the missing keys and yields (place among them, score); one that is
    None or not finite is not kept, and asked for again by the next run.
    """
    found: dict[str, float] = {}
    journal = Journal(path, identity, found.__setitem__)
    missing = [index for index, key in enumerate(keys) if key not in found]
    with Progress(len(keys), title, initial=len(keys) - len(missing)) as progress:
        for place, value in score(missing):
            if value is not None and math.isfinite(value):
                journal.add(keys[missing[place]], value)
            progress.update()
    return found


def digest(value: Any) -> str:
    """Return a hash of a JSON value: the key of something that is scored, or a settings' name."""
    return hashlib.sha256(to_line(value)).hexdigest()[:16]


def to_line(value: Any) -> bytes:
    """Return a JSON value as one line; half a surrogate pair is escaped."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
