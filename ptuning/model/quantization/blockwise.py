"""Multiply by a packed weight one block at a time, so that the float copy of it stays small.

Every back end that dequantises before a library product goes through here. On a CPU the block stays
in cache: forward and backward of a 4096 x 4096 int4 linear with 64 rows take 35 ms on two cores,
where a whole float copy each way takes 192 and the float32 linear 32. On a GPU the block is the
whole weight wherever the card is large enough for that not to matter.
Shapes: M rows of activations, num_out x num_in the weight.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

CPU_BLOCK_BYTES = 4 * 2**20  # a 256 x 4096 float32 block, about one core's share of cache
# On a GPU: a 64th of its memory, at least a 4096 x 4096 float16 block, which still fills the card
# with one product, and at most ChatGLM-6B's largest map, 16384 x 4096 in float16.
DEVICE_SHARE = 64
LEAST_DEVICE_BLOCK_BYTES, MOST_DEVICE_BLOCK_BYTES = 32 * 2**20, 128 * 2**20
COLUMN_STEP = 64  # a block of columns is a multiple: whole tiles, aligned rows

# Dequantises packed codes (rows, bytes), whose rows may be strided, with the scales (rows,) of
# those rows, into a contiguous block (rows, columns).
Dequantize = Callable[[Tensor, Tensor, Tensor], None]


def block_bytes(device: torch.device) -> int:
    """Return how large the float block may be on a device."""
    if device.type == "cpu":
        return CPU_BLOCK_BYTES
    if device.type != "cuda":
        return LEAST_DEVICE_BLOCK_BYTES
    return device_block_bytes(total_memory(device))


def device_block_bytes(memory: int) -> int:
    """Return how large the float block is on a GPU with so many bytes of memory.

    >>> [device_block_bytes(gib * 2**30) // 2**20 for gib in (2, 6, 80)]
    [32, 96, 128]
    """
    return min(MOST_DEVICE_BLOCK_BYTES, max(LEAST_DEVICE_BLOCK_BYTES, memory // DEVICE_SHARE))


@cache
def total_memory(device: torch.device) -> int:
    """Return the memory of a GPU in bytes."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def rows_per_block(num_out: int, num_in: int, like: Tensor) -> int:
    """Return how many weight rows one block of like's dtype and device holds, at least 1."""
    return max(1, min(num_out, block_bytes(like.device) // (num_in * like.element_size())))


def columns_per_block(num_out: int, num_in: int, like: Tensor) -> int:
    """Return how many weight columns one block of like's dtype and device holds."""
    fitting = block_bytes(like.device) // (num_out * like.element_size())
    return min(num_in, max(1, fitting // COLUMN_STEP) * COLUMN_STEP)


def blockwise_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, dequantize: Dequantize
) -> Tensor:
    """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
    (num_rows, num_in), num_out = x.shape, packed.shape[0]
    step = rows_per_block(num_out, num_in, x)
    buffer = x.new_empty(step, num_in)
    product = x.new_empty(num_rows, num_out)
    for start in range(0, num_out, step):
        rows = slice(start, min(start + step, num_out))
        block = buffer[: rows.stop - start]  # (rows of this block, num_in)
        dequantize(packed[rows], scale[rows], block)
        torch.mm(x, block.t(), out=product[:, rows])
    return product


def blockwise_matmul_transposed(
    grad: Tensor, packed: Tensor, scale: Tensor, bits: int, dequantize: Dequantize
) -> Tensor:
    """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
    by_blocks = transposed_by_rows if grad.device.type == "cpu" else transposed_by_columns
    return by_blocks(grad, packed, scale, bits, dequantize)


def transposed_by_columns(
    grad: Tensor, packed: Tensor, scale: Tensor, bits: int, dequantize: Dequantize
) -> Tensor:
    """Return the same product by blocks of whole columns: one sum per entry, written once."""
    (num_rows, num_out), per_byte = grad.shape, 8 // bits
    num_in = packed.shape[1] * per_byte
    step = columns_per_block(num_out, num_in, grad)
    buffer = grad.new_empty(num_out * step)
    product = grad.new_empty(num_rows, num_in)
    for start in range(0, num_in, step):
        stop = min(start + step, num_in)
        block = buffer[: num_out * (stop - start)].view(num_out, stop - start)
        dequantize(packed[:, start // per_byte : stop // per_byte], scale, block)
        torch.mm(grad, block, out=product[:, start:stop])
    return product


def transposed_by_rows(
    grad: Tensor, packed: Tensor, scale: Tensor, bits: int, dequantize: Dequantize
) -> Tensor:
    """Return the same product by blocks of rows, which a CPU reads in one piece: a float32 sum."""
    (num_rows, num_out), num_in = grad.shape, packed.shape[1] * (8 // bits)
    step = rows_per_block(num_out, num_in, grad)
    buffer = grad.new_empty(step, num_in)
    total = grad.new_zeros(num_rows, num_in, dtype=torch.float32)
    for start in range(0, num_out, step):
        rows = slice(start, min(start + step, num_out))
        block = buffer[: rows.stop - start]
        dequantize(packed[rows], scale[rows], block)
        if grad.dtype == torch.float32:
            total.addmm_(grad[:, rows], block)
        elif step == num_out:
            return grad @ block
        else:  # a narrow running sum would round once per block
            total += grad[:, rows] @ block
    return total.to(grad.dtype)
