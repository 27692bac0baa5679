"""Multiply by a packed weight a block of rows at a time, so that the float copy stays small.

Every back end that turns codes into floats before a library product goes through here. The block
is rewritten in place, so on a CPU it stays in cache: forward and backward of a 4096 x 4096 int4
linear with 64 rows take 35 ms on two cores, where a whole float copy each way takes 192 and the
float32 linear 32.
Shapes: M rows of activations, num_out x num_in the weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Bytes of the float block. CPU: a 256 x 4096 float32 block, about one core's share of cache.
# Elsewhere: a 4096 x 4096 float16 block, large enough for a library product to fill the card and
# small beside the 4.7 GB a training run may use.
CPU_BLOCK_BYTES = 4 * 2**20
DEVICE_BLOCK_BYTES = 32 * 2**20

# Fills `block` (stop - start, num_in) from the packed rows start..stop.
Extract = Callable[[int, int, Tensor], None]


def rows_per_block(num_out: int, num_in: int, like: Tensor) -> int:
    """Return how many weight rows one block of like's dtype and device holds, at least 1."""
    budget = CPU_BLOCK_BYTES if like.device.type == "cpu" else DEVICE_BLOCK_BYTES
    return max(1, min(num_out, budget // (num_in * like.element_size())))


def blockwise_matmul(x: Tensor, num_out: int, extract: Extract) -> Tensor:
    """Return x (M, num_in) times the transposed weight that extract yields: (M, num_out)."""
    num_in = x.shape[1]
    step = rows_per_block(num_out, num_in, x)
    buffer = x.new_empty(step, num_in)
    product = x.new_empty(x.shape[0], num_out)
    for start in range(0, num_out, step):
        stop = min(start + step, num_out)
        block = buffer[: stop - start]  # (rows of this block, num_in)
        extract(start, stop, block)
        torch.mm(x, block.t(), out=product[:, start:stop])
    return product


def blockwise_matmul_transposed(grad: Tensor, num_in: int, extract: Extract) -> Tensor:
    """Return grad (M, num_out) times the weight extract yields: (M, num_in), summed in float32."""
    num_out = grad.shape[1]
    step = rows_per_block(num_out, num_in, grad)
    buffer = grad.new_empty(step, num_in)
    total = grad.new_zeros(grad.shape[0], num_in, dtype=torch.float32)
    for start in range(0, num_out, step):
        stop = min(start + step, num_out)
        block = buffer[: stop - start]
        extract(start, stop, block)
        if grad.dtype == torch.float32:
            total.addmm_(grad[:, start:stop], block)
        elif step == num_out:
            return grad @ block
        else:  # a narrow running sum would round once per block
            total += grad[:, start:stop] @ block
    return total.to(grad.dtype)
