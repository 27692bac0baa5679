"""The `torch` back end, and products by blocks of a packed weight, which all back ends share.

A weight is dequantised one block at a time into a buffer, which a library product reads, so a float
copy of it stays small. On a CPU a block stays in cache: forward and backward of a 4096 x 4096 int4
linear with 64 rows take 35 ms on two cores, against 192 ms with a whole float copy each way and
32 ms for the float32 linear. On a GPU a block is the whole weight unless memory is scarce.
Shapes: M rows of activations, num_out x num_in the weight.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_BLOCK_BYTES = 4 * 2**20  # a 256 x 4096 float32 block, about one core's share of cache
# On a GPU: a 64th of its memory, but at least a 4096 x 4096 float16 block, which still fills the
# GPU with one product, and at most ChatGLM-6B's largest weight, 16384 x 4096 in float16.
DEVICE_SHARE = 64
MIN_DEVICE_BLOCK_BYTES, MAX_DEVICE_BLOCK_BYTES = 32 * 2**20, 128 * 2**20
MAX_FUSED_ROWS = 256  # up to here Triton multiplies half precision without a float block
COLUMN_STEP = 64  # a block of columns is a multiple of it: whole tiles, aligned rows

# Dequantises packed codes (rows, bytes), whose rows may be strided, with scales (rows,) into a
# contiguous block (rows, columns).
Dequantize = Callable[[Tensor, Tensor, Tensor], None]


def block_bytes(device: torch.device) -> int:
    """Return the size of the float block on a device."""
    if device.type == "cpu":
        return CPU_BLOCK_BYTES
    if device.type != "cuda":
        return MIN_DEVICE_BLOCK_BYTES
    return device_block_bytes(total_memory(device))


def device_block_bytes(memory: int) -> int:
    """Return the size of the float block on a GPU with that many bytes of memory.

    >>> [device_block_bytes(gib * 2**30) // 2**20 for gib in (2, 6, 80)]
    [32, 96, 128]
    """
    return min(MAX_DEVICE_BLOCK_BYTES, max(MIN_DEVICE_BLOCK_BYTES, memory // DEVICE_SHARE))


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


def blockwise_matmul(x: Tensor, packed: Tensor, scale: Tensor, dequantize: Dequantize) -> Tensor:
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
    """Multiply by blocks of whole columns: every entry is one sum and is written once."""
    (num_rows, num_out), per_byte = grad.shape, 8 // bits
    num_in = packed.shape[1] * per_byte
    step = columns_per_block(num_out, num_in, grad)
    buffer = grad.new_empty(num_out * step)
    product = grad.new_empty(num_rows, num_in)
    for start in range(0, num_in, step):
        stop = min(start + step, num_in)
        block = buffer[: num_out * (stop - start)].view(num_out, stop - start)  # whole columns
        dequantize(packed[:, start // per_byte : stop // per_byte], scale, block)
        torch.mm(grad, block, out=product[:, start:stop])
    return product


def transposed_by_rows(
    grad: Tensor, packed: Tensor, scale: Tensor, bits: int, dequantize: Dequantize
) -> Tensor:
    """Multiply by blocks of rows, which a CPU reads contiguously, and sum the parts in float32."""
    (num_rows, num_out), num_in = grad.shape, packed.shape[1] * (8 // bits)
    step = rows_per_block(num_out, num_in, grad)
    buffer = grad.new_empty(step, num_in)
    total = grad.new_zeros(num_rows, num_in, dtype=torch.float32)
    for start in range(0, num_out, step):
        rows = slice(start, min(start + step, num_out))
        block = buffer[: rows.stop - start]  # (rows of this block, num_in)
        dequantize(packed[rows], scale[rows], block)
        if grad.dtype == torch.float32:
            total.addmm_(grad[:, rows], block)
        elif step == num_out:
            return grad @ block
        else:  # a sum in half precision would round once per block
            total += grad[:, rows] @ block
    return total.to(grad.dtype)


class Dequantizer:
    """A `Dequantize` in PyTorch operations that reuses its scratch memory.

    With in_halves, for int4 on a CPU, the block gets its even columns first, then its odd ones:
    writing the two nibbles of a byte to two halves vectorises, interleaving them does not. Code x
    scale is computed in float16. CPUs are slow at float16, so there it is computed exactly in
    float32 and rounded to float16, with the same result.
    """

    def __init__(self, *, in_halves: bool) -> None:
        self.in_halves = in_halves
        self._scratch: dict[torch.dtype, Tensor] = {}

    def __call__(self, packed: Tensor, scale: Tensor, block: Tensor) -> None:
        """Fill block (rows, columns)."""
        product_dtype = torch.float32 if packed.device.type == "cpu" else torch.float16
        same = block.dtype == product_dtype
        product = block if same else self._scratch_for(product_dtype, block)
        self._write_codes(packed, product)
        product.mul_(scale.to(product_dtype)[:, None])
        if product_dtype != torch.float16:
            product = self._scratch_for(torch.float16, block).copy_(product)
        if product is not block:
            block.copy_(product)

    def _write_codes(self, packed: Tensor, block: Tensor) -> None:
        half = packed.shape[1]
        if half == block.shape[1]:  # int8
            block.copy_(packed)
            return
        evens, odds = block[:, 0::2], block[:, 1::2]
        if self.in_halves:
            evens, odds = block[:, :half], block[:, half:]
        nibbles = self._scratch_for(torch.int8, packed)
        evens.copy_(torch.bitwise_right_shift(packed, 4, out=nibbles))
        torch.bitwise_left_shift(packed, 4, out=nibbles)
        odds.copy_(nibbles.bitwise_right_shift_(4))

    def _scratch_for(self, dtype: torch.dtype, like: Tensor) -> Tensor:
        """Return scratch of like's shape; the first block asked for is the largest."""
        if dtype not in self._scratch:
            self._scratch[dtype] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return self._scratch[dtype][: like.numel()].view(like.shape)  # like's shape


class TorchBackend:
    """Runs on every device; the only back end for a CPU."""

    name = "torch"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return None: plain PyTorch operations run everywhere."""
        return None

    def matmul(self, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
        in_halves, columns = _in_halves(x, bits), x
        if in_halves:  # as the blocks of the weight are
            columns = torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)  # (M, num_in)
        columns = columns.to(_product_dtype(x))
        product = blockwise_matmul(columns, packed, scale, Dequantizer(in_halves=in_halves))
        return product.to(x.dtype)

    def matmul_transposed(self, grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
        in_halves = _in_halves(grad, bits)
        dequantize = Dequantizer(in_halves=in_halves)
        rows = grad.to(_product_dtype(grad))  # (M, num_out)
        product = blockwise_matmul_transposed(rows, packed, scale, bits, dequantize).to(grad.dtype)
        if in_halves:
            product = torch.stack(product.chunk(2, dim=1), dim=-1).flatten(1)  # (M, num_in)
        return product


def _in_halves(x: Tensor, bits: int) -> bool:
    return bits == 4 and x.device.type == "cpu"


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return x's dtype; float32 for float16 on a CPU, which takes 10 to 100 times as long in it."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype
