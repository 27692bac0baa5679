"""The real server on a port of its own: in a thread of the test, or as the command people type."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import psutil
from openai import OpenAI

from ptuning.serve.api import build_app, make_server
from ptuning.serve.session import Session
from ptuning.tunings.loading import NANO_DIR
from scripts.local_server import free_port

KEY = "a key for tests"
ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
END_S = 20.0


class Command(NamedTuple):
    """A started `python -m ptuning serve`, and where it will answer; `said` is its stderr."""

    process: subprocess.Popen[bytes]
    address: str
    said: Path

    def wait_for_model(self) -> psutil.Process:
        """Return the process that loads the model, as soon as there is one."""
        front = psutil.Process(self.process.pid)
        return wait_for(lambda: next(filter(_has_model, front.children()), None), self)

    def wait_until_ready(self) -> None:
        """Wait until it answers."""
        wait_for(lambda: health(self.address), self)

    def text(self) -> str:
        """Return what it said so far."""
        return self.said.read_text(encoding="utf-8", errors="replace")


def _has_model(process: psutil.Process) -> bool:
    return any("spawn_main" in word for word in process.cmdline())


def wait_for(find: Callable[[], Any], command: Command) -> Any:
    """Return what find() finds, as soon as it is something; fail when the command ends."""
    deadline = time.monotonic() + START_S
    while not (found := find()):
        assert command.process.poll() is None, command.text()
        assert time.monotonic() < deadline, command.text()
        time.sleep(0.05)
    return found


def health(address: str) -> dict[str, object] | None:
    """Return what /health says; None while nobody answers."""
    try:
        return httpx2.get(f"{address}/health", timeout=5).json()
    except httpx2.TransportError:
        return None


@contextmanager
def command(folder: Path, *arguments: str, model: str | Path = NANO_DIR) -> Iterator[Command]:
    """Type `python -m ptuning serve`; it and the processes under it end with the block."""
    port = free_port()
    typed = [sys.executable, "-m", "ptuning", "serve", "--model", str(model)]
    said = folder / "stderr.txt"
    with (
        said.open("wb") as stderr,
        subprocess.Popen(
            [*typed, "--port", str(port), *arguments],
            cwd=ROOT,
            stderr=stderr,
            preexec_fn=_hear_ctrl_c,
        ) as run,
    ):
        try:
            yield Command(run, f"http://127.0.0.1:{port}", said)
        finally:
            if run.poll() is None:
                under = psutil.Process(run.pid).children(recursive=True)
                for process in (run, *under):
                    process.kill()


def _hear_ctrl_c() -> None:
    """Undo what a shell does to the jobs it starts in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until_gone(process: psutil.Process) -> float:
    """Wait until a process has ended, and return how many seconds that took."""
    started = time.monotonic()
    process.wait(END_S)
    return time.monotonic() - started


@contextmanager
def running(session: Session, **options: object) -> Iterator[str]:
    """Serve until the block ends; yield the address."""
    server = make_server(build_app(session, **{"api_key": KEY} | options), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def client(address: str, key: str = KEY) -> OpenAI:
    """The official client, without its retries."""
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def wait_until_idle(session: Session, timeout_s: float = 10.0) -> None:
    """Fail if a row is left after a while."""
    deadline = time.monotonic() + timeout_s
    while session.scheduler.num_rows + session.scheduler.num_waiting:
        assert time.monotonic() < deadline, "a row is left"
        time.sleep(0.01)
    assert session.scheduler.engine.slots.num_bytes == 0
