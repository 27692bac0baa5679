"""A process that has imported everything and forks a run of main.py on request, to be killed.

Started as `python -m tests.train.killing`. A request is one JSON line:
{"argv": [...], "log": path, "after_s": seconds | null, "at_operation": n | null}
The run dies by SIGKILL: from outside after so many seconds, or by itself in the middle of its n-th
file operation, a half-written file left behind. Writing is slowed down, so that a good part of the
random moments falls into it. The answer is one JSON line: {"status": exit status or -9,
"seconds": how long it ran, "operations": how many file operations it did, null when killed}
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train.preloading import import_for_runs

FLUSH_S = 0.004  # added to every flush


def main() -> None:
    """Answer requests until the end of standard input."""
    import_for_runs()
    answer("ready")
    for line in sys.stdin:
        answer(json.dumps(run_and_kill(json.loads(line))))


def answer(line: str) -> None:
    """Write one line to the test that asked."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run_and_kill(request: dict[str, Any]) -> dict[str, Any]:
    """Fork one run, kill it if asked, and wait for its end."""
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        be_the_run(request, writer)
    os.close(writer)
    if request["after_s"] is not None:
        wait_or_kill(pid, request["after_s"])
    told = os.read(reader, 100)  # ends with the process at the latest
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "operations": int(told) if told else None,
    }


def wait_or_kill(pid: int, after_s: float) -> None:
    """Kill the run after so many seconds, unless it has ended before."""
    end = time.monotonic() + after_s
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)


def be_the_run(request: dict[str, Any], writer: int) -> None:
    """Run main.py's main in this forked process; does not return."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        import main

        operations = watch_files(request["at_operation"])
        code = main.main(request["argv"])
        os.write(writer, str(operations[0]).encode())
    finally:
        sys.stdout.flush()
        os._exit(code)


def watch_files(fatal: int | None) -> list[int]:
    """Count file operations, and die in the fatal one; return the counter."""
    import torch

    count = [0]

    def is_fatal() -> bool:
        count[0] += 1
        return count[0] == fatal

    def half(path: str | Path) -> None:
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    def watched(real: Callable[..., Any], *, slow: float = 0.0) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_fatal():
                if count[0] % 2:
                    real(*args, **kwargs)  # die right after it, else right before
                die()
            time.sleep(slow)
            return real(*args, **kwargs)

        return call

    def save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        fatal_now = is_fatal()
        real_save(content, path, *args, **kwargs)
        if fatal_now:
            half(path)

    def write_text(path: Path, *args: Any, **kwargs: Any) -> int:
        fatal_now = is_fatal()
        written = real_write_text(path, *args, **kwargs)
        if fatal_now:
            half(path)
        return written

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        if is_fatal():
            next(file for file in Path(path).rglob("*") if file.is_file()).unlink()
            die()
        real_rmtree(path, *args, **kwargs)

    real_save, real_write_text, real_rmtree = torch.save, Path.write_text, shutil.rmtree
    torch.save, shutil.rmtree = save, rmtree
    Path.write_text = write_text  # type: ignore[method-assign]
    os.fsync = watched(os.fsync, slow=FLUSH_S)
    os.rename, os.replace = watched(os.rename), watched(os.replace)
    return count


def die() -> None:
    """End this process as the kernel's out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
