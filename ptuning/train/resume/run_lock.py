"""One run per output directory: a lock that the operating system takes back from a killed process.

The lock is a POSIX record lock on `.run.lock`: it dies with its process, data-loading workers do
not inherit it, and NFS knows it. The file says who holds it. Where a file system has no locks, the
process named in the file decides.
"""

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LOCK_NAME = ".run.lock"
WINDOWS_LOCK_OFFSET = (
    1 << 20
)  # bytes; a locked byte cannot be read there, so it lies behind the text
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class DirectoryInUseError(ValueError):
    """Another run writes to the output directory."""


class RunLock:
    """Holds an output directory while it is entered; DirectoryInUseError where another run does."""

    def __init__(self, directory: Path) -> None:
        """Take the directory, which must be there and writable."""
        self.path = directory / LOCK_NAME
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """Take the lock, also one that a killed run left."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if _is_still(descriptor, self.path):
                break
            os.close(descriptor)  # its holder ended and deleted it between our two calls
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(_own_mark()).encode())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Delete the file while the lock is held, then let go of it."""
        if self._descriptor is None:
            return
        if os.name != "nt":  # Windows deletes no open file, and leaves an unlocked one
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _take(self, descriptor: int) -> None:
        try:
            taken = _lock(descriptor)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            taken = not _is_running(_read_mark(descriptor))
        if not taken:
            raise DirectoryInUseError(self._refusal(_read_mark(descriptor)))

    def _refusal(self, mark: dict[str, Any]) -> str:
        who = "another run"
        if mark:
            who = f"a run started {mark['started']} (process {mark['pid']} on {mark['host']})"
        return (
            f"--output_dir {self.path.parent} is being written by {who}; wait for it, stop it "
            f"(kill -INT {mark.get('pid', 'PID')} saves first), or give another --output_dir. If "
            f"that process is gone for certain, delete {self.path}."
        )


def _lock(descriptor: int) -> bool:
    """Lock without waiting and return whether that worked; OSError where there are no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, WINDOWS_LOCK_OFFSET, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Tell whether path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _own_mark() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "process_start": _process_start(os.getpid()),
    }


def _read_mark(descriptor: int) -> dict[str, Any]:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        mark = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return {}  # a run that has just made the file, or was killed doing so
    return mark if isinstance(mark, dict) and {"pid", "host", "started"} <= set(mark) else {}


def _is_running(mark: dict[str, Any]) -> bool:
    """Tell whether the process of a mark lives; one on another host cannot be seen, so it does."""
    if not mark or mark["pid"] == os.getpid():
        return False
    if mark["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(mark["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's process
    return mark.get("process_start") in (None, _process_start(int(mark["pid"])))


def _process_start(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks since boot, which no clock change moves.

    None where /proc does not tell. A number of a dead process that was given out again differs.
    """
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return content.rpartition(")")[2].split()[19]  # field 22 of proc_pid_stat(5)
