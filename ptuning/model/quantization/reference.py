"""The published int8 and int4 numbers, in plain PyTorch: the reference for every back end.

Per output row: scale = float16(max|w| / (2**(bits - 1) - 1)) and code = round(w / scale). Both
divisions are done in float16, because the published code quantised the float16 model; in float32,
2 % of the int8 codes of the published tiny model would differ. A weight of another dtype is first
rounded to float16, so a model quantises to the same bytes whatever dtype it was loaded in.
Int4 packs two columns into one byte: the even column in the high nibble, the odd one in the low
nibble, both signed.
Shapes: rows x cols is the weight as nn.Linear holds it (outputs x inputs); packed cols are cols, in
int4 cols / 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ptuning.storage import SUPPORTED_BITS

BLOCK_BYTES = 8 * 2**20  # of a float weight that are quantised at a time


class QuantizedWeight(NamedTuple):
    """A weight as published: packed int8 (rows, packed cols), scale float16 (rows,)."""

    packed: Tensor
    scale: Tensor


def check_bits(bits: int) -> None:
    """Raise ValueError unless bits is 4 or 8."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"quantization_bit is {bits}; use 4 or 8, or leave it out.")


def largest_code(bits: int) -> int:
    """Return the largest code; the codes are symmetric, so the smallest is its negative.

    >>> largest_code(8), largest_code(4)
    (127, 7)
    """
    check_bits(bits)
    return 2 ** (bits - 1) - 1


def packed_columns(num_columns: int, bits: int) -> int:
    """Return the number of bytes in one packed row.

    >>> packed_columns(4096, 4)
    2048
    """
    check_bits(bits)
    if bits == 8:
        return num_columns
    if num_columns % 2:
        raise ValueError(
            f"the weight has {num_columns} columns; int4 packs them in pairs, so use 8 bits."
        )
    return num_columns // 2


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes (rows, cols) as published.

    >>> pack_codes(torch.tensor([[1, -2]], dtype=torch.int8), bits=4)  # 0x1E
    tensor([[30]], dtype=torch.int8)
    """
    packed_columns(codes.shape[1], bits)
    if bits == 8:
        return codes
    return (codes[:, 0::2] << 4) | (codes[:, 1::2] & 0x0F)  # (rows, cols / 2)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Undo pack_codes: return int8 codes (rows, cols).

    >>> unpack_codes(torch.tensor([[30]], dtype=torch.int8), bits=4)
    tensor([[ 1, -2]], dtype=torch.int8)
    """
    check_bits(bits)
    if bits == 8:
        return packed
    high = packed >> 4  # the shift of a signed byte keeps the sign
    low = (packed << 4) >> 4
    return torch.stack((high, low), dim=-1).flatten(-2)  # (rows, cols)


def quantize_weight(weight: Tensor, bits: int) -> QuantizedWeight:
    """Quantise a float weight (rows, cols) row by row; ValueError if float16 cannot hold it.

    A row of zeros, or one whose scale underflows to zero, becomes zeros with scale 0. Codes are
    clamped to the symmetric range because a subnormal scale is too coarse to keep them in it.
    """
    limit = largest_code(bits)
    packed_columns(weight.shape[1], bits)
    half = weight.detach().to(torch.float16)  # (rows, cols)
    # A tensor, because by a Python number CUDA multiplies with the reciprocal, which rounds
    # differently.
    divisor = torch.tensor(limit, dtype=torch.float16, device=half.device)
    scale = half.abs().amax(dim=1) / divisor  # (rows,)
    if not bool(scale.isfinite().all()):
        row = int((~scale.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"row {row} of a weight of shape {tuple(weight.shape)} has a value that is NaN or "
            "beyond float16 (65504); quantisation needs finite values: check the checkpoint."
        )
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (half / safe[:, None]).round_().clamp_(-limit, limit).to(torch.int8)  # (rows, cols)
    return QuantizedWeight(pack_codes(codes, bits), scale)


def quantize_in_blocks(weight: Tensor, bits: int) -> QuantizedWeight:
    """Quantise BLOCK_BYTES of rows at a time: the same numbers with little extra memory."""
    num_rows, num_columns = weight.shape
    shape = (num_rows, packed_columns(num_columns, bits))
    packed = torch.empty(shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(num_rows, dtype=torch.float16, device=weight.device)
    step = max(1, BLOCK_BYTES * num_rows // weight.nbytes)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        packed[rows], scale[rows] = quantize_weight(weight[rows], bits)
    return QuantizedWeight(packed, scale)


def dequantize_weight(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the weight (rows, cols) in dtype: float16(code * scale), converted.

    The rounding to float16 is part of the published numbers, also in float32 arithmetic: without it
    the golden logits are missed by 4e-4 instead of 2e-6. The product is formed in float32, where it
    is exact (8 and 11 significant bits), because CPUs are slow in float16.
    """
    codes = unpack_codes(packed, bits)
    product = codes.to(torch.float32) * scale.to(torch.float32)[:, None]  # (rows, cols)
    return product.to(torch.float16).to(dtype)
