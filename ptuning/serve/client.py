"""A session whose model computes in a process of its own, so that HTTP does not slow it down.

Python runs one thread of a process at a time, and decoding gives way at every operation: with 32
clients of a small model, more time went to taking turns than to the answers themselves. Here only
messages pass between the two: a request one way, after each decoding step its tokens the other.
The process ends with its front, however that ends; where it ends first, every answer says so.
It is spawned, so a script that loads one does so under `if __name__ == "__main__":`.
"""

import logging
import multiprocessing
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.request import Request, Row
from ptuning.serve.scheduler import SessionClosedError, Ticket, check_queue
from ptuning.serve.session import Load, NamedPrefix, SessionFront, Weighted
from ptuning.serve.session_messages import (
    AddPrefix,
    Close,
    Loaded,
    Progress,
    RemovePrefix,
    Result,
    RowProgress,
    Start,
    Stop,
)
from ptuning.serve.worker import LOADING, run
from ptuning.tunings.loading import find_model, load_tokenizer

END_S = 10.0  # how long a decoding step may still take when the session is closed


class EndedProcessError(SessionClosedError, ChildProcessError):
    """The process with the model is gone, though nobody closed the session."""


class SessionProcess(SessionFront[NamedPrefix]):
    """The front of a session in another process."""

    def __init__(
        self,
        link: "_Link",
        tokenizer: ChatGLMTokenizer,
        loaded: Loaded,
        *,
        max_rows: int,
        max_queue: int | None,
    ) -> None:
        """Take over a process that has loaded its model; `load` starts one."""
        super().__init__(tokenizer, context_length=loaded.context_length, tuned=loaded.tuned)
        self._link = link
        self._max_rows, self._max_queue = max_rows, max_queue

    @classmethod
    def load(
        cls, model: str, *, max_rows: int, max_queue: int | None = None, **options: Any
    ) -> Self:
        """Start a process that loads `Session.load(model, **options)`, and wait until it has.

        What `Session.load` refuses is raised here too. EndedProcessError when it ends meanwhile.
        """
        link = _Link(model, {"max_rows": max_rows, **options})
        try:
            link.launch()
            tokenizer = load_tokenizer(find_model(model).weights)
            loaded = link.loading.result()
        except BaseException:
            link.kill()
            raise
        return cls(link, tokenizer, loaded, max_rows=max_rows, max_queue=max_queue)

    def when_ended(self, tell: Callable[[], None]) -> None:
        """Have tell() called, in a thread, when the process ends though nobody closed it."""
        self._link.when_ended(tell)

    @property
    def failure(self) -> str | None:
        """Why there is no process any more; None while all is well, and after `close`."""
        return self._link.failure

    @property
    def load_now(self) -> Load:
        """How much there was to do after the last step."""
        return self._link.load_now

    def start(
        self, request: Request, prefixes: Weighted, on_progress: Callable[[bool], None] | None
    ) -> Ticket:
        """Send a request; QueueFullError, or SessionClosedError when nothing is answered."""
        ticket = Ticket(Row(request, frozenset()), on_progress)
        with self._link.lock:  # a prefix removed after this look is removed after the request
            for name, _ in prefixes:
                self.find_prefix(name)
            self._link.start(ticket, request, prefixes, (self._max_rows, self._max_queue))
        self._link.flush()
        return ticket

    def stop(self, ticket: Ticket) -> None:
        """Stop computing a request; a finished one stays as it is."""
        self._link.stop(ticket)

    def remove_prefix(self, name: str) -> None:
        """Forget a prefix; answers that use it are finished. UnknownPrefixError for other names."""
        with self._loading:  # one added under this name meanwhile comes after it
            super().remove_prefix(name)
            self._link.post(RemovePrefix(name))
        self._link.flush()

    def _load_prefix(self, name: str, path: Path, *, allow_other_base: bool) -> NamedPrefix:
        info = self._link.call(
            lambda number: AddPrefix(number, name, str(path.absolute()), allow_other_base)
        )
        return NamedPrefix(name, path, info)

    def close(self) -> None:
        """Stop what is being computed and end the process."""
        self._link.close()


