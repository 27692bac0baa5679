"""Which layers are computed again in the backward pass, and how many have to be.

A recomputed layer keeps its input alone, so memory falls and every such layer costs another forward
pass. The first layers are the ones to recompute: when their turn comes in the backward pass, what
the later layers kept is gone already.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptuning.model.backbone import ChatGLMModel
from ptuning.model.layer import Layer
from ptuning.train.memory.memory_model import HEAP_BLOCK, Batch, ModelSize, training_memory

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGE_BLOCK_BYTES = 256 * 1024
FREE_SHARE = 0.9  # of free memory may be planned; allocators lose the rest between blocks


def recompute_layers(
    model: nn.Module, num_layers: int, options: Mapping[str, Any] | None = None
) -> None:
    """Recompute the model's first num_layers layers in the backward pass, 0 for none.

    options are torch.utils.checkpoint's; None is use_reentrant=False. transformers' own switch does
    the same for all layers, and makes the embedding want a gradient that nobody uses. ValueError
    for more layers than there are.
    """
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if not 0 <= num_layers <= len(layers):
        raise ValueError(
            f"--checkpoint_layers is {num_layers} and the model has {len(layers)} layers; use 0 to "
            f"{len(layers)}."
        )
    if next(model.parameters()).device.type == "cpu":
        if num_layers:
            give_back_freed_memory()
        else:
            keep_freed_memory()
    function: Any = partial(checkpoint, **(options or {"use_reentrant": False}))
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < num_layers
        layer._gradient_checkpointing_func = function
    for module in model.modules():
        if isinstance(module, ChatGLMModel):
            module.gradient_checkpointing = num_layers > 0


def give_back_freed_memory() -> bool:
    """Have glibc return every freed block above 256 KiB to the system at once; False elsewhere.

    By itself it raises that limit as blocks are freed and keeps them in pieces: a small int4 model
    that recomputed every layer held 1.21 GB in place of 0.72. New blocks cost a little more time.
    """
    return _set_malloc(mmap=LARGE_BLOCK_BYTES, trim=LARGE_BLOCK_BYTES, pad=0)


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks up to 32 MiB for the next step; False elsewhere.

    By itself it gives the top of the heap back and faults it in anew, 20,000 pages in a step of a
    small model: little while the machine is at rest, a tenth of the step on a crowded one.
    """
    return _set_malloc(mmap=HEAP_BLOCK, trim=2**31 - 1, pad=2 * HEAP_BLOCK)


def _set_malloc(*, mmap: int, trim: int, pad: int) -> bool:
    """Set glibc's limits in bytes, and give back what is free beyond them."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        return False
    limits = {M_MMAP_THRESHOLD: mmap, M_TRIM_THRESHOLD: trim, M_TOP_PAD: pad}
    are_set = [bool(libc.mallopt(name, limit)) for name, limit in limits.items()]
    libc.malloc_trim(pad)
    return all(are_set)


class Choice(NamedTuple):
    """How many layers are recomputed, and the memory that a step needs beside the loaded model."""

    num_recomputed: int
    num_layers: int
    needed: int  # bytes, with that many recomputed
    needed_without: int  # bytes, with none
    free: int  # bytes
    reason: str  # "auto", "true" or "false", as asked

    @property
    def fits(self) -> bool:
        """Whether the step is expected to fit."""
        return self.needed <= FREE_SHARE * self.free

    def describe(self) -> str:
        """Say in one line what was chosen and from which numbers.

        >>> Choice(0, 28, 4 * 10**9, 4 * 10**9, 20 * 10**9, "auto").describe()
        'Gradient checkpointing auto: no layer is recomputed; a step needs 4.00 GB beside the model, 20.00 GB are free'
        """  # noqa: E501
        named = {0: "no layer is", self.num_layers: f"all {self.num_layers} layers are"}
        count = named.get(self.num_recomputed, f"{self.num_recomputed} of {self.num_layers} are")
        without = ""
        if self.num_recomputed:
            without = f", {self.needed_without / 1e9:.2f} without"
        text = (
            f"Gradient checkpointing {self.reason}: {count} recomputed; a step needs "
            f"{self.needed / 1e9:.2f} GB beside the model{without}, {self.free / 1e9:.2f} GB are "
            "free"
        )
        return text if self.fits else f"{text}: it may not fit"


def choose_recomputed(
    wanted: str,
    size: ModelSize,
    batch: Batch,
    *,
    free: int,
    on_cpu: bool,
    accumulates: bool,
    num_layers: int | None = None,
) -> Choice:
    """Choose for --gradient_checkpointing auto, true or false; free is in bytes.

    num_layers is --checkpoint_layers: so many, unless wanted is false; None leaves it to auto, and
    means all for true. Auto takes the fewest layers that fit, or those that need the least.
    """
    needs = _needs(size, batch, on_cpu=on_cpu, accumulates=accumulates)
    none = needs(0)
    if wanted == "false":
        chosen = 0
    elif num_layers is not None:
        chosen = min(num_layers, size.num_layers)
    elif wanted == "true":
        chosen = size.num_layers
    else:
        counts = range(size.num_layers + 1)
        least = min(counts, key=needs)
        chosen = next((count for count in counts if needs(count) <= FREE_SHARE * free), least)
    return Choice(chosen, size.num_layers, needs(chosen), none, free, wanted)


def _needs(
    size: ModelSize, batch: Batch, *, on_cpu: bool, accumulates: bool
) -> Callable[[int], int]:
    def needed(count: int) -> int:
        return training_memory(
            size, batch, on_cpu=on_cpu, recomputed_layers=count, accumulates=accumulates
        ).of_step

    return needed


def free_bytes(device: torch.device, num_processes: int = 1) -> int:
    """Return the memory that is free on a device now, in bytes; of a CPU's, each process's part."""
    if device.type == "cuda":
        # What torch's allocator keeps for reuse is free to us too.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return int(psutil.virtual_memory().available) // num_processes
