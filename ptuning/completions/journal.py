"""What is finished of a long run, saved line by line: a killed run continues with the rest."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ptuning.completions.source import Completion
from ptuning.output import first_line
from ptuning.storage import lock_file

logger = logging.getLogger(__name__)


class Journal:
    """The completions of a run: a line of what it must share to be continued, then one for each."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], *, adopted: Collection[str] = ()
    ) -> None:
        """Read what is there; ValueError if it is of another run, or another one is writing.

        adopted are names whose earlier values are taken, as is a larger concurrency.
        """
        self.completions: dict[tuple[int, int], Completion] = {}  # by request and stage
        self.num_tokens = 0
        self.identity = dict(json.loads(to_line(identity)))  # its tuples become lists
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
        if not lines:  # nothing was completed
            self._write(self.identity)
            return
        try:
            earlier = dict(json.loads(begun))
            for line in lines:
                request, stage, *values = json.loads(line)
                if values[0] is not None:  # a malformed reply is asked for again
                    self._keep(request, stage, Completion(*values))
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"{path} is damaged ({first_line(error)}); delete it, or give another --out."
            ) from error
        larger = ["concurrency"] if earlier.get("concurrency", 0) > identity["concurrency"] else []
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

    def add(self, request: int, stage: int, completion: Completion) -> None:
        """Save a completion."""
        self._keep(request, stage, completion)
        self._write([request, stage, *completion])

    def _keep(self, request: int, stage: int, completion: Completion) -> None:
        self.completions[request, stage] = completion
        self.num_tokens += completion.prompt_tokens + completion.completion_tokens

    def _write(self, value: Any) -> None:
        self._file.write(to_line(value))
        self._file.flush()


def to_line(value: Any) -> bytes:
    """Return a JSON value as one line; half a surrogate pair is escaped."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
