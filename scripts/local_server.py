"""Runs a server of `python -m ptuning` in its own process for the length of a block."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.error import URLError

ROOT = Path(__file__).resolve().parents[1]
START_S = 120  # for loading on a slow machine
POLL_S = 0.2


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    arguments: Sequence[str],
    *,
    port: int,
    page: str = "",
    said: IO[bytes] | None = None,
    folder: Path = ROOT,
) -> Iterator[str]:
    """Start `python -m ptuning ARGUMENTS --port PORT` and yield its address once `page` answers.

    stderr goes to the file `said` (None: discarded). folder is the working directory, where output/
    is looked up.
    """
    command = [sys.executable, "-m", "ptuning", *arguments, "--port", str(port)]
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=said or subprocess.DEVNULL,
    ) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address + page, server, command)
            yield address
        finally:
            server.terminate()


def _wait_for(url: str, server: "subprocess.Popen[bytes]", command: Sequence[str]) -> None:
    deadline_s = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except URLError:
            time.sleep(POLL_S)
    raise SystemExit(f"{url} did not answer; type: {' '.join(command)}")
