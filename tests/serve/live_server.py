"""The real server on a port of its own, in a thread of the test."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from openai import OpenAI

from ptuning.serve.api import build_app
from ptuning.serve.server import make_server
from ptuning.serve.session import Session

KEY = "a key for tests"


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
