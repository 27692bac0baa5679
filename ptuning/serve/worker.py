"""The process with the model: it loads a session and serves the client's calls.

Over a pipe the client sends the name of a method of `EngineWorker` with its arguments, or None for
the end. It gets a `Loaded`, then the `StepResult` of every decoding step and the `PrefixResult` of
every added prefix.
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
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ptuning.engine.request import Request, Row
from ptuning.model.cpu.threads import leave_a_processor
from ptuning.serve.scheduler import RowUpdate
from ptuning.serve.session import Activity, Session, Weighted
from ptuning.tunings.artefact import Info

SMALL_MODEL = 2**24  # parameters; in smaller models a step is mostly threads waiting for each other


class Loaded(NamedTuple):
    """The model is loaded; an exception in place of this says why it is not."""

    context_length: int
    tuned: Info | None


class PrefixResult(NamedTuple):
    """The prefix that a call of this number loaded, or the error."""

    number: int
    result: Info | Exception


class StepResult(NamedTuple):
    """What a decoding step added to the requests, by number."""

    updates: Sequence[tuple[int, RowUpdate]]
    activity: Activity


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
    """Serves calls in the main thread; the engine's thread sends the results of each step."""

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
        while (call := receive(self._connection)) is not None:
            method, *arguments = call
            getattr(self, method)(*arguments)
        self._loader.shutdown(cancel_futures=True)

    def start(self, number: int, request: Request, prefixes: Weighted) -> None:
        """Decode a request; every step reports on it by its number."""
        try:
            row = self._rows[number] = self._session.new_row(request, prefixes)
            self._session.scheduler.submit(row, partial(self._collect, number))
        except Exception as error:  # noqa: BLE001  (reported to the request)
            self._rows.pop(number, None)
            failed = RowUpdate([], [], "cancelled", portable(error))
            self._send(StepResult([(number, failed)], self._session.activity))

    def stop(self, number: int) -> None:
        """Cancel a request; no effect on a finished one."""
        row = self._rows.get(number)
        if row is not None:
            self._session.scheduler.cancel(row)

    def add_prefix(self, number: int, name: str, path: Path, allow_other_base: bool) -> None:
        """Load a prefix while the engine decodes; the result is sent with this number."""
        self._loader.submit(self._add_prefix, number, name, path, allow_other_base)

    def remove_prefix(self, name: str) -> None:
        """Remove a prefix; rows that were started before keep it."""
        self._session.remove_prefix(name)

    def _add_prefix(self, number: int, name: str, path: Path, allow_other_base: bool) -> None:
        result: Info | Exception
        try:
            result = self._session.add_prefix(name, path, allow_other_base=allow_other_base)
        except Exception as error:  # noqa: BLE001  (raised again by the client)
            result = portable(error)
        self._send(PrefixResult(number, result))

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
            self._send(StepResult(updates, self._session.activity))

    def _send(self, message: StepResult | PrefixResult) -> None:
        with self._sending:
            _send(self._connection, message)
