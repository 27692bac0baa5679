"""The process with the model: it loads a session and serves the client's messages.

Messages are pickled and sent over a pipe; None asks the worker to end.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tqdm import tqdm

from ptuning.engine.request import Request, Row
from ptuning.model.cpu.threads import leave_a_processor
from ptuning.serve.scheduler import RowUpdate
from ptuning.serve.session import Load, Session, Weighted
from ptuning.tunings.artefact import Info

SMALL_MODEL = 2**24  # parameters; in smaller models a step is mostly threads waiting for each other


class Start(NamedTuple):
    """To the worker: decode a request."""

    number: int
    request: Request
    prefixes: Weighted


class Stop(NamedTuple):
    """To the worker: stop computing a request."""

    number: int


class AddPrefix(NamedTuple):
    """To the worker: load a prefix; the reply is a PrefixResult of the same number."""

    number: int
    name: str
    path: str
    allow_other_base: bool


class RemovePrefix(NamedTuple):
    """To the worker: remove a prefix."""

    name: str


class Loaded(NamedTuple):
    """To the client, first: the model is loaded. An exception in its place says why it is not."""

    context_length: int
    tuned: Info | None


class PrefixResult(NamedTuple):
    """To the client: the prefix that was loaded, or the error."""

    number: int
    result: Info | Exception


class StepResult(NamedTuple):
    """To the client: what a decoding step added to the requests, by number."""

    updates: Sequence[tuple[int, RowUpdate]]
    load: Load


def receive(connection: Connection) -> Any:
    """Return the other side's next message; None if there will be none."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None


def _send(connection: Connection, message: Any) -> None:
    with suppress(OSError):  # the client has ended, and this process is about to
        connection.send(message)


def portable(error: Exception) -> Exception:
    """Return an error that survives pickling; others keep their message and built-in type."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (pickling runs the error's own code)
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return error
    kinds = (ValueError, FileNotFoundError, OSError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind(str(error))


def run_worker(
    connection: Connection, log_level: int, model: str, options: Mapping[str, Any]
) -> None:
    """Load `Session.load(model, **options)` and serve the client until either ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client handles Ctrl-C and ends this process
    threading.Thread(target=_exit_with_client, name="client watch", daemon=True).start()
    logging.basicConfig(level=log_level, format="%(message)s", stream=sys.stderr)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaks
    try:
        session = Session.load(model, **options)
    except Exception as error:  # noqa: BLE001  (raised again by the client)
        _send(connection, portable(error))
        return
    if session.model.device.type == "cpu" and session.model.num_parameters() < SMALL_MODEL:
        leave_a_processor()  # for the client process and HTTP clients
    with session:
        _send(connection, Loaded(session.context_length, session.tuned))
        EngineWorker(session, connection).run()


def _exit_with_client() -> None:
    """End this process once its client has ended, even while it loads or computes."""
    client = multiprocessing.parent_process()
    assert client is not None, "a client started this process"
    client.join()
    os._exit(1)


class EngineWorker:
    """Receives messages in the main thread; the engine's thread sends the results of each step."""

    def __init__(self, session: Session, connection: Connection) -> None:
        self._session = session
        self._connection = connection
        self._sending = threading.Lock()
        self._rows: dict[int, Row] = {}  # unfinished requests
        self._updates: list[tuple[int, RowUpdate]] = []  # of this step; engine's thread only
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="prefixes")
        session.scheduler.after_step = self._send_updates

    def run(self) -> None:
        """Serve until the client asks to end or is gone."""
        while (message := receive(self._connection)) is not None:
            if isinstance(message, Start):
                self._start(message)
            elif isinstance(message, Stop):
                if (row := self._rows.get(message.number)) is not None:
                    self._session.scheduler.cancel(row)
            elif isinstance(message, RemovePrefix):
                self._session.remove_prefix(message.name)
            elif isinstance(message, AddPrefix):
                self._loader.submit(self._add_prefix, message)
        self._loader.shutdown(cancel_futures=True)

    def _start(self, message: Start) -> None:
        number = message.number
        try:
            row = self._rows[number] = self._session.new_row(message.request, message.prefixes)
            self._session.scheduler.submit(row, partial(self._collect, number))
        except Exception as error:  # noqa: BLE001  (reported to the request)
            self._rows.pop(number, None)
            failed = RowUpdate([], [], "cancelled", portable(error))
            self._send(StepResult([(number, failed)], self._session.load_now))

    def _collect(self, number: int, update: RowUpdate) -> None:
        """Keep an update until the end of the step."""
        if update.finish_reason is not None:
            self._rows.pop(number, None)
        if update.error is not None:
            update = update._replace(error=portable(update.error))
        self._updates.append((number, update))

    def _send_updates(self) -> None:
        updates, self._updates = self._updates, []
        if updates:
            self._send(StepResult(updates, self._session.load_now))

    def _add_prefix(self, message: AddPrefix) -> None:
        result: Info | Exception
        try:
            result = self._session.add_prefix(
                message.name, message.path, allow_other_base=message.allow_other_base
            )
        except Exception as error:  # noqa: BLE001  (raised again by the client)
            result = portable(error)
        self._send(PrefixResult(message.number, result))

    def _send(self, message: StepResult | PrefixResult) -> None:
        with self._sending:
            _send(self._connection, message)
