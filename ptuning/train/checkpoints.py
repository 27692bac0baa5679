"""One checkpoint: complete or not there. Written under a temporary name, flushed, then renamed.

`checkpoint.json` is written last and lists every other file with its size and checksum, so that a
checkpoint can be verified without knowing its contents. Each rank's `run_state_N.json` holds what
transformers does not store and an exact resume needs.
"""

import base64
import json
import os
import random
import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader

MANIFEST_NAME = "checkpoint.json"
FORMAT_VERSION = 2
STATE_NAME = "run_state_{rank}.json"
STATE_FORMAT = 1
UNFINISHED = ".unfinished"  # .checkpoint-10.unfinished is being written
REMOVED = ".removed"  # .checkpoint-10.removed is being deleted
READ_BYTES = 1 << 20


class CheckpointFacts(TypedDict):
    """What a checkpoint records about its run, besides the list of its files."""

    step: int
    max_steps: int
    processes: int
    resumable: bool  # it holds the optimizer
    sound: bool  # the step it was written at was not skipped
    rows: str  # fingerprint of the training rows
    rows_per_step: int  # over all processes


def staging_path(checkpoint: Path) -> Path:
    """Return the temporary name that a checkpoint is written under."""
    return checkpoint.with_name(f".{checkpoint.name}{UNFINISHED}")


def start_checkpoint(checkpoint: Path) -> None:
    """Make the empty folder to write to, replacing what a killed run left there."""
    staging = staging_path(checkpoint)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def finish_checkpoint(checkpoint: Path, facts: CheckpointFacts) -> None:
    """List the files of `staging_path`, flush them, and rename the folder.

    A folder that already has the name (damaged, or of a run that was overwritten) is replaced.
    """
    staging = staging_path(checkpoint)
    files = {
        path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(staging.rglob("*"))
        if path.is_file()
    }
    content = {"format_version": FORMAT_VERSION, **facts, "files": files}
    manifest = staging / MANIFEST_NAME
    manifest.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in [*staging.rglob("*"), staging]:
        _flush(path)
    move_into_place(staging, checkpoint)


def move_into_place(staging: Path, checkpoint: Path) -> None:
    """Rename a complete staging folder; then delete the folder that had its name."""
    removed = _set_aside(checkpoint)
    os.rename(staging, checkpoint)
    _flush(checkpoint.parent)
    if removed.exists():
        shutil.rmtree(removed)


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, renamed first so that a half-deleted one is never found."""
    shutil.rmtree(_set_aside(checkpoint))


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint, if it exists, to the name it is deleted under; return that name."""
    removed = checkpoint.with_name(f".{checkpoint.name}{REMOVED}")
    if removed.exists():
        shutil.rmtree(removed)
    if checkpoint.exists():
        os.rename(checkpoint, removed)
    return removed


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """Return checkpoint.json: CheckpointFacts and `files`; ValueError if it cannot be read."""
    path = checkpoint / MANIFEST_NAME
    if not checkpoint.is_dir():
        raise ValueError("it does not exist")
    if not path.is_file():
        raise ValueError(f"has no {MANIFEST_NAME}, which this toolkit writes to every checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{MANIFEST_NAME} cannot be read") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{MANIFEST_NAME} is not of format {FORMAT_VERSION}")
    return content


def fault_of(checkpoint: Path, *, thorough: bool = False) -> str | None:
    """Say what is wrong with a checkpoint, None if it is intact; thorough compares checksums."""
    try:
        facts = read_facts(checkpoint)
    except ValueError as error:
        return str(error)
    for name, wanted in facts["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"has no {name}"
        found = path.stat().st_size
        if found != wanted["bytes"]:
            return f"{name} has {found:,} bytes of {wanted['bytes']:,}"
        if thorough and _crc32(path) != wanted["crc32"]:
            return f"the checksum of {name} is wrong"
    return None


def why_not_resumable(checkpoint: Path) -> str | None:
    """Say why no run can resume from a checkpoint; None if one can. Reads every file once."""
    fault = fault_of(checkpoint, thorough=True)
    if fault is None and not read_facts(checkpoint)["resumable"]:
        return "it was written with --save_only_model and has no optimizer state"
    return fault


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- The state of one process ----


@dataclass
class RunState:
    """The part of a run's state that `trainer_state.json` does not hold.

    A sampler without a seed of its own draws the order of the rows from the random state at the
    start of the epoch.
    """

    loss_since_log: float = 0.0  # sum over the steps since the last log line
    loss_logged: float = 0.0  # sum over the steps before it
    last_logged_step: int = 0
    skipped: int = 0  # steps of the whole run
    skipped_since_log: int = 0
    skipped_in_a_row: int = 0
    epoch_random_state: dict[str, Any] = field(default_factory=dict)


def save_run_state(checkpoint: Path, rank: int, state: RunState) -> None:
    """Write one rank's state to a checkpoint; JSON keeps floats bit for bit."""
    content = {"format_version": STATE_FORMAT, **asdict(state)}
    path = checkpoint / STATE_NAME.format(rank=rank)
    path.write_text(json.dumps(content), encoding="utf-8")


def load_run_state(checkpoint: Path, rank: int) -> RunState:
    """Read one rank's state, or rank 0's if fewer ranks wrote the checkpoint."""
    path = checkpoint / STATE_NAME.format(rank=rank)
    if not path.is_file():
        path = checkpoint / STATE_NAME.format(rank=0)
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("format_version") != STATE_FORMAT:
        raise ValueError(
            f"{path} was written by another version of this toolkit; resume with that version, or "
            f"start a new training from its weights: --init_from {checkpoint}"
        )
    return RunState(**content)


def capture_random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's CPU generators as JSON values."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002  # what trainers seed
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    torch_state = torch.get_rng_state().numpy().tobytes()
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy_state,
        "torch": base64.b64encode(torch_state).decode("ascii"),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a captured state."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = {**state["numpy"], "state": dict(state["numpy"]["state"])}
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch_state = np.frombuffer(base64.b64decode(state["torch"]), dtype=np.uint8).copy()
    torch.set_rng_state(torch.from_numpy(torch_state))


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Set the epoch of every sampler of a loader, however deep a launcher wrapped it."""
    sampler: Any = loader.batch_sampler
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
