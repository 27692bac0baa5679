"""The process that has the model: it loads a session and does what the front's messages say."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from ptuning.model.cpu.threads import leave_a_processor
from ptuning.serve.scheduler import EngineError, Ticket
from ptuning.serve.session_local import Session
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
    portable,
)

SMALL = 2**24  # parameters; a step of fewer is mostly threads that wait for each other
LOADING = 0  # the number of the Result that says how loading went


def run(connection: Connection, log_level: int, model: str, options: Mapping[str, Any]) -> None:
    """Load `Session.load(model, **options)` and serve the front until it closes or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the front, which closes this
    threading.Thread(target=_end_with_front, name="front's end", daemon=True).start()
    logging.basicConfig(level=log_level, format="%(message)s", stream=sys.stderr)
    tqdm.set_lock(threading.RLock())  # its own is shared with processes, and left by a killed one
    try:
        session = Session.load(model, **options)
    except Exception as error:  # noqa: BLE001  (raised again by the front)
        _send(connection, Result(LOADING, None, portable(error)))
        return
    if session.model.device.type == "cpu" and session.model.num_parameters() < SMALL:
        leave_a_processor()  # to the front and its clients
    with session:
        _send(connection, Result(LOADING, Loaded(session.context_length, session.tuned)))
        _Child(session, connection).run()


def _end_with_front() -> None:
    """End this process once its front has ended, even while it loads or computes for minutes."""
    front = multiprocessing.parent_process()
    assert front is not None, "this process was started by a front"
    front.join()
    os._exit(1)


def _send(connection: Connection, message: Progress | Result) -> None:
    with suppress(OSError):  # the front is gone, and so is this process soon
        connection.send(message)


class _Job:
    """One request: its ticket, and how much of its answer was sent."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ticket: Ticket | None = None
        self.num_sent = 0


class _Child:
    """Takes messages in one thread and sends what the engine's thread did after each step."""

    def __init__(self, session: Session, connection: Connection) -> None:
        self._session = session
        self._connection = connection
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._jobs: dict[int, _Job] = {}
        self._moved: dict[int, _Job] = {}  # since the last step
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="prefixes")
        session.scheduler.after_step = self._tell

    def run(self) -> None:
        """Do as told until Close, or until nobody is there."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            if isinstance(message, Close):
                break
            self._obey(message)
        self._loader.shutdown(cancel_futures=True)

    def _obey(self, message: Any) -> None:
        if isinstance(message, Start):
            self._start(message)
        elif isinstance(message, Stop):
            job = self._jobs.get(message.number)
            if job is not None and job.ticket is not None:
                self._session.stop(job.ticket)
        elif isinstance(message, RemovePrefix):
            self._session.remove_prefix(message.name)
        elif isinstance(message, AddPrefix):
            self._loader.submit(self._add_prefix, message)

    def _start(self, message: Start) -> None:
        job = _Job(message.number)
        self._jobs[job.number] = job
        try:
            ticket = self._session.start(
                message.request, message.prefixes, partial(self._note, job)
            )
        except Exception as error:  # noqa: BLE001  (told to whoever asked)
            del self._jobs[job.number]
            failed = RowProgress(job.number, [], [], "cancelled", str(error))
            self._send(Progress([failed], self._session.load_now))
            return
        job.ticket = ticket
        if job.number in self._moved:  # the engine was faster, and could not tell
            self._tell()

    def _note(self, job: _Job, finished: bool) -> None:
        """Remember that a request moved on; called in the engine's thread."""
        with self._lock:
            self._moved[job.number] = job

    def _tell(self) -> None:
        """Send what is new; called in the engine's thread after a step."""
        with self._sending:  # two tellers keep the order of a row's tokens
            rows = []
            with self._lock:
                for job in list(self._moved.values()):
                    if job.ticket is not None:  # else `_start` is about to tell
                        rows.append(self._progress_of(job, job.ticket))
                        del self._moved[job.number]
            if rows:
                _send(self._connection, Progress(rows, self._session.load_now))

    def _progress_of(self, job: _Job, ticket: Ticket) -> RowProgress:
        error = None
        try:
            end, finish_reason = ticket.progress()
        except EngineError as failed:
            error, end, finish_reason = str(failed.__cause__), job.num_sent, "cancelled"
        start, job.num_sent = job.num_sent, end
        if finish_reason is not None:
            self._jobs.pop(job.number, None)
        row = ticket.row
        return RowProgress(
            job.number, row.answer[start:end], row.logprobs[start:end], finish_reason, error
        )

    def _add_prefix(self, message: AddPrefix) -> None:
        try:
            value = self._session.add_prefix(
                message.name, message.path, allow_other_base=message.allow_other_base
            )
        except Exception as error:  # noqa: BLE001  (raised again by the front)
            self._send(Result(message.number, None, portable(error)))
        else:
            self._send(Result(message.number, value))

    def _send(self, message: Progress | Result) -> None:
        with self._sending:
            _send(self._connection, message)
