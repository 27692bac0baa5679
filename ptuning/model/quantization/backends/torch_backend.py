"""The `torch` back end: plain PyTorch operations, so it runs on every device.

The weight is converted block by block into the reference's float values. In int4 the two nibbles of
a byte are written to the two halves of the block instead of being interleaved, which vectorises;
the columns of the activations, which are few, are reordered to match.
Shapes: M rows of activations, num_out x num_in the weight.
"""

import torch
from torch import Tensor

from ptuning.model.quantization.backends.blockwise import (
    blockwise_matmul,
    blockwise_matmul_transposed,
)
from ptuning.model.quantization.backends.interface import dtype_reason


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


class WeightBlocks:
    """Writes rows of the float weight into a block; an `Extract` that reuses its scratch memory.

    In int4 a row has its even columns first, then its odd ones. Code x scale is formed in
    float16 where devices are fast in it, and on a CPU in float32, where it is exact, and then
    rounded to float16: the same numbers.
    """

    def __init__(self, packed: Tensor, scale: Tensor, bits: int) -> None:
        self.packed, self.bits = packed, bits
        self.product_dtype = torch.float32 if packed.device.type == "cpu" else torch.float16
        self.factors = scale.to(self.product_dtype)[:, None]  # (num_out, 1)
        self._scratch: dict[torch.dtype, Tensor] = {}

    def __call__(self, start: int, stop: int, block: Tensor) -> None:
        """Fill block (stop - start, num_in)."""
        same = block.dtype == self.product_dtype
        product = block if same else self._scratch_for(self.product_dtype, block.shape)
        self._write_codes(self.packed[start:stop], product)
        product.mul_(self.factors[start:stop])
        if self.product_dtype != torch.float16:
            product = self._scratch_for(torch.float16, block.shape).copy_(product)
        if product is not block:
            block.copy_(product)

    def _write_codes(self, packed: Tensor, block: Tensor) -> None:
        if self.bits == 8:
            block.copy_(packed)
            return
        half = packed.shape[1]
        nibbles = self._scratch_for(torch.int8, packed.shape)
        block[:, :half].copy_(torch.bitwise_right_shift(packed, 4, out=nibbles))
        torch.bitwise_left_shift(packed, 4, out=nibbles)
        block[:, half:].copy_(nibbles.bitwise_right_shift_(4))

    def _scratch_for(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """Return scratch of this shape; the first block asks first and is the largest."""
        if dtype not in self._scratch:
            self._scratch[dtype] = torch.empty(shape, dtype=dtype, device=self.packed.device)
        return self._scratch[dtype][: shape[0]]


class TorchBackend:
    """Runs anywhere; the fallback that is always there, and the one for a CPU."""

    name = "torch"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, bits: int) -> str | None:
        """Return the reason for a dtype nobody takes; None otherwise."""
        return dtype_reason(dtype)

    def matmul(self, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
        columns = x if bits == 8 else evens_then_odds(x)  # (M, num_in)
        extract = WeightBlocks(packed, scale, bits)
        product = blockwise_matmul(columns.to(working_dtype(x)), packed.shape[0], extract)
        return product.to(x.dtype)

    def matmul_transposed(self, grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
        num_in = packed.shape[1] * (8 // bits)
        extract = WeightBlocks(packed, scale, bits)
        product = blockwise_matmul_transposed(grad.to(working_dtype(grad)), num_in, extract)
        product = product.to(grad.dtype)
        return product if bits == 8 else interleave_halves(product)
