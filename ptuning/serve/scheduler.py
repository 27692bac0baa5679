"""The one thread that owns the model: requests come in from any thread, tokens go out to theirs."""

import logging
import threading
from collections.abc import Callable

from ptuning.engine.engine import Engine
from ptuning.engine.request import FinishReason, Request, Row
from ptuning.engine.sampling import TokenLogprob

logger = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """More requests wait than are allowed to."""


class SessionClosedError(RuntimeError):
    """Nothing is answered any more."""


class EngineError(RuntimeError):
    """The computation of a request failed; the cause is attached."""


class Ticket:
    """One request on its way; its tokens may be read from any thread."""

    def __init__(self, row: Row, on_progress: Callable[[bool], None] | None) -> None:
        self.row = row
        self.error: BaseException | None = None
        self._on_progress = on_progress
        self._changed = threading.Condition()
        self._num_tokens = 0
        self._finish_reason: FinishReason | None = None

    def progress(self) -> tuple[int, FinishReason | None]:
        """Return how many tokens there are, and why it ended if it did.

        EngineError when the computation failed.
        """
        with self._changed:
            if self.error is not None:
                raise EngineError(f"the answer could not be computed: {self.error}") from self.error
            return self._num_tokens, self._finish_reason

    def wait(self, num_seen: int, timeout_s: float | None) -> None:
        """Wait until there are more than num_seen tokens, or the end, or timeout_s seconds."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._num_tokens > num_seen or self._finish_reason is not None, timeout_s
            )

    def logprobs(self, num_tokens: int) -> list[TokenLogprob]:
        """Return those of the first num_tokens tokens; none where they were not asked for."""
        return self.row.logprobs[:num_tokens]

    def publish(self, error: BaseException | None = None) -> None:
        """Show what the engine did to the row; called by the engine's thread."""
        with self._changed:
            self.error = error
            self._num_tokens = len(self.row.answer)
            self._finish_reason = "cancelled" if error is not None else self.row.finish_reason
            self._changed.notify_all()
        if self._on_progress is not None:
            self._on_progress(self._finish_reason is not None)


def check_queue(num_unfinished: int, max_rows: int, max_queue: int | None) -> None:
    """Refuse one more request (QueueFullError) where as many wait as may; None: any number may."""
    if max_queue is not None and num_unfinished >= max_rows + max_queue:
        raise QueueFullError(
            f"{max_rows} requests are being answered and {max_queue} wait, which is as many as "
            "may; try again later."
        )


class Scheduler:
    """Runs an engine in a thread of its own, which starts with the first request."""

    def __init__(self, engine: Engine, *, max_queue: int | None = None) -> None:
        """Refuse requests while max_queue of them wait; None accepts any number."""
        self.engine = engine
        self.max_queue = max_queue
        self.after_step: Callable[[], None] | None = None  # called by the engine's thread
        self.num_tokens = 0  # generated since the start
        self._num_unfinished = 0
        self._tickets: dict[Row, Ticket] = {}  # of the engine's thread
        self._inbox: list[Ticket] = []
        self._cancelled: list[Ticket] = []
        self._is_to_release = False
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Requests that are not being decoded yet."""
        return max(self._num_unfinished - self.num_rows, 0)

    @property
    def num_rows(self) -> int:
        """Requests being decoded now."""
        return len(self.engine.rows)

    def submit(self, request: Request, on_progress: Callable[[bool], None] | None = None) -> Ticket:
        """Queue a request; on_progress(finished) is called in the engine's thread.

        QueueFullError when too many wait.
        """
        ticket = Ticket(self.engine.new_row(request), on_progress)
        with self._wake:
            if self._is_closed:
                raise SessionClosedError("the session is closed; load a new one.")
            check_queue(self._num_unfinished, self.engine.max_rows, self.max_queue)
            self._inbox.append(ticket)
            self._num_unfinished += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop computing a request; a finished one stays as it is."""
        with self._wake:
            self._cancelled.append(ticket)
            self._wake.notify()

    def release(self) -> None:
        """Have the engine give back what it keeps for requests to come, say a prefix's."""
        with self._wake:
            self._is_to_release = self._thread is not None
            self._wake.notify()

    def close(self) -> None:
        """End the thread; what is not finished is cancelled."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while self._take_in():
            try:
                moved = self.engine.step()
            except Exception as error:  # whoever waits for a row gets it
                logger.exception("a decoding step failed; its %d rows are lost", len(self._tickets))
                self._end_all(error)
            else:
                for row in moved:
                    self.num_tokens += 1
                    self._publish(row)
            self._tell()
        self._end_all(None)
        self._tell()

    def _tell(self) -> None:
        if self.after_step is not None:
            self.after_step()

    def _take_in(self) -> bool:
        """Wait for work and hand it to the engine; False when closed."""
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._is_closed
                    or self._inbox
                    or self._cancelled
                    or self._is_to_release
                    or not self.engine.is_idle
                )
            )
            is_to_release, self._is_to_release = self._is_to_release, False
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            for ticket in inbox:
                self._tickets[ticket.row] = ticket
                self.engine.add_row(ticket.row)
        if is_to_release:
            self.engine.release()
        for ticket in cancelled:
            if ticket.row in self._tickets:
                self.engine.cancel(ticket.row)
                self._publish(ticket.row)
        return not self._is_closed

    def _publish(self, row: Row) -> None:
        ticket = self._tickets[row]
        if row.finish_reason is not None:
            self._forget(row)
        ticket.publish()

    def _forget(self, row: Row) -> None:
        del self._tickets[row]
        with self._wake:
            self._num_unfinished -= 1

    def _end_all(self, error: BaseException | None) -> None:
        """Take every row out: after a failure, or when closing."""
        self.engine.cancel_all()
        for ticket in list(self._tickets.values()):
            ticket.row.finish_reason = "cancelled"
            self._forget(ticket.row)
            ticket.publish(error)
