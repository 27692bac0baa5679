"""Whether a run on a CPU holds its frozen weights twice (`ptuning.model.packed_copies`)."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ptuning.model.linear import can_pack
from ptuning.model.packed_copies import PACKING_SHARE
from ptuning.train.memory.memory_model import ModelSize, packed_bytes
from ptuning.train.memory.recomputing import Choice


def size_as_packed(
    size: ModelSize,
    dtype: torch.dtype,
    *,
    free: int,
    choose: Callable[[int], Choice] | None = None,
) -> ModelSize:
    """Return the size that a model of dtype is to have on a CPU; free is in bytes beside it.

    Copies take at most a quarter of what is free. They save a few per cent of a training step, a
    recomputed layer costs more: choose says which layers are recomputed with so many bytes free,
    and copies that would add to them, or leave a step too little, are not made.
    """
    copies = packed_bytes(size)
    packs = can_pack(dtype) and 0 < copies <= PACKING_SHARE * free
    if packs and choose is not None:
        beside = choose(free - copies)
        packs = beside.fits and beside.num_recomputed == choose(free).num_recomputed
    return replace(size, packs=packs)
