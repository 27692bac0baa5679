"""Out of memory on a GPU or the CPU: which setting to change, with the numbers of this run."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ptuning.train.fit import Workload, free_bytes, memory_savers

GIB = 2**30
# torch's CPU allocator raises a plain RuntimeError with these words.
CPU_WORDS = ("can't allocate memory", "not enough memory")


class OutOfMemoryStop(RuntimeError):
    """A run ended for lack of memory; the text says which setting to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory was short.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."))
    True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_WORDS)


def explain_out_of_memory(
    error: BaseException,
    workload: Workload,
    *,
    phase: str,
    batch_shape: tuple[int, int] | None = None,
) -> str:
    """Say what was computed, what memory the device had, and what to type, cheapest change first.

    phase is "training", "validating", "answering" or "loading the base"; batch_shape is (rows,
    tokens of the longest row), None without a batch.
    """
    batch = "" if batch_shape is None else f" a batch of {batch_shape[0]} x {batch_shape[1]} tokens"
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    lines = [
        f"out of memory on {workload.device} while {phase}{batch}: "
        f"{memory_line(workload.device)} ({first_line[:200]})",
        "Type the same command with one of these:",
        *(f"  {advice}" for advice in advice_for(workload, phase)),
    ]
    return "\n".join(lines)


def advice_for(workload: Workload, phase: str) -> list[str]:
    """Return what to type, cheapest first."""
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


@contextmanager
def memory_explained(
    phase: str, workload: Workload, batch_shape: tuple[int, int] | None = None
) -> Iterator[None]:
    """Turn an out-of-memory error into an OutOfMemoryStop that says what to type."""
    try:
        yield
    except OutOfMemoryStop:
        raise  # explained already, where the batch was known
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = explain_out_of_memory(error, workload, phase=phase, batch_shape=batch_shape)
        raise OutOfMemoryStop(text) from error
