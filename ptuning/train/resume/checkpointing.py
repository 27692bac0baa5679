"""Checkpoints that are whole or not there: written under a temporary name, flushed, then renamed.

`checkpoint.json` is written last and lists every other file with its size and checksum, so a
checkpoint is judged without knowing what is in it. Checkpoints of earlier versions have no such
list; they are judged by the files that those versions wrote. Nothing here asks a clock.
"""

import json
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, TypedDict

MANIFEST_NAME = "checkpoint.json"
FORMAT_VERSION = 1
UNFINISHED = ".unfinished"  # .checkpoint-10.unfinished is being written
REMOVED = ".removed"  # .checkpoint-10.removed is being deleted
# What earlier versions wrote last: a checkpoint without them was cut short.
LEGACY_FILES = ("trainer_state.json", "prefix_config.json", "prefix.safetensors")
READ_BYTES = 1 << 20


class CheckpointFacts(TypedDict):
    """What a checkpoint says of itself, besides its files.

    `resumable`: it holds the optimiser. `sound`: the step it was written at was not a skipped one.
    `rows` is a fingerprint of the training rows; `rows_per_step` counts them over all processes.
    """

    step: int
    processes: int
    resumable: bool
    sound: bool
    rows: str
    rows_per_step: int


def staging_path(checkpoint: Path) -> Path:
    """Return the temporary name that a checkpoint is written under.

    >>> staging_path(Path("out/checkpoint-10")).name
    '.checkpoint-10.unfinished'
    """
    return checkpoint.with_name(f".{checkpoint.name}{UNFINISHED}")


def start_checkpoint(checkpoint: Path) -> None:
    """Make the empty folder to write into, in place of what a killed run left there."""
    staging = staging_path(checkpoint)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def finish_checkpoint(checkpoint: Path, facts: CheckpointFacts) -> None:
    """Flush the files of `staging_path`, list them, and give the folder its own name.

    A folder that has the name already (a half one, or one of a run that took other steps) goes.
    """
    staging = staging_path(checkpoint)
    files = {
        path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(staging.rglob("*"))
        if path.is_file()
    }
    for name in files:
        _flush(staging / name)
    content = {"format_version": FORMAT_VERSION, **facts, "files": files}
    manifest = staging / MANIFEST_NAME
    manifest.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush(manifest)
    for folder in [path for path in staging.rglob("*") if path.is_dir()]:
        _flush(folder)
    _flush(staging)
    move_into_place(staging, checkpoint)


def move_into_place(staging: Path, checkpoint: Path) -> None:
    """Rename a whole staging folder; the folder that had its name is deleted afterwards."""
    removed = checkpoint.with_name(f".{checkpoint.name}{REMOVED}")
    if checkpoint.exists():
        if removed.exists():
            shutil.rmtree(removed)
        os.rename(checkpoint, removed)
    os.rename(staging, checkpoint)
    _flush(checkpoint.parent)
    if removed.exists():
        shutil.rmtree(removed)


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; one that is half deleted does not bear its name any more."""
    removed = checkpoint.with_name(f".{checkpoint.name}{REMOVED}")
    if removed.exists():
        shutil.rmtree(removed)
    os.rename(checkpoint, removed)
    shutil.rmtree(removed)


def read_facts(checkpoint: Path) -> dict[str, Any] | None:
    """Return checkpoint.json; None for an earlier version's checkpoint, which has none.

    ValueError for one that cannot be read.
    """
    path = checkpoint / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{MANIFEST_NAME} cannot be read") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError(f"{MANIFEST_NAME} is not a list of files")
    return content


def fault_of(checkpoint: Path, *, thorough: bool = False) -> str | None:
    """Say what is wrong with a checkpoint; None for a whole one.

    Sizes are always compared; thorough reads every file once and compares checksums too.
    """
    try:
        facts = read_facts(checkpoint)
    except ValueError as error:
        return str(error)
    if facts is None:
        return _legacy_fault(checkpoint, thorough)
    for name, wanted in facts["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"has no {name}"
        found = path.stat().st_size
        if found != wanted["bytes"]:
            return f"{name} has {found:,} bytes of {wanted['bytes']:,}"
        if thorough and _crc32(path) != wanted["crc32"]:
            return f"{name} has other content than was written"
    return None


def _legacy_fault(checkpoint: Path, thorough: bool) -> str | None:
    missing = [name for name in LEGACY_FILES if not (checkpoint / name).is_file()]
    if missing:
        return f"has no {', '.join(missing)}"
    if not thorough:
        return None
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
        if path.suffix == ".json" and not _is_json(path):
            return f"{path.name} is cut short"
        if path.suffix == ".safetensors" and path.stat().st_size != _safetensors_bytes(path):
            return f"{path.name} is cut short"
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _safetensors_bytes(path: Path) -> int:
    """Return the size that the header of a safetensors file promises; -1 for a broken header."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return -1
        length = struct.unpack("<Q", start)[0]
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return -1
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a loss of power."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
