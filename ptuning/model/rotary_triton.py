"""The rotation of queries and keys as one Triton kernel: each number is read and written once.

Plain operations move seven times as many bytes, as each reads and writes float32 copies. Registered
as the operator `ptuning::rotate`, CUDA only; `ptuning.model.rotary` holds the reference.
Shapes: B batch, S tokens, H heads, D width of a head.
"""

# Kernel parameters take Triton's own annotations or none.
# mypy: disable-error-code="no-untyped-def"

import logging
from functools import cache

import torch
from torch import Tensor

from ptuning.model.quantization.backends.triton_backend import (
    TritonBackend,
    ceil_div,
    on_device,
)
from ptuning.model.quantization.backends.triton_kernels import constexpr, jit, tl

HEADS_PER_PROGRAM = 8  # 8 heads x 3 x 128 numbers of 16 bits: 6 KiB in registers

logger = logging.getLogger(__name__)


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


_library = torch.library.Library("ptuning", "FRAGMENT")
_library.define("rotate(Tensor heads, Tensor cos, Tensor sin, float sign) -> Tensor")


def launch_rotate(heads: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Return heads (B, S, H, 3, D) rotated by cos and sin (B, S, D); sign -1 rotates back."""
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
def _rotate_shape(heads: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    return torch.empty_like(heads, memory_format=torch.contiguous_format)


@cache
def can_rotate(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether the kernel runs there; where a GPU cannot, the log says why, once."""
    if device.type != "cuda":
        return False
    reason = TritonBackend().unavailable_reason(device, dtype, bits=4)
    if reason is not None:
        logger.warning("Rotary embedding takes plain operations, which are slower: %s", reason)
    return reason is None
