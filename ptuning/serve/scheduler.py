"""The engine's thread: requests arrive from any thread, new tokens leave through callbacks."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ptuning.engine.engine import Engine
from ptuning.engine.request import FinishReason, Row, TokenLogprob

logger = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """The queue holds as many waiting requests as allowed."""


class SessionClosedError(RuntimeError):
    """The session no longer answers."""


class EngineError(RuntimeError):
    """The computation of a request failed; the cause is attached."""


class RowUpdate(NamedTuple):
    """What one decoding step added to an answer."""

    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob]
    finish_reason: FinishReason | None
    error: Exception | None = None


OnUpdate = Callable[[RowUpdate], None]  # called in the engine's thread


class TokenBuffer:
    """The tokens of one answer: written by the engine's thread, read by any other."""

    def __init__(self, on_progress: Callable[[bool], None] | None = None) -> None:
        """on_progress(finished) is called by the writing thread after every update."""
        self.logprobs: list[TokenLogprob] = []
        self._tokens: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._on_progress = on_progress

    def update(self, new: RowUpdate) -> None:
        """Append new tokens and wake the readers."""
        with self._changed:
            self._tokens += new.tokens
            self.logprobs += new.logprobs
            self._finish_reason, self._error = new.finish_reason, new.error
            self._changed.notify_all()
        if self._on_progress is not None:
            self._on_progress(new.finish_reason is not None)

    def read(self, start: int) -> tuple[list[int], FinishReason | None]:
        """Return the tokens from `start` on, and the finish reason of a complete answer.

        EngineError when the computation failed.
        """
        with self._changed:
            if self._error is not None:
                raise EngineError(
                    f"the answer could not be computed: {self._error}"
                ) from self._error
            return self._tokens[start:], self._finish_reason

    def wait(self, num_seen: int, timeout_s: float | None) -> None:
        """Wait for more than num_seen tokens, the end of the answer, or the timeout."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._tokens) > num_seen or self._finish_reason is not None, timeout_s
            )


@dataclass
class _Job:
    """A submitted row, and how many of its tokens have been reported."""

    row: Row
    on_update: OnUpdate
    num_reported: int = 0


def check_queue(num_unfinished: int, max_rows: int, max_queue: int | None) -> None:
    """Raise QueueFullError if max_queue requests wait already; None means no limit."""
    if max_queue is not None and num_unfinished >= max_rows + max_queue:
        raise QueueFullError(
            f"{max_rows} requests are being answered and {max_queue} wait, which is the limit; "
            "try again later."
        )


class Scheduler:
    """Runs an engine in a thread, which starts with the first request."""

    def __init__(self, engine: Engine, *, max_queue: int | None = None) -> None:
        """Refuse a request while max_queue others wait; None means no limit."""
        self.engine = engine
        self.max_queue = max_queue
        self.after_step: Callable[[], None] = lambda: None  # called in the engine's thread
        self.num_tokens = 0  # generated since the start
        self._jobs: dict[Row, _Job] = {}  # known to the engine; changed by its thread only
        self._wake = threading.Condition()  # guards the following
        self._inbox: list[_Job] = []
        self._cancelled: list[Row] = []
        self._release_requested = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def num_rows(self) -> int:
        """Requests being decoded."""
        return len(self.engine.rows)

    @property
    def num_waiting(self) -> int:
        """Requests that are not being decoded yet."""
        return max(self._num_unfinished - self.num_rows, 0)

    @property
    def _num_unfinished(self) -> int:
        with self._wake:
            return len(self._inbox) + len(self._jobs)

    def submit(self, row: Row, on_update: OnUpdate) -> None:
        """Queue a row of the engine; QueueFullError when too many wait."""
        with self._wake:
            if self._is_closed:
                raise SessionClosedError("the session is closed; load a new one.")
            check_queue(self._num_unfinished, self.engine.max_rows, self.max_queue)
            self._inbox.append(_Job(row, on_update))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._wake.notify()

    def cancel(self, row: Row) -> None:
        """Cancel a row; no effect on a finished one."""
        with self._wake:
            self._cancelled.append(row)
            self._wake.notify()

    def release(self) -> None:
        """Have the engine free what it caches for future requests, such as a removed prefix."""
        with self._wake:
            self._release_requested = self._thread is not None
            self._wake.notify()

    def close(self) -> None:
        """End the thread; unfinished requests are cancelled. Callbacks may call this too."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while self._process_inbox():
            try:
                moved = self.engine.step()
            except Exception as error:  # reported to every request in the engine
                logger.exception("decoding failed; %d requests are lost", len(self._jobs))
                self._end_all(error)
            else:
                self.num_tokens += len(moved)
                for row in moved:
                    self._report(row)
            self.after_step()
        self._end_all(None)
        self.after_step()

    def _process_inbox(self) -> bool:
        """Wait for work and pass it to the engine; return False once closed."""
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._is_closed
                    or self._inbox
                    or self._cancelled
                    or self._release_requested
                    or not self.engine.is_idle
                )
            )
            release, self._release_requested = self._release_requested, False
            cancelled, self._cancelled = self._cancelled, []
            for job in self._inbox:
                self._jobs[job.row] = job
                self.engine.add_row(job.row)
            self._inbox.clear()
        if release:
            self.engine.release()
        for row in cancelled:
            if row in self._jobs:
                self.engine.cancel(row)
                self._report(row)
        return not self._is_closed

    def _report(self, row: Row, error: Exception | None = None) -> None:
        job = self._jobs[row]
        if row.finish_reason is not None:
            del self._jobs[row]
        start, job.num_reported = job.num_reported, len(row.answer)
        job.on_update(RowUpdate(row.answer[start:], row.logprobs[start:], row.finish_reason, error))

    def _end_all(self, error: Exception | None) -> None:
        """Take every row out of the engine, after a failure or on closing."""
        self.engine.cancel_all()
        for row in list(self._jobs):
            row.finish_reason = "cancelled"
            self._report(row, error)
