"""Which layers are computed again in the backward pass, and how many have to be; the loss's chunk.

A recomputed layer keeps its input alone, so memory falls and every such layer costs another forward
pass. The first layers are the ones to recompute: when their turn comes in the backward pass, what
the later layers kept is gone already.
"""

import ctypes
import sys
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptuning.model.backbone import ChatGLMModel
from ptuning.model.layer import Layer
from ptuning.model.quantization.backends.blockwise import block_bytes, device_block_bytes
from ptuning.train.memory.memory_model import (
    HEAP_BLOCK,
    Batch,
    ModelSize,
    forms_chunks,
    training_memory,
)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGE_BLOCK_BYTES = 256 * 1024
FREE_SHARE = 0.9  # of free memory may be planned; allocators lose the rest between blocks
# Tokens of the loss formed at once on a GPU where memory is short. Every chunk reads the output
# head, forwards and backwards: 16 tokens cost a row of 64 answer tokens about as much as four
# layers computed again, and fewer save next to nothing.
SMALLER_CHUNKS = (256, 128, 64, 32, 16)
# cuBLAS's workspace, as PyTorch allocates it: parseChosenWorkspaceSize in
# https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/cuda/CublasHandlePool.cpp
HOPPER = 9  # major compute capability
HOPPER_WORKSPACE, OTHER_WORKSPACE = 8 * 4096 * 1024, (2 * 4096 + 8 * 16) * 1024


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
    needed: int  # bytes, as chosen
    needed_without: int  # bytes, with no layer recomputed and the device's own chunk
    free: int  # bytes
    reason: str  # "auto", "true" or "false", as asked
    chunk_tokens: int | None = None  # of the loss at a time; None: the device's own

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
        chunk = without = ""
        if self.chunk_tokens is not None:
            chunk = f", the loss is computed in chunks of {self.chunk_tokens} tokens"
        if self.num_recomputed or self.chunk_tokens is not None:
            without = f", {self.needed_without / 1e9:.2f} without"
        text = (
            f"Gradient checkpointing {self.reason}: {count} recomputed{chunk}; a step needs "
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
    means all for true. Auto takes the first that fits, or else what needs the least: no layer;
    no layer and a smaller chunk of the loss; then one layer, two layers and so on, each with the
    chunk size that needs the least memory.
    """

    @cache
    def needed(count: int, chunk: int | None) -> int:
        return training_memory(
            size,
            batch,
            on_cpu=on_cpu,
            recomputed_layers=count,
            accumulates=accumulates,
            chunk_tokens=chunk,
        ).of_step

    counts = range(size.num_layers + 1)
    if wanted == "false":
        counts = range(1)
    elif wanted == "true" or num_layers is not None:
        asked = size.num_layers if num_layers is None else min(num_layers, size.num_layers)
        counts = range(asked, asked + 1)
    chunks: list[int | None] = [None]
    if forms_chunks(size) and not on_cpu:
        chunks += [chunk for chunk in SMALLER_CHUNKS if chunk < batch.answer_tokens]
    ways = [(counts[0], chunk) for chunk in chunks]
    ways += [(count, min(chunks, key=partial(needed, count))) for count in counts[1:]]
    fitting = (way for way in ways if needed(*way) <= FREE_SHARE * free)
    count, chunk = next(fitting, min(ways, key=lambda way: needed(*way)))
    none = needed(0, None)
    return Choice(count, size.num_layers, needed(count, chunk), none, free, wanted, chunk)


def free_bytes(device: torch.device, num_processes: int = 1, target: int | None = None) -> int:
    """Return the memory that is free on a device now, in bytes; of a CPU's, each process's part.

    target is --gpu_memory in bytes. The result is at most target minus this process's tensors, or
    target itself where device is no GPU (`python -m ptuning plan`).
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        # What torch's allocator keeps for reuse is free to us too.
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        return free if target is None else max(0, min(free, target - held))
    if target is not None:
        return target
    import psutil

    return int(psutil.virtual_memory().available) // num_processes


def gpu_terms(device: torch.device, target: int | None) -> dict[str, int]:
    """Return ModelSize's block_bytes and workspace_bytes; nothing on a CPU.

    target is --gpu_memory in bytes: where device is no GPU, the memory of the one planned for.
    """
    if device.type == "cuda":
        is_hopper = torch.cuda.get_device_capability(device)[0] == HOPPER
        workspace = HOPPER_WORKSPACE if is_hopper else OTHER_WORKSPACE
        return {"block_bytes": block_bytes(device), "workspace_bytes": workspace}
    if target is None:
        return {}
    return {"block_bytes": device_block_bytes(target), "workspace_bytes": HOPPER_WORKSPACE}
