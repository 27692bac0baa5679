"""How a run ends that does not end well: an exit code, and a text that says what to type.

| code | meaning |
|---|---|
| 2 | cannot start as asked: nothing was changed |
| 3 | the guard stopped it: steps in a row could not be used |
| 4 | out of memory |
| 5 | the disk is full or fails |
| 6 | another process of the run ended first; its message says why |
| 130, 143 | stopped by Ctrl-C, by SIGTERM |
"""

from pathlib import Path
from typing import NamedTuple

from ptuning.data.reading import DataError
from ptuning.train.base_model import BaseModelError
from ptuning.train.faults.disk_errors import DiskError, explain_disk_error, is_disk_error
from ptuning.train.faults.step_guard import BadStepsError
from ptuning.train.flags import Arguments, UsageError
from ptuning.train.memory.memory_errors import MemorySettings, OutOfMemoryStop, recomputes
from ptuning.train.processes.processes import is_lost_peer
from ptuning.train.resume.run_directory import OutputDirectoryError, checkpoints, last_sound
from ptuning.train.resume.run_lock import DirectoryInUseError
from ptuning.train.resume.signals import Stopped

CANNOT_START, BAD_STEPS, OUT_OF_MEMORY, DISK, LOST_PEER, CTRL_C = 2, 3, 4, 5, 6, 130
USAGE_ERRORS = (
    UsageError,
    DataError,
    BaseModelError,
    OutputDirectoryError,
    DirectoryInUseError,
    FileNotFoundError,
)


class Ending(NamedTuple):
    """What a run that stopped returns to the shell, and what it says."""

    exit_code: int
    text: str


def ending_of(error: BaseException, arguments: Arguments | None) -> Ending | None:
    """Explain an error that a user can do something about; None for a fault of the program.

    arguments is None when the flags themselves were wrong.
    """
    if isinstance(error, USAGE_ERRORS):
        return Ending(CANNOT_START, str(error))
    if isinstance(error, KeyboardInterrupt):
        return _stopped(error, arguments)
    if arguments is None:
        return None
    if isinstance(error, BadStepsError):
        return Ending(BAD_STEPS, f"{error} {_with_other_flags(arguments)}")
    if isinstance(error, OutOfMemoryStop):
        return Ending(OUT_OF_MEMORY, f"{error}\n{how_to_go_on(arguments)}")
    if is_disk_error(error) or isinstance(error, DiskError):
        text = str(error)
        if not isinstance(error, DiskError):
            output_dir = Path(arguments.training.output_dir)
            where = Path(str(getattr(error, "filename", None) or output_dir))
            text = explain_disk_error(error, "a result", where, None)
        return Ending(DISK, f"{text} Make room, then: {how_to_go_on(arguments)}")
    if arguments.training.world_size > 1 and is_lost_peer(error):
        return Ending(
            LOST_PEER, f"another process ended first, and says why ({_first_line(error)})"
        )
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _stopped(error: KeyboardInterrupt, arguments: Arguments | None) -> Ending:
    code = error.exit_code if isinstance(error, Stopped) else CTRL_C
    what = "stopped at once."
    if isinstance(error, Stopped) and error.saved:
        what = "stopped after a whole step."
    if arguments is None:
        return Ending(code, "stopped before it began.")
    return Ending(code, f"{what} {how_to_go_on(arguments)}")


def how_to_go_on(arguments: Arguments) -> str:
    """Say what a stopped run left and what to type, for python main.py and bash train.sh alike."""
    training = arguments.training
    left = checkpoints(Path(training.output_dir))
    if training.do_train and left:
        again = "type the same command with --resume_from_checkpoint auto at its end"
        if str(training.resume_from_checkpoint).lower() == "auto":
            again = "type the same command again"
        return f"{left[-1]} is whole: {again} to go on from there."
    if training.do_train:
        return (
            "No checkpoint was written yet: type the same command to start again, with a lower "
            "--save_steps if wanted."
        )
    return "Rows answered so far are kept: type the same command to go on."


def _with_other_flags(arguments: Arguments) -> str:
    good = last_sound(Path(arguments.training.output_dir))
    if good is None:
        return "Then type the same command with the changed flag."
    return (
        "Then type the same command with the changed flag and --overwrite_output_dir, or keep what "
        f"was learned: --init_from {good} with another --output_dir."
    )


def memory_settings(arguments: Arguments) -> MemorySettings:
    """Return what memory depends on, from the flags alone."""
    training = arguments.training
    return MemorySettings(
        device=training.device,
        train_batch=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        eval_batch=training.per_device_eval_batch_size,
        checkpointing=recomputes(training),
        quantization_bit=arguments.model.quantization_bit,
    )
