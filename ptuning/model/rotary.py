"""Two-dimensional rotary position embedding of queries and keys.

Each head's width D is cut in two halves; the first is rotated by the first position channel, the
second by the other. Inverse frequencies are rounded to float16, as the published checkpoint stores
them. On CUDA the rotation is one Triton kernel (`ptuning.model.rotary_triton`), in compiled layers
the compiler's, else the plain operations here, which are the reference for both.
Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.4.2; two position channels as in
GLM, Du et al. 2021, https://arxiv.org/abs/2103.10360, section 2.3.
Shapes: B batch, S tokens, H heads, D width of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptuning.model.rotary_triton import can_rotate


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
