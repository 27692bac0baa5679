"""Out of memory, on a GPU or the CPU: which setting to change, with the numbers of this run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ptuning.train.memory.recomputing import free_bytes

GIB = 2**30
# torch's CPU allocator raises a plain RuntimeError with these words.
CPU_WORDS = ("can't allocate memory", "not enough memory")


class OutOfMemoryStop(RuntimeError):
    """A run ended for lack of memory; the text says which setting to change."""


@dataclass(frozen=True)
class MemorySettings:
    """The settings of a run that memory depends on; sizes in rows."""

    device: torch.device
    train_batch: int
    accumulation: int
    eval_batch: int
    checkpointing: bool
    quantization_bit: int | None


def recomputes(args: Any) -> bool:
    """Tell whether the flags ask for gradient checkpointing of every layer."""
    if hasattr(args, "recomputing"):
        return str(args.recomputing).lower() == "true"
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


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
    settings: MemorySettings,
    *,
    phase: str,
    batch_shape: tuple[int, int] | None = None,
) -> str:
    """Say what was computed, what the device had, and what to type, cheapest change first.

    phase is "training", "validating", "answering" or "loading the base"; batch_shape is rows and
    tokens of the longest row, None where no batch was at work.
    """
    batch = "" if batch_shape is None else f" a batch of {batch_shape[0]} x {batch_shape[1]} tokens"
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    lines = [
        f"out of memory on {settings.device} while {phase}{batch}: "
        f"{memory_line(settings.device)} ({first_line[:200]})",
        "Type the same command with one of these:",
        *(f"  {advice}" for advice in advice_for(settings, phase)),
    ]
    return "\n".join(lines)


def advice_for(settings: MemorySettings, phase: str) -> list[str]:
    """Return what to type, cheapest first; what is in use already is left out."""
    advice = []
    if phase == "training":
        if settings.train_batch > 1:
            rows, total = settings.train_batch, settings.train_batch * settings.accumulation
            smaller = next(size for size in range(rows // 2, 0, -1) if total % size == 0)
            advice.append(
                f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps "
                f"{total // smaller} (now {rows} x {settings.accumulation}; the same {total} rows "
                "per step)"
            )
        if not settings.checkpointing:
            advice.append("--gradient_checkpointing true (less memory, about a third more time)")
    elif phase in ("validating", "answering") and settings.eval_batch > 1:
        advice.append(
            f"--per_device_eval_batch_size {settings.eval_batch // 2} (now {settings.eval_batch})"
        )
    if settings.quantization_bit != 4:
        now = f"now {settings.quantization_bit} bits" if settings.quantization_bit else "now off"
        advice.append(f"--quantization_bit 4 (the frozen base in a quarter of 16 bits; {now})")
    if phase != "loading the base":
        advice.append("--max_source_length and --max_target_length lower: shorter rows")
    return advice


def memory_line(device: torch.device) -> str:
    """Return the device's memory in words, in GiB."""
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
    phase: str, settings: MemorySettings, batch_shape: tuple[int, int] | None = None
) -> Iterator[None]:
    """Turn a lack of memory inside into an OutOfMemoryStop that says what to type."""
    try:
        yield
    except OutOfMemoryStop:
        raise  # explained further in, where the batch was known
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = explain_out_of_memory(error, settings, phase=phase, batch_shape=batch_shape)
        raise OutOfMemoryStop(text) from error
