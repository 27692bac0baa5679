"""How a failed or stopped run ends: an exit code, and a text that says what to type.

| code | meaning |
|---|---|
| 2 | cannot start as asked: nothing was changed |
| 3 | stopped by the guard: several steps in a row could not be used |
| 4 | out of memory |
| 5 | the disk is full or fails |
| 6 | another process of the run ended first; its message says why |
| 130, 143 | stopped by Ctrl-C, by SIGTERM |
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from ptuning.data.raw_file import DataError
from ptuning.output import first_line
from ptuning.train.fit import Workload, free_bytes, memory_savers
from ptuning.train.guards import BadStepsError
from ptuning.train.processes import is_lost_peer, num_launched, process_name
from ptuning.train.run_config import RunConfig, UsageError
from ptuning.train.run_directory import OutputDirectoryError, RunDirectory
from ptuning.train.signals import Stopped
from ptuning.tunings.artefact import ModelError

CANNOT_START, BAD_STEPS, OUT_OF_MEMORY, DISK, LOST_PEER, CTRL_C = 2, 3, 4, 5, 6, 130
USAGE_ERRORS = (UsageError, DataError, ModelError, OutputDirectoryError, FileNotFoundError)

MIB, GIB = 2**20, 2**30
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# torch.save and safetensors raise errors of their own for a failed write.
DISK_WORDS = ("PytorchStreamWriter", "inline_container", "No space left", "os error 28")
# torch's CPU allocator raises a plain RuntimeError with these words.
MEMORY_WORDS = ("can't allocate memory", "not enough memory")


class Ending(NamedTuple):
    """The exit code and the message of a run that failed or was stopped."""

    exit_code: int
    text: str


def ending_of(error: BaseException, config: RunConfig) -> Ending | None:
    """Explain an error that a user can do something about; None for a bug.

    With several processes the text begins with the rank of this one.
    """
    ending = _explain(error, config)
    return ending and ending._replace(text=f"{process_name()}{ending.text}")


def _explain(error: BaseException, config: RunConfig) -> Ending | None:
    if isinstance(error, USAGE_ERRORS):
        return Ending(CANNOT_START, str(error))
    if isinstance(error, Stopped):
        what = "stopped after a complete step." if error.saved else "stopped at once."
        return Ending(error.exit_code, f"{what} {how_to_resume(config)}")
    if isinstance(error, KeyboardInterrupt):
        return Ending(CTRL_C, f"stopped at once. {how_to_resume(config)}")
    if isinstance(error, BadStepsError):
        return Ending(BAD_STEPS, f"{error} {_with_other_flags(config)}")
    if isinstance(error, OutOfMemoryStop):
        return Ending(OUT_OF_MEMORY, f"{error}\n{how_to_resume(config, changed=True)}")
    if is_disk_error(error) and not isinstance(error, DiskError):
        where = Path(str(getattr(error, "filename", None) or config.output_dir))
        error = DiskError(error, "a result", where)
    if isinstance(error, DiskError):
        return Ending(DISK, f"{error} Make room, then: {how_to_resume(config)}")
    if num_launched() > 1 and is_lost_peer(error):
        why = "its own message says why, unless it was killed"
        return Ending(LOST_PEER, f"another process ended first; {why} ({first_line(error)})")
    return None


def how_to_resume(config: RunConfig, *, changed: bool = False) -> str:
    """Say what a stopped run left and what to type, for python main.py and bash train.sh alike.

    changed: other flags are typed, so the resume has to be asked for.
    """
    directory = RunDirectory(config.output_dir)
    left = directory.checkpoints()
    asked = (config.resume_from_checkpoint or "").lower()
    if config.do_train and left:
        again = "type the same command again"
        if asked not in ("", "auto", "true") or (
            not asked and (config.overwrite_output_dir or changed)
        ):
            again = "type the same command with --resume_from_checkpoint auto at its end"
        return f"{left[-1]} is complete: {again} to resume from it."
    if config.do_train and directory.holds_a_model() and not config.overwrite_output_dir:
        return (
            f"What was trained is in {directory.path}: score it with --do_predict "
            f"--ptuning_checkpoint {directory.path} in place of --do_train, or add "
            "--overwrite_output_dir to train again."
        )
    if config.do_train:
        return (
            "No checkpoint was written yet: type the same command to start over, with a lower "
            "--save_steps if you like."
        )
    return "Rows answered so far are kept: type the same command to continue."


def _with_other_flags(config: RunConfig) -> str:
    directory = RunDirectory(config.output_dir)
    good = directory.last_sound()
    if good is None:
        replace = " and --overwrite_output_dir" if directory.checkpoints() else ""
        return f"Then type the same command with the changed flag{replace}."
    return (
        "Then type the same command with the changed flag and --overwrite_output_dir, or keep what "
        f"was learned: --init_from {good} with another --output_dir."
    )


# ---- Disks ----


class DiskError(RuntimeError):
    """Results could not be written."""

    def __init__(
        self, error: BaseException, what: str, where: Path, needed: int | None = None
    ) -> None:
        """Say what was being written where, and the bytes needed (None: unknown) and free."""
        reason = getattr(error, "strerror", None) or "the disk is full or fails"
        need = "" if needed is None else f"; it takes about {needed / MIB:,.1f} MiB"
        folder = next(path for path in (where, *where.parents) if path.exists())
        try:
            free = f"{shutil.disk_usage(folder).free / MIB:,.1f} MiB are free there"
        except OSError as failure:
            free = f"free space is not known ({failure.strerror})"
        super().__init__(f"{what} could not be written to {where}: {reason}{need}, {free}.")


def is_disk_error(error: BaseException) -> bool:
    """Return whether an error comes from a disk that is full or fails.

    >>> is_disk_error(OSError(errno.ENOSPC, "No space left on device"))
    True
    """
    if isinstance(error, OSError):
        return error.errno in DISK_ERRNOS
    return isinstance(error, Exception) and any(words in str(error) for words in DISK_WORDS)


# ---- Memory ----


class OutOfMemoryStop(RuntimeError):
    """A run ended for lack of memory."""

    def __init__(
        self,
        error: BaseException,
        workload: Workload,
        phase: str,
        batch_shape: tuple[int, int] | None = None,
    ) -> None:
        """Say what was computed, what memory the device had, and what to type."""
        batch = "" if batch_shape is None else " a batch of {} x {} tokens".format(*batch_shape)
        lines = [
            f"out of memory on {workload.device} while {phase}{batch}: "
            f"{memory_line(workload.device)} ({first_line(error)[:200]})",
            "Type the same command with one of these:",
            *(f"  {advice}" for advice in advice_for(workload, phase)),
        ]
        super().__init__("\n".join(lines))


@contextmanager
def memory_explained(
    phase: str, workload: Workload, batch_shape: tuple[int, int] | None = None
) -> Iterator[None]:
    """Turn an out-of-memory error into an OutOfMemoryStop.

    phase is "training", "validating", "answering" or "loading the base"; batch_shape is (rows,
    tokens of the longest row), None without a batch.
    """
    try:
        yield
    except OutOfMemoryStop:
        raise  # from an inner block, which knew the batch
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryStop(error, workload, phase, batch_shape) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."))
    True
    """
    is_plain = isinstance(error, RuntimeError) and any(w in str(error) for w in MEMORY_WORDS)
    return is_plain or isinstance(error, torch.OutOfMemoryError | MemoryError)


def advice_for(workload: Workload, phase: str) -> list[str]:
    """Return what to type, cheapest change first."""
    advice = [f"{change.flags} ({change.note})" for change in memory_savers(workload, phase)]
    if phase != "loading the base":
        advice.append("--max_source_length and --max_target_length lower (shorter rows)")
    return advice


def memory_line(device: torch.device) -> str:
    """Say how much of the device's memory is free, in GiB."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return (
            f"{free / GIB:.2f} GiB free of {total / GIB:.2f}, this process holds {held / GIB:.2f} "
            f"in tensors and {(reserved - held) / GIB:.2f} in its cache"
        )
    if device.type == "cpu":
        free, total = free_bytes(device), psutil.virtual_memory().total
        return f"{free / GIB:.2f} GiB free of {total / GIB:.2f}"
    return "its memory is not known"
