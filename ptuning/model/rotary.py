"""Two-dimensional rotary position embedding of queries and keys.

Each head's width D is cut in two halves; the first is rotated by the first position channel, the
second by the other. Inverse frequencies are rounded to float16, as the published checkpoint stores
them. On CUDA the rotation is one Triton kernel (`ptuning.model.rotary_triton`), in compiled layers
the compiler's, else the plain operations here, which are the reference for both.
Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.4.2; two position channels as in
GLM, Du et al. 2021, https://arxiv.org/abs/2103.10360, section 2.3.
Shapes: B batch, S tokens, H heads, D width of a head.
"""

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptuning.model.quantization.backends import unavailable_reason

HEADS_PER_PROGRAM = 8  # 8 heads x 3 x 128 numbers of 16 bits: 6 KiB in registers

logger = logging.getLogger(__name__)


class Rotation(NamedTuple):
    """Cosines and sines of every entry's angle, float32 (B, S, D).

    In each half of D the first quarter's entries turn with the second's (`swap_quarters`).
    """

    cos: Tensor
    sin: Tensor  # negated for the first quarter of each half


def inverse_frequencies(head_dim: int) -> Tensor:
    """Return the D/4 inverse frequencies of one half, float32 values rounded to float16.

    >>> inverse_frequencies(16).tolist()
    [1.0, 0.0999755859375, 0.01000213623046875, 0.0010004043579101562]
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32) / half
    return (1.0 / 10000.0**exponents).half().float()


def rotation_at(position_ids: Tensor, frequencies: Tensor) -> Rotation:
    """Return the rotation of every token from position_ids (B, 2, S)."""
    angles = position_ids.transpose(1, 2).unsqueeze(-1).float() * frequencies  # (B, S, 2, D/4)
    cos, sin = angles.cos(), angles.sin()
    both = torch.stack((cos, cos), dim=-2), torch.stack((-sin, sin), dim=-2)  # (B, S, 2, 2, D/4)
    return Rotation(*(of_entries.flatten(-3) for of_entries in both))


def swap_quarters(x: Tensor) -> Tensor:
    """Return x (..., D) with the quarters of each half of D exchanged.

    >>> swap_quarters(torch.arange(8)).tolist()
    [2, 3, 0, 1, 6, 7, 4, 5]
    """
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack((second, first), dim=-2).flatten(-3)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Return heads (B, S, H, 3, D) with queries and keys rotated and values as they are.

    The arithmetic is float32; the result has heads' dtype.
    """
    rotated: Tensor = _Rotate.apply(heads, rotation.cos, rotation.sin)
    return rotated


class _Rotate(torch.autograd.Function):
    """The rotation; its backward pass is the inverse rotation, so only the angles are kept."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, sign=1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_outputs[0], cos, sin, sign=-1.0), None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, *, sign: float) -> Tensor:
    if not torch.compiler.is_compiling() and can_rotate(heads.device, heads.dtype):
        by_kernel: Tensor = torch.ops.ptuning.rotate(heads, cos, sin, sign)
        return by_kernel
    exact = heads[..., :2, :].float()  # (B, S, H, 2, D)
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    turned = torch.mul(exact, cos).addcmul_(swap_quarters(exact), sin, value=sign)
    return torch.cat((turned.to(heads.dtype), heads[..., 2:, :]), dim=-2)


_library = torch.library.Library("ptuning", "FRAGMENT")
_library.define("rotate(Tensor heads, Tensor cos, Tensor sin, float sign) -> Tensor")


def launch_rotate(heads: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Return heads (B, S, H, 3, D) rotated by cos and sin (B, S, D); sign -1 rotates back."""
    from ptuning.model.quantization.triton_backend import ceil_div, on_device
    from ptuning.model.rotary_triton import rotate_kernel

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
    reason = unavailable_reason("triton", device, dtype)
    if reason is not None:
        logger.warning("Rotary embedding takes plain operations, which are slower: %s", reason)
    return reason is None
