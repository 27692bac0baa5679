"""A session whose model computes in a process of its own, so that HTTP does not slow it down.

Only one thread holds the GIL at a time, and decoding releases it at every operation: with 32
clients of a small model, more time was spent on switching threads than on decoding. Only messages
pass between the processes: requests one way, the tokens of each step the other. The worker ends
with its client, however that ends; if it ends first, every answer in progress reports it. It is
spawned, so a script that loads one does so under `if __name__ == "__main__":`.
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
from functools import partial
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.request import Request
from ptuning.serve.scheduler import OnUpdate, RowUpdate, SessionClosedError, check_queue
from ptuning.serve.session import AbstractSession, Activity, NamedPrefix, Weighted
from ptuning.serve.worker import (
    EngineWorker,
    Loaded,
    PrefixResult,
    StepResult,
    receive,
    run_worker,
)
from ptuning.tunings.artefact import Info
from ptuning.tunings.loading import find_model, load_tokenizer

END_S = 10.0  # for a decoding step in progress when the session is closed


class EndedProcessError(SessionClosedError, ChildProcessError):
    """The worker ended although nobody closed the session."""


class EngineClient(AbstractSession):
    """A session in this process for an engine in another; `load` starts it.

    `Answer.__del__` may cancel a request in the middle of anything a thread does here, so `_post`
    waits for no lock: messages go to an outbox, which the thread that is sending empties.
    """

    def __init__(
        self,
        process: BaseProcess,
        connection: Connection,
        tokenizer: ChatGLMTokenizer,
        loaded: Loaded,
        *,
        max_rows: int,
        max_queue: int | None,
    ) -> None:
        """Take over a worker that has loaded its model."""
        super().__init__(tokenizer, context_length=loaded.context_length, tuned=loaded.tuned)
        self.failure: str | None = None  # why the worker ended, unless it was closed
        self._process, self._connection = process, connection
        self._max_rows, self._max_queue = max_rows, max_queue
        self._numbers = count()
        self._activity = Activity(0, 0, 0)  # after the last step
        self._outbox: deque[bytes] = deque()
        self._sending = threading.Lock()
        self._lock = threading.Lock()  # what may be called, and in which order
        self._is_closed = False
        self._requests: dict[int, OnUpdate] = {}
        self._loading: dict[int, Future[Info]] = {}
        self._on_end: Callable[[], None] | None = None
        self._reader = threading.Thread(target=self._read, name="engine client", daemon=True)
        self._reader.start()

    @classmethod
    def load(
        cls, model: str, *, max_rows: int, max_queue: int | None = None, **options: Any
    ) -> Self:
        """Start a worker that loads `Session.load(model, **options)`, and wait until it has.

        Raises what `Session.load` raises, and EndedProcessError if the worker ends meanwhile.
        """
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        connection, theirs = context.Pipe()
        log_level = logging.getLogger().getEffectiveLevel()
        process = context.Process(
            target=run_worker,
            args=(theirs, log_level, model, {"max_rows": max_rows, **options}),
            name="model",
            daemon=True,
        )
        try:
            with _block_ctrl_c():
                process.start()
                theirs.close()  # else the end of the worker would not end the pipe
            tokenizer = load_tokenizer(find_model(model).weights)
            loaded = receive(connection)
            if isinstance(loaded, Exception):
                raise loaded
            if loaded is None:
                process.join(END_S)
                raise EndedProcessError(_describe_end(process))
        except BaseException:
            if process.pid is not None:
                process.kill()
                process.join()
            theirs.close()
            connection.close()
            raise
        return cls(process, connection, tokenizer, loaded, max_rows=max_rows, max_queue=max_queue)

    def when_ended(self, on_end: Callable[[], None]) -> None:
        """Have on_end() called, in a thread, if the worker ends although nobody closed it."""
        with self._lock:
            self._on_end = on_end
            has_ended = self.failure is not None
        if has_ended:
            on_end()

    @property
    def activity(self) -> Activity:
        """What the worker was doing after its last step."""
        last = self._activity
        return last._replace(num_waiting=max(len(self._requests) - last.num_rows, 0))

    def start(
        self, request: Request, prefixes: Weighted, on_update: OnUpdate
    ) -> Callable[[], None]:
        """Send a request; QueueFullError, or SessionClosedError once nothing is answered."""
        number = next(self._numbers)
        with self._lock:  # a prefix that is removed after this check leaves after the request
            self._check_open()
            for name, _ in prefixes:
                self.find_prefix(name)
            check_queue(len(self._requests), self._max_rows, self._max_queue)
            self._requests[number] = on_update
            self._queue_call(EngineWorker.start, number, request, prefixes)
        self._flush()
        return partial(self._stop, number)

    def _stop(self, number: int) -> None:
        self._queue_call(EngineWorker.stop, number)
        self._flush()

    def _load_prefix(self, name: str, path: Path, *, allow_other_base: bool) -> NamedPrefix:
        number = next(self._numbers)
        loading: Future[Info] = Future()
        with self._lock:
            self._check_open()
            self._loading[number] = loading
            arguments = (number, name, path.absolute(), allow_other_base)
            self._queue_call(EngineWorker.add_prefix, *arguments)
        self._flush()
        return NamedPrefix(name, path, loading.result())

    def _unload_prefix(self, name: str) -> None:
        with self._lock:
            self._queue_call(EngineWorker.remove_prefix, name)
        self._flush()

    def _queue_call(self, method: Callable[..., None], *arguments: Any) -> None:
        self._outbox.append(pickle.dumps((method.__name__, *arguments)))

    def _flush(self) -> None:
        """Send the queued messages, unless another thread does; never with the lock held.

        Sending blocks while the pipe is full because the worker does not read.
        """
        while self._outbox and self._sending.acquire(blocking=False):
            try:
                if self._outbox:  # another thread may have sent it before the lock was free
                    self._connection.send_bytes(self._outbox.popleft())
            except OSError:  # the worker has ended, which `_read` notices and reports
                self._outbox.clear()
            finally:
                self._sending.release()

    def _check_open(self) -> None:
        if self._is_closed or self.failure is not None:
            raise self._closed_error()

    def _closed_error(self) -> SessionClosedError:
        if self.failure is not None:
            return EndedProcessError(self.failure)
        return SessionClosedError("the session is closed; load a new one.")

    def close(self) -> None:
        """Cancel everything and end the worker."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._outbox.append(pickle.dumps(None))
        self._flush()
        self._process.join(END_S)
        self._process.kill()
        if self._reader is not threading.current_thread():
            self._reader.join(END_S)
        self._connection.close()

    def _read(self) -> None:
        try:
            while (message := receive(self._connection)) is not None:
                if isinstance(message, StepResult):
                    self._activity = message.activity
                    for number, update in message.updates:
                        self._deliver(number, update)
                elif isinstance(message, PrefixResult):
                    _settle(self._loading.pop(message.number), message.result)
        finally:  # even after an error, nobody may wait for ever
            self._end()

    def _deliver(self, number: int, update: RowUpdate) -> None:
        if update.finish_reason is None:
            self._requests[number](update)
        else:
            self._requests.pop(number)(update)

    def _end(self) -> None:
        """End what still waits for the worker."""
        self._process.join(END_S)
        self._process.kill()
        self._process.join()
        with self._lock:
            if not self._is_closed:
                self.failure = _describe_end(self._process)
            self._activity = Activity(0, 0, 0)
            on_end = self._on_end if self.failure is not None else None
        for loading in self._loading.values():
            _settle(loading, self._closed_error())
        error = None if self.failure is None else self._closed_error()
        for number in list(self._requests):
            self._deliver(number, RowUpdate([], [], "cancelled", error))
        if on_end is not None:
            on_end()


def _settle(future: Future[Info], result: Info | Exception) -> None:
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


@contextmanager
def _block_ctrl_c() -> Iterator[None]:
    """Delay SIGINT until the block ends; a process started in it inherits the block for good."""
    if sys.platform == "win32":
        yield  # signals cannot be blocked
        return
    resource_tracker.ensure_running()  # a spawned process needs it, and its start unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe_end(process: BaseProcess) -> str:
    code = process.exitcode
    reason = f"exit status {code}"
    if code is not None and code < 0:
        reason = f"signal {-code}, as when memory runs out or somebody kills it"
    return f"the process with the model has ended ({reason}); start the server again."
