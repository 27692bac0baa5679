"""Frozen weights held a second time on a CPU, laid out for its processor, where there is room.

A quantised base is there to be small: its float output head is not held twice.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.linear import can_pack, pack_weights_
from ptuning.train.memory.memory_model import ModelSize, packed_bytes
from ptuning.train.memory.recomputing import Choice, free_bytes

PACKING_SHARE = 0.25  # of free memory that packed copies may take


def pack_where_roomy(model: ChatGLMForConditionalGeneration, device: torch.device) -> int:
    """Pack the weights of a model that is to run on device; return the bytes that this took."""
    if device.type != "cpu" or model.config.quantization_bit:
        return 0
    return pack_weights_(model, room_bytes=int(PACKING_SHARE * free_bytes(device)))


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
