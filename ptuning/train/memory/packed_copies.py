"""Frozen weights held a second time on a CPU, laid out for its processor, where there is room."""

from dataclasses import replace

import torch

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.linear import PACKING_SHARE, can_pack, pack_weights_
from ptuning.train.memory.memory_model import ModelSize, packed_bytes, weight_bytes
from ptuning.train.memory.recomputing import free_bytes


def pack_where_roomy(
    model: ChatGLMForConditionalGeneration, device: torch.device, *, num_processes: int = 1
) -> int:
    """Pack the weights of a model that is to run on device; return the bytes that this took."""
    if device.type != "cpu":
        return 0
    return pack_weights_(model, room_bytes=packing_room(free_bytes(device), num_processes))


def size_as_packed(
    size: ModelSize, dtype: torch.dtype, *, free: int, num_processes: int
) -> ModelSize:
    """Return the size that a model of dtype will have on a CPU of which `free` bytes are free."""
    room = packing_room(max(0, free - weight_bytes(size)), num_processes)
    return replace(size, packs=can_pack(dtype) and packed_bytes(size) <= room)


def packing_room(free: int, num_processes: int) -> int:
    """Return the bytes that packed copies of a process's weights may take, of those that are free.

    >>> packing_room(8 * 10**9, 2)
    1000000000
    """
    return int(PACKING_SHARE * free) // num_processes