class _Link:
    """The process, the pipe to it, and the thread that takes in what comes back.

    The garbage collector may end an answer, and so call `stop`, in the middle of whatever a thread
    does here: so the lock is re-entrant, and messages leave through an outbox, whole and in order.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share threads half-way
        self._connection: Connection
        self._connection, self._theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=run,
            args=(self._theirs, logging.getLogger().getEffectiveLevel(), model, options),
            name="model",
            daemon=True,
        )
        self._reader = threading.Thread(target=self._read, name="model's answers", daemon=True)
        self.lock = threading.RLock()
        self._outbox: deque[bytes] = deque()
        self._sending = threading.Lock()
        self._numbers = count(LOADING + 1)
        self._tickets: dict[int, Ticket] = {}
        self._number_of: dict[Ticket, int] = {}
        self.loading: Future[Any] = Future()
        self._calls: dict[int, Future[Any]] = {LOADING: self.loading}
        self._is_closed = False
        self._tell_end: Callable[[], None] | None = None
        self.failure: str | None = None
        self._load = Load(0, 0, 0)

    def launch(self) -> None:
        """Start the process; after an error or Ctrl-C in here, `kill` is still needed."""
        with _ctrl_c_later():
            self._process.start()
            self._theirs.close()  # else nobody would notice that the process has ended
            self._reader.start()

    @property
    def load_now(self) -> Load:
        with self.lock:
            load = self._load
            return load._replace(num_waiting=max(len(self._tickets) - load.num_rows, 0))

    def when_ended(self, tell: Callable[[], None]) -> None:
        with self.lock:
            self._tell_end = tell
            has_ended = self.failure is not None
        if has_ended:
            tell()

    # To the process

    def post(self, message: Any) -> None:
        """Queue a message; it is sent by the next `flush`, in any thread."""
        data = pickle.dumps(message)
        with self.lock:
            self._outbox.append(data)

    def flush(self) -> None:
        """Send what is queued, unless a thread is at it, which then sends this too."""
        while self._outbox and self._sending.acquire(blocking=False):
            try:
                self._connection.send_bytes(self._outbox.popleft())
            except OSError:  # the process has ended; `_read` sees it as well, and tells everyone
                self._outbox.clear()
            finally:
                self._sending.release()

    def start(
        self,
        ticket: Ticket,
        request: Request,
        prefixes: Weighted,
        limits: tuple[int, int | None],
    ) -> None:
        with self.lock:
            self._check_open()
            check_queue(len(self._tickets), *limits)
            number = next(self._numbers)
            self.post(Start(number, request, prefixes))
            self._tickets[number], self._number_of[ticket] = ticket, number

    def stop(self, ticket: Ticket) -> None:
        with self.lock:
            number = self._number_of.get(ticket)
            if number is not None:
                self.post(Stop(number))
        self.flush()

    def call(self, to_message: Callable[[int], Any]) -> Any:
        """Send a call and wait for what it returns or raises."""
        future: Future[Any] = Future()
        with self.lock:
            self._check_open()
            number = next(self._numbers)
            self.post(to_message(number))
            self._calls[number] = future
        self.flush()
        return future.result()

    def _check_open(self) -> None:
        if self.failure is not None or self._is_closed:
            raise self._end_error()

    def _end_error(self) -> SessionClosedError:
        if self.failure is not None:
            return EndedProcessError(self.failure)
        return SessionClosedError("the session is closed; load a new one.")

    def close(self) -> None:
        with self.lock:
            if self._is_closed:
                return
            self._is_closed = True
            self.post(Close())
        self.flush()
        self._process.join(END_S)
        self.kill()

    def kill(self) -> None:
        """End the process now, whatever it does."""
        with self.lock:
            self._is_closed = True
        if self._process.pid is not None:  # it was started
            self._process.kill()
            self._process.join()
        self._theirs.close()
        if self._reader.ident is not None and self._reader is not threading.current_thread():
            self._reader.join(END_S)
        self._connection.close()

    # From the process

    def _read(self) -> None:
        try:
            while True:
                try:
                    message = self._connection.recv()
                except (EOFError, OSError):
                    return
                if isinstance(message, Result):
                    self._settle(message)
                elif isinstance(message, Progress):
                    self._take(message)
        finally:  # after an error in here too, nobody may wait for ever
            self._end()

    def _settle(self, result: Result) -> None:
        with self.lock:
            future = self._calls.pop(result.number)
        if result.error is not None:
            future.set_exception(result.error)
        else:
            future.set_result(result.value)

    def _take(self, progress: Progress) -> None:
        self._load = progress.load
        for new in progress.rows:
            with self.lock:
                ticket = self._tickets.get(new.number)
                if ticket is not None and new.finish_reason is not None:
                    del self._tickets[new.number], self._number_of[ticket]
            if ticket is not None:
                _publish(ticket, new, None if new.error is None else RuntimeError(new.error))

    def _end(self) -> None:
        """Tell everyone who waits that nothing more will come."""
        self._process.join(END_S)
        if self._process.is_alive():  # it computes for nobody
            self._process.kill()
            self._process.join()
        with self.lock:
            if not self._is_closed:
                self.failure = (
                    "the process with the model has ended "
                    f"({_words_of_exit(self._process.exitcode)}); start the server again."
                )
            tickets, calls = list(self._tickets.values()), list(self._calls.values())
            self._tickets.clear()
            self._number_of.clear()
            self._calls.clear()
            self._outbox.clear()
            self._load = Load(0, 0, 0)
            tell = self._tell_end if self.failure is not None else None
        for future in calls:
            future.set_exception(self._end_error())
        for ticket in tickets:
            cancelled = RowProgress(0, [], [], "cancelled")
            _publish(ticket, cancelled, None if self.failure is None else self._end_error())
        if tell is not None:
            tell()


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; a process started in it never sees one.

    It inherits what is blocked, and Ctrl-C is its front's to answer.
    """
    if sys.platform == "win32":
        yield  # no signals that could be held
        return
    resource_tracker.ensure_running()  # starting it, which a spawned process needs, lets Ctrl-C in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _publish(ticket: Ticket, new: RowProgress, error: Exception | None) -> None:
    ticket.row.logprobs.extend(new.logprobs)
    ticket.row.answer.extend(new.tokens)
    ticket.row.finish_reason = new.finish_reason
    ticket.publish(error)


def _words_of_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}, as when memory runs out or somebody kills it"
    return f"exit status {code}"
