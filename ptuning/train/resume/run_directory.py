"""The output directory of a run: which checkpoints are in it, which may go, what a kill left."""

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ptuning.atomic_file import write_atomically
from ptuning.train.resume.checkpointing import (
    MANIFEST_NAME,
    REMOVED,
    UNFINISHED,
    delete_checkpoint,
    fault_of,
    move_into_place,
    read_facts,
)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LEFT_BEHIND = re.compile(rf"\.(checkpoint-\d+)({re.escape(UNFINISHED)}|{re.escape(REMOVED)})")
HALF_FILE = re.compile(r"\..+\.\d+\.tmp")  # what write_atomically leaves when it is killed

logger = logging.getLogger("main")


class OutputDirectoryError(ValueError):
    """The output directory cannot be used."""


def make_output_dir(directory: Path) -> None:
    """Make the output directory and see that it can be written, before anything heavy is loaded."""
    probe = directory / ".can_be_written"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"")
        probe.unlink(missing_ok=True)  # another process of this run may have been faster
    except OSError as error:
        raise OutputDirectoryError(
            f"--output_dir is {directory}, which cannot be written ({error.strerror}); give "
            "another folder."
        ) from error


def checkpoints(directory: Path) -> list[Path]:
    """Return the whole checkpoints in directory, oldest step first."""
    return [folder for folder in _all_checkpoints(directory) if is_whole(folder)]


def _all_checkpoints(directory: Path) -> list[Path]:
    """Return every checkpoint-N in directory, whole or not, oldest step first."""
    if not directory.is_dir():
        return []
    found = {
        int(match[1]): folder
        for folder in directory.iterdir()
        if (match := CHECKPOINT.fullmatch(folder.name)) and folder.is_dir()
    }
    return [found[step] for step in sorted(found)]


def is_whole(checkpoint: Path) -> bool:
    """Tell whether every file that was written is there in its full size."""
    return fault_of(checkpoint) is None


def checkpoint_to_resume(directory: Path, requested: str) -> Path | None:
    """Return the checkpoint `--resume_from_checkpoint` asks for; None for a first start with
    'auto'.

    'auto' and 'true' mean the newest whole one in directory; damaged ones are passed over and
    named. FileNotFoundError when a named one is not there or not whole, or when 'true' finds none.
    """
    if requested.lower() in ("auto", "true"):
        found = _newest_usable(directory)
        if found is None and requested.lower() == "true":
            raise FileNotFoundError(
                f"--resume_from_checkpoint is {requested}, but {directory} has no whole "
                "checkpoint-N; leave the flag out to start anew."
            )
        return found
    checkpoint = Path(requested)
    fault = fault_of(checkpoint, thorough=True) or _not_resumable(checkpoint)
    if fault is not None:
        raise FileNotFoundError(
            f"--resume_from_checkpoint is {checkpoint}, which cannot be gone on from: {fault}; "
            "give another checkpoint-N folder, or 'auto' for the newest whole one in --output_dir."
        )
    return checkpoint


def _newest_usable(directory: Path) -> Path | None:
    for checkpoint in reversed(_all_checkpoints(directory)):
        fault = fault_of(checkpoint, thorough=True) or _not_resumable(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, fault)
    return None


def _not_resumable(checkpoint: Path) -> str | None:
    facts = read_facts(checkpoint)
    if facts is None or facts.get("resumable", True):
        return None
    return (
        "it was written with --save_only_model and has no optimiser state (--init_from starts "
        "anew from its weights)"
    )


def last_sound(directory: Path) -> Path | None:
    """Return the newest whole checkpoint that was not written at a skipped step; None if none."""
    for checkpoint in reversed(checkpoints(directory)):
        facts = read_facts(checkpoint)
        if facts is None or facts.get("sound", True):
            return checkpoint
    return None


def rotate(directory: Path, limit: int | None, *, keep: Collection[Path] = ()) -> list[Path]:
    """Delete the oldest whole checkpoints above limit and return them; None or 0 keeps all.

    The newest, the newest sound one and those in `keep` stay, even above the limit.
    """
    if not limit or limit < 0:
        return []
    whole = checkpoints(directory)
    protected = {whole[-1].resolve()} if whole else set()
    protected |= {path.resolve() for path in (*keep, last_sound(directory)) if path is not None}
    surplus = max(0, len(whole) - max(limit, len(protected)))
    old = [folder for folder in whole if folder.resolve() not in protected][:surplus]
    for folder in old:
        delete_checkpoint(folder)
    return old


def sweep(directory: Path) -> None:
    """Clear away what a killed run left under temporary names.

    A checkpoint that was whole and lacked only its name gets it; half ones and half-deleted ones
    go. Only for a run that holds the directory's lock.
    """
    if not directory.is_dir():
        return
    for folder in sorted(directory.iterdir()):
        if HALF_FILE.fullmatch(folder.name) and folder.is_file():
            folder.unlink()
            continue
        match = LEFT_BEHIND.fullmatch(folder.name)
        if match is None:
            continue
        checkpoint = directory / match[1]
        if match[2] == UNFINISHED and _is_listed(folder) and not checkpoint.exists():
            move_into_place(folder, checkpoint)
            logger.info("%s was whole but not named yet: it is used", checkpoint)
        else:
            shutil.rmtree(folder)
            logger.info("Removed %s, which a stopped run left unfinished", folder)


def _is_listed(folder: Path) -> bool:
    """Tell whether a folder has its list of files, written last, and all that is on it."""
    return (folder / MANIFEST_NAME).is_file() and fault_of(folder, thorough=True) is None


def remove_checkpoints(directory: Path) -> int:
    """Delete every checkpoint-N in directory, whole or not, and return how many there were."""
    old = _all_checkpoints(directory)
    for folder in old:
        delete_checkpoint(folder)
    return len(old)
