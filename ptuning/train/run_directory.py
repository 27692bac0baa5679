"""The output directory of a run: whole checkpoints in it, and what an earlier run left."""

import re
import shutil
from pathlib import Path

from ptuning.atomic_file import write_atomically

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Written last by the trainer and by save_prefix: a checkpoint without them was cut short.
NEEDED_FILES = ("trainer_state.json", "prefix_config.json", "prefix.safetensors")


class OutputDirectoryError(ValueError):
    """The output directory cannot be used."""


def make_output_dir(directory: Path) -> None:
    """Make the output directory and see that it can be written, before anything heavy is loaded."""
    probe = directory / ".can_be_written"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise OutputDirectoryError(
            f"--output_dir is {directory}, which cannot be written ({error.strerror}); give "
            "another folder."
        ) from error


def checkpoints(directory: Path) -> list[Path]:
    """Return the whole checkpoints in directory, oldest step first."""
    if not directory.is_dir():
        return []
    found = {
        int(match[1]): folder
        for folder in directory.iterdir()
        if (match := CHECKPOINT.fullmatch(folder.name)) and is_whole(folder)
    }
    return [found[step] for step in sorted(found)]


def is_whole(checkpoint: Path) -> bool:
    """Tell whether every file that a resumed run needs is there."""
    return all((checkpoint / name).is_file() for name in NEEDED_FILES)


def checkpoint_to_resume(directory: Path, requested: str) -> Path | None:
    """Return the checkpoint `--resume_from_checkpoint` asks for; None for a first start with
    'auto'.

    'auto' and 'true' mean the newest whole one in directory. FileNotFoundError when a named one is
    not there or not whole, or when 'true' finds none.
    """
    if requested.lower() in ("auto", "true"):
        found = checkpoints(directory)
        if found:
            return found[-1]
        if requested.lower() == "auto":
            return None
        raise FileNotFoundError(
            f"--resume_from_checkpoint is {requested}, but {directory} has no whole checkpoint-N; "
            f"leave the flag "
            "out to start anew."
        )
    checkpoint = Path(requested)
    if not is_whole(checkpoint):
        missing = [name for name in NEEDED_FILES if not (checkpoint / name).is_file()]
        raise FileNotFoundError(
            f"--resume_from_checkpoint is {checkpoint}, which has no {', '.join(missing)}; give a "
            f"checkpoint-N "
            "folder, or 'auto' for the newest whole one in --output_dir."
        )
    return checkpoint


def remove_checkpoints(directory: Path) -> int:
    """Delete every checkpoint-N in directory, whole or not, and return how many there were."""
    old = [p for p in directory.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    for folder in old:
        shutil.rmtree(folder)
    return len(old)
