"""A session whose model computes in a process of its own, so that HTTP does not slow it down.

Python runs one thread of a process at a time, and decoding gives way at every operation: with 32
clients of a small model, more time went to taking turns than to the answers themselves. Here only
messages pass between the two: a request one way, after each decoding step its tokens the other.
The process ends with its front, however that ends; where it ends first, every answer says so.
"""

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.engine_row import Request, Row
from ptuning.serve.scheduler import SessionClosedError, Ticket, check_queue
from ptuning.serve.session_child import LOADING, run
from ptuning.serve.session_front import Load, NamedPrefix, SessionFront, Weighted
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
from ptuning.serve.tuned_model import find_model
from ptuning.train.base_model import load_tokenizer

END_S = 10.0  # how long a decoding step may still take when the session is closed

logger = logging.getLogger(__name__)


class EndedProcessError(ChildProcessError):
    """The process with the model is gone."""


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
        self._link.start(ticket, request, prefixes, (self._max_rows, self._max_queue))
        return ticket

    def stop(self, ticket: Ticket) -> None:
        """Stop computing a request; a finished one stays as it is."""
        self._link.stop(ticket)

    def remove_prefix(self, name: str) -> None:
        """Forget a prefix; answers that use it are finished. UnknownPrefixError for other names."""
        super().remove_prefix(name)
        self._link.send(RemovePrefix(name))

    def _load_prefix(self, name: str, path: Path, *, allow_other_base: bool) -> NamedPrefix:
        info = self._link.call(
            lambda number: AddPrefix(number, name, str(path.absolute()), allow_other_base)
        )
        return NamedPrefix(name, path, info)

    def close(self) -> None:
        """Stop what is being computed and end the process."""
        self._link.close()


class _Link:
    """The process, the pipe to it, and the thread that takes in what comes back."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share threads half-way
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=run,
            args=(theirs, logging.getLogger().getEffectiveLevel(), model, options),
            name="model",
            daemon=True,
        )
        with _without_ctrl_c():
            self._process.start()
        theirs.close()  # else nobody would notice that the process has ended
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._numbers = count(LOADING + 1)
        self._tickets: dict[int, Ticket] = {}
        self._number_of: dict[Ticket, int] = {}
        self.loading: Future[Any] = Future()
        self._calls: dict[int, Future[Any]] = {LOADING: self.loading}
        self._is_closed = False
        self._tell_end: Callable[[], None] | None = None
        self.failure: str | None = None
        self._load = Load(0, 0, 0)
        self._reader = threading.Thread(target=self._read, name="model's answers", daemon=True)
        self._reader.start()

    @property
    def load_now(self) -> Load:
        with self._lock:
            num_waiting = max(len(self._tickets) - self._load.num_rows, 0)
        return self._load._replace(num_waiting=num_waiting)

    def when_ended(self, tell: Callable[[], None]) -> None:
        with self._lock:
            self._tell_end = tell
            has_ended = self.failure is not None
        if has_ended:
            tell()

    # To the process

    def send(self, message: Any) -> None:
        with self._sending:
            try:
                self._connection.send(message)
            except OSError as error:  # `_read` sees the end as well, and tells everyone
                raise SessionClosedError(
                    self.failure or "the model's process has ended."
                ) from error

    def start(
        self,
        ticket: Ticket,
        request: Request,
        prefixes: Weighted,
        limits: tuple[int, int | None],
    ) -> None:
        with self._lock:
            if self._is_closed or self.failure is not None:
                raise SessionClosedError(self.failure or "the session is closed; load a new one.")
            check_queue(len(self._tickets), *limits)
            number = next(self._numbers)
            self._tickets[number], self._number_of[ticket] = ticket, number
        try:
            self.send(Start(number, request, prefixes))
        except BaseException:
            with self._lock:
                self._forget(number)
            raise

    def stop(self, ticket: Ticket) -> None:
        with self._lock:
            number = self._number_of.get(ticket)
        if number is not None and self.failure is None:
            self.send(Stop(number))

    def call(self, to_message: Callable[[int], Any]) -> Any:
        """Send a call and wait for what it returns or raises."""
        number = next(self._numbers)
        future: Future[Any] = Future()
        with self._lock:
            self._calls[number] = future
        self.send(to_message(number))
        return future.result()

    def close(self) -> None:
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if was_closed:
            return
        if self.failure is None:
            try:
                self.send(Close())
            except SessionClosedError:
                logger.debug("the model's process ended before it was closed")
        self._process.join(END_S)
        self.kill()

    def kill(self) -> None:
        """End the process now, whatever it does."""
        with self._lock:
            self._is_closed = True
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._reader.join(END_S)
        self._connection.close()

    # From the process

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            if isinstance(message, Result):
                self._settle(message)
            elif isinstance(message, Progress):
                self._take(message)
        self._end()

    def _settle(self, result: Result) -> None:
        with self._lock:
            future = self._calls.pop(result.number)
        if result.error is not None:
            future.set_exception(result.error)
        else:
            future.set_result(result.value)

    def _take(self, progress: Progress) -> None:
        self._load = progress.load
        for new in progress.rows:
            with self._lock:
                ticket = self._tickets.get(new.number)
                if new.finish_reason is not None:
                    self._forget(new.number)
            if ticket is not None:
                _publish(ticket, new)

    def _forget(self, number: int) -> None:
        ticket = self._tickets.pop(number, None)
        if ticket is not None:
            del self._number_of[ticket]

    def _end(self) -> None:
        """Tell everyone who waits that nothing more will come."""
        self._process.join(END_S)
        with self._lock:
            if not self._is_closed:
                self.failure = (
                    "the process with the model has ended "
                    f"({_words_of_exit(self._process.exitcode)}); start the server again."
                )
            tickets, calls = list(self._tickets.values()), list(self._calls.values())
            self._tickets.clear()
            self._number_of.clear()
            self._calls.clear()
            self._load = Load(0, 0, 0)
            tell = self._tell_end if self.failure is not None else None
        words = self.failure or "the session is closed; load a new one."
        for future in calls:
            future.set_exception(EndedProcessError(words))
        for ticket in tickets:
            _publish(ticket, RowProgress(0, [], [], "cancelled", self.failure))
        if tell is not None:
            tell()


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Let a process that is started here never see Ctrl-C, which is its front's to answer."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say so; the process does as soon as it runs
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _publish(ticket: Ticket, new: RowProgress) -> None:
    ticket.row.logprobs.extend(new.logprobs)
    ticket.row.answer.extend(new.tokens)
    ticket.row.finish_reason = new.finish_reason
    ticket.publish(None if new.error is None else EndedProcessError(new.error))


def _words_of_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}, as when memory runs out or somebody kills it"
    return f"exit status {code}"
