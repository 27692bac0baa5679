"""The rotation's own backward pass is the derivative of its forward pass."""

import torch

from ptuning.model.positions import inverse_frequencies, rotate, rotation_at


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    rotation = rotation_at(torch.randint(0, 50, (2, 2, 3)), inverse_frequencies(8))
    x = torch.randn(2, 3, 2, 3, 8, requires_grad=True)  # (B, S, H, 3, D)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((rotate(x, rotation) * weights).sum(), x)
    step = torch.randn_like(x)
    ahead, behind = rotate(x + step, rotation), rotate(x - step, rotation)
    slope = ((ahead - behind) * weights).sum() / 2  # exact: a rotation is linear
    torch.testing.assert_close(slope, (gradient * step).sum(), rtol=1e-4, atol=1e-5)


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    rotation = rotation_at(torch.randint(0, 50, (1, 2, 5)), inverse_frequencies(16))
    x = torch.randn(1, 5, 2, 3, 16).bfloat16()
    assert rotate(x, rotation).equal(rotate(x.float(), rotation).bfloat16())
