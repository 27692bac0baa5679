"""Step 1a of 5: a data file to its bytes, unpacked, or what it is instead of data.

What a file is, its first bytes say and not its name: a download often has the wrong ending.
"""

import glob
import gzip
import re
import shlex
import zlib
from pathlib import Path
from typing import NamedTuple

from ptuning.data.raw_row import DataError

JSON_SUFFIXES = (".json", ".jsonl")
DELIMITED_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIX = ".txt"  # JSON or delimited fields
PARQUET_SUFFIX = ".parquet"
PARQUET_MAGIC = b"PAR1"
_SUFFIXES = (*JSON_SUFFIXES, *DELIMITED_SUFFIXES, TEXT_SUFFIX, PARQUET_SUFFIX)
_GZIP_SUFFIX = ".gz"
_GZIP_MAGIC = b"\x1f\x8b"
_HEAD_BYTES = 512
_SAVE_SHEET = 'save the sheet as "CSV UTF-8" and give that file'

# (pattern of the first bytes, what the file is, what to do about it); {file} is its quoted path
_FOREIGN = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), noun, cure)
    for pattern, noun, cure in (
        (
            rb"PK\x03\x04.{26,60}(\[Content_Types\]|docProps/|xl/|_rels/|mimetypeapplication/vnd)",
            "an Office file",
            _SAVE_SHEET,
        ),
        (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "type: unzip {file}"),
        (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office file of the old kind", _SAVE_SHEET),
        (rb"BZh[1-9]1AY&SY", "packed with bzip2", "type: bzip2 -dk {file}"),
        (rb"\xfd7zXZ\x00", "packed with xz", "type: xz -dk {file}"),
        (rb"\x28\xb5\x2f\xfd", "packed with zstd", "type: zstd -d {file}"),
        (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "type: 7z x {file}"),
        (rb"Rar!\x1a\x07", "a rar archive", "type: unrar x {file}"),
        (rb".{257}ustar", "a tar archive", "type: tar xf {file}"),
        (rb"%PDF-", "a PDF", "give the table that it was made from"),
        (
            rb"version https://git-lfs",
            "a git-lfs pointer, not the data",
            "type: git lfs pull",
        ),
        (
            rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)\b",
            "a web page, not data",
            "download the raw file",
        ),
    )
]


class Contents(NamedTuple):
    """The bytes of a file, unpacked, and the ending that says how they are written."""

    content: bytes
    suffix: str
    is_gzip: bool


def read_contents(path: Path) -> Contents:
    """Read a whole file; DataError where it cannot be read or holds no rows of text."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == _GZIP_SUFFIX:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_HEAD_BYTES)
            _refuse_foreign(path, head)
            if suffix not in _SUFFIXES:
                raise DataError(path, None, _say_unknown(path, suffix))
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise unreadable(path, error) from error
    is_gzip = head.startswith(_GZIP_MAGIC)
    if is_gzip:
        content = _unpack(path, content)
        if content.startswith(_GZIP_MAGIC):
            raise DataError(path, None, f"packed with gzip twice; type: gunzip {_quoted(path)}")
        _refuse_foreign(path, content[:_HEAD_BYTES])
    return Contents(content, suffix, is_gzip)


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the DataError for a file that the operating system does not let be read."""
    if path.is_dir():
        return DataError(
            path, None, f"cannot be read: it is a folder; give its files, such as '{path}/*.jsonl'."
        )
    if glob.has_magic(str(path)):
        return DataError(path, None, f"no file matches this pattern, seen from {Path.cwd()}.")
    return DataError(
        path,
        None,
        f"cannot be read ({error.strerror}) at {path.absolute()}; check the path and its "
        "permissions.",
    )


def _refuse_foreign(path: Path, head: bytes) -> None:
    for pattern, noun, cure in _FOREIGN:
        if pattern.match(head):
            raise DataError(path, None, f"{noun}; {cure.format(file=_quoted(path))}")


def _say_unknown(path: Path, suffix: str) -> str:
    known = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
    if path.suffix.lower() == _GZIP_SUFFIX:
        return (
            f"the ending {suffix or '(none)'} before .gz is unknown; use {known} there, as in "
            "rows.jsonl.gz."
        )
    return f"the ending {suffix or '(none)'} is unknown; use {known}, also with .gz behind it."


def _unpack(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        broken = "ends too early" if isinstance(error, EOFError) else f"is broken ({error})"
        raise DataError(
            path, None, f"packed with gzip, and the archive {broken}; download or copy it again."
        ) from error


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
