"""The `torch` back end: plain PyTorch operations, so it runs on every device.

The weight is dequantised block by block into the reference's float values. In int4 on a CPU the two
nibbles of a byte are written to the two halves of the block instead of being interleaved, which
vectorises; the columns of the activations, which are few, are reordered to match.
Shapes: M rows of activations, num_out x num_in the weight.
"""

import torch
from torch import Tensor

from ptuning.model.quantization.blockwise import (
    blockwise_matmul,
    blockwise_matmul_transposed,
)
from ptuning.model.quantization.interface import dtype_reason


def evens_then_odds(x: Tensor) -> Tensor:
    """Return (M, n) with its even columns first and its odd columns behind them.

    >>> evens_then_odds(torch.tensor([[0, 1, 2, 3]]))
    tensor([[0, 2, 1, 3]])
    """
    return torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)


def interleave_halves(x: Tensor) -> Tensor:
    """Undo evens_then_odds.

    >>> interleave_halves(torch.tensor([[0, 2, 1, 3]]))
    tensor([[0, 1, 2, 3]])
    """
    return torch.stack(x.chunk(2, dim=1), dim=-1).flatten(1)


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype the product runs in: x's own, but float32 for float16 on a CPU.

    CPUs without float16 arithmetic take 10 to 100 times as long in it as in float32.
    """
    if x.dtype == torch.float16 and x.device.type == "cpu":
        return torch.float32
    return x.dtype


def writes_halves(x: Tensor, bits: int) -> bool:
    """Return whether a block holds even columns, then odd ones: on a CPU, where that vectorises."""
    return bits == 4 and x.device.type == "cpu"


class Dequantizer:
    """A `blockwise.Dequantize` that reuses its scratch memory.

    In int4 on a CPU a block has its even columns first, then its odd ones. Code x scale is formed
    in float16 where devices are fast in it, and on a CPU in float32, where it is exact, and then
    rounded to float16: the same numbers.
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
        """Return scratch of like's shape; the first block asks first and is the largest."""
        if dtype not in self._scratch:
            self._scratch[dtype] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return self._scratch[dtype][: like.numel()].view(like.shape)


class TorchBackend:
    """Runs anywhere; the fallback that is always there, and the one for a CPU."""

    name = "torch"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, bits: int) -> str | None:
        """Return the reason for a dtype nobody takes; None otherwise."""
        return dtype_reason(dtype)

    def matmul(self, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
        in_halves = writes_halves(x, bits)
        columns = evens_then_odds(x) if in_halves else x  # (M, num_in)
        dequantize = Dequantizer(in_halves=in_halves)
        columns = columns.to(working_dtype(x))
        return blockwise_matmul(columns, packed, scale, bits, dequantize).to(x.dtype)

    def matmul_transposed(self, grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
        in_halves = writes_halves(grad, bits)
        dequantize = Dequantizer(in_halves=in_halves)
        working = grad.to(working_dtype(grad))
        product = blockwise_matmul_transposed(working, packed, scale, bits, dequantize)
        product = product.to(grad.dtype)
        return interleave_halves(product) if in_halves else product
