"""Rotary embedding on CUDA as one Triton kernel: each number is read and written once.

Plain operations (`ptuning.model.positions.rotate`) move seven times as many bytes, as each of them
reads and writes float32 copies. Imported at the first rotation on CUDA.
Shapes: B rows, S tokens, H heads, D head width.
"""

# Kernel parameters take Triton's own annotations or none.
# mypy: disable-error-code="no-untyped-def"

import logging
from functools import cache

import torch
from torch import Tensor

from ptuning.model.quantization.backends import unavailable_reason
from ptuning.model.quantization.triton_backend import ceil_div, constexpr, jit, on_device, tl

HEADS_PER_PROGRAM = 8  # 8 heads x 3 x 128 numbers of 16 bits: 6 KiB in registers

logger = logging.getLogger(__name__)
_library = torch.library.Library("ptuning", "FRAGMENT")
_library.define("rotate(Tensor heads, Tensor cos, Tensor sin, float sign) -> Tensor")


@cache
def can_rotate(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel runs on a CUDA device; warn once where it does not."""
    reason = unavailable_reason("triton", device, dtype)
    if reason is not None:
        logger.warning("Rotary embedding uses plain operations, which are slower: %s", reason)
    return reason is None


def launch_rotate(heads: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotate heads (B, S, H, 3, D) by cos and sin (B or 1, S, D); sign -1 rotates back."""
    num_rows, num_tokens, num_heads, _, width = heads.shape
    heads = heads.contiguous()
    cos, sin = (angles.expand(num_rows, num_tokens, -1).contiguous() for angles in (cos, sin))
    rotated = torch.empty_like(heads)
    grid = (num_rows * num_tokens, ceil_div(num_heads, HEADS_PER_PROGRAM))
    with on_device(heads.device):
        rotate_kernel[grid](
            heads, cos, sin, rotated, sign, num_heads,
            WIDTH=width, BLOCK_H=HEADS_PER_PROGRAM, BLOCK_D=1 << (width - 1).bit_length(),
        )  # fmt: skip
    return rotated


_library.impl("rotate", launch_rotate, "CUDA")


@torch.library.register_fake("ptuning::rotate")
def _rotated_shape(heads: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    return torch.empty_like(heads, memory_format=torch.contiguous_format)


@jit
def rotate_kernel(
    heads, cos, sin, rotated, sign, num_heads, WIDTH: constexpr, BLOCK_H: constexpr,
    BLOCK_D: constexpr,
):  # fmt: skip
    """Write BLOCK_H heads of one token; WIDTH is D, BLOCK_D the next power of two."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    is_first = (columns // (WIDTH // 4)) % 2 == 0  # quarter of its half
    partners = tl.where(is_first, columns + WIDTH // 4, columns - WIDTH // 4)
    angle_cos = tl.load(cos + token * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    angle_sin = tl.load(sin + token * WIDTH + columns, mask=columns < WIDTH, other=0.0) * sign
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (head[:, None] < num_heads) & (columns[None, :] < WIDTH)
    rows = ((token * num_heads + head) * 3 * WIDTH)[:, None]
    for part in tl.static_range(2):  # queries, keys
        first = rows + part * WIDTH
        own = tl.load(heads + first + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        other = tl.load(heads + first + partners[None, :], mask=inside, other=0.0).to(tl.float32)
        turned = own * angle_cos[None, :] + other * angle_sin[None, :]
        tl.store(
            rotated + first + columns[None, :], turned.to(rotated.dtype.element_ty), mask=inside
        )
    values = rows + 2 * WIDTH + columns[None, :]
    tl.store(rotated + values, tl.load(heads + values, mask=inside, other=0.0), mask=inside)
