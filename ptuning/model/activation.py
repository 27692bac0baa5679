"""GELU in its tanh form, with its slope formed beside it on a CPU.

PyTorch's kernel spends its time in a tanh of full precision, in both passes. As 1 + tanh(z) is
2 sigmoid(2 z), the same function is x sigmoid(u) with u = a x + b x^3, which takes half the time in
blocks that stay in the processor's cache; the slope s + (s - s^2) (3 u - 2 a x), s = sigmoid(u),
comes out of the same numbers, so that the backward pass is one product.
Source: Gaussian Error Linear Units, section 2, https://arxiv.org/abs/1606.08415
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptuning.model.linear import prefers_plain_torch

LINEAR = 2 * math.sqrt(2 / math.pi)  # a; the paper's sqrt(2 / pi), doubled
CUBIC = LINEAR * 0.044715  # b
BLOCK_ELEMENTS = 2**18  # 1 MiB in float32
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def gelu(x: Tensor) -> Tensor:
    """Return 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), element by element.

    On a CPU the gradient is a number for |x| up to 1e12, where x^3 is one too.
    """
    if x.device.type != "cpu" or x.dtype not in TYPES or prefers_plain_torch():
        return functional.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        output: Tensor = _GeluWithSlope.apply(x)
        return output
    return _blockwise(x.contiguous(), None)


class _GeluWithSlope(torch.autograd.Function):
    """Keeps the slope in place of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        slope = torch.empty_like(x)
        ctx.save_for_backward(slope)
        return _blockwise(x, slope)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] * ctx.saved_tensors[0]


def _blockwise(x: Tensor, slope: Tensor | None) -> Tensor:
    """Return GELU of a contiguous x, and fill slope; the arithmetic is float32."""
    output = torch.empty_like(x)
    blocks = [x.view(-1).split(BLOCK_ELEMENTS), output.view(-1).split(BLOCK_ELEMENTS)]
    slopes = [None] * len(blocks[0]) if slope is None else slope.view(-1).split(BLOCK_ELEMENTS)
    linear = torch.tensor(LINEAR)
    for source, target, slope_target in zip(*blocks, slopes, strict=True):
        exact = source.float()
        power = torch.addcmul(linear, exact, exact, value=CUBIC).mul_(exact)  # u
        if slope_target is None:
            target.copy_(power.sigmoid_().mul_(exact))
            continue
        third = torch.add(power, exact, alpha=-2 / 3 * LINEAR)  # u - 2/3 a x
        share = power.sigmoid_()  # s
        target.copy_(share * exact)
        bend = torch.addcmul(share, share, share, value=-1.0)  # s - s^2
        slope_target.copy_(share.addcmul_(bend, third, value=3.0))
    return output
