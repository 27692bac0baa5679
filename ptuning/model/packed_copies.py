"""Frozen weights held a second time on a CPU, laid out for its processor, where there is room.

A quantised base is there to be small: its float output head is not held twice.
"""

import psutil

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.linear import pack_weights_

PACKING_SHARE = 0.25  # of free memory that packed copies may take


def pack_where_roomy(model: ChatGLMForConditionalGeneration) -> int:
    """Pack the weights of a model that stays where it is; return the bytes that this took."""
    if model.device.type != "cpu" or model.config.quantization_bit:
        return 0
    return pack_weights_(model, room_bytes=int(PACKING_SHARE * psutil.virtual_memory().available))
