"""A disk that is full or fails: told apart from other errors, and explained with its numbers."""

import errno
import shutil
from pathlib import Path

MIB = 2**20
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# torch.save and safetensors have errors of their own for a write that failed.
DISK_WORDS = ("PytorchStreamWriter", "inline_container", "No space left", "os error 28")


class DiskError(RuntimeError):
    """Results could not be written; the text says what was tried and what to type."""


def is_disk_error(error: BaseException) -> bool:
    """Tell whether an error comes from a disk that is full or fails.

    >>> is_disk_error(OSError(errno.ENOSPC, "No space left on device"))
    True
    """
    if isinstance(error, OSError):
        return error.errno in DISK_ERRNOS
    return isinstance(error, Exception) and any(words in str(error) for words in DISK_WORDS)


def explain_disk_error(error: BaseException, what: str, where: Path, needed: int | None) -> str:
    """Say what was being written where, and the bytes needed (None: not known) and free."""
    reason = error.strerror if isinstance(error, OSError) else None
    reason = reason or "the disk is full or fails"
    need = "" if needed is None else f"; it takes about {needed / MIB:,.1f} MiB"
    return f"{what} could not be written to {where}: {reason}{need}, {free_space(where)}."


def free_space(where: Path) -> str:
    """Return the free space of the file system that holds where, in words."""
    while not where.exists() and where != where.parent:
        where = where.parent
    try:
        return f"{shutil.disk_usage(where).free / MIB:,.1f} MiB are free there"
    except OSError as error:
        return f"free space is not known ({error.strerror})"
