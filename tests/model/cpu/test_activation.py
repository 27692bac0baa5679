"""GELU by the sigmoid is the tanh form, in values, slopes and types, whatever blocks it is cut in."""

import pytest
import torch
from torch.nn import functional

from ptuning.model.cpu import linear
from ptuning.model.cpu.linear import gelu

# Rounding of float32 is 6e-8 of the value; the sigmoid's few steps lose a handful of it. Half
# types round the value, and the slope and its product, to their own 2**-9 and 2**-11.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def values():
    """The whole range that matters, its ends, and where the function turns."""
    torch.manual_seed(0)
    corners = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 3e4, -3e4, -0.7517916])
    return torch.cat((torch.linspace(-12, 12, 4001), torch.randn(1000) * 3, corners))


def exact(x, upstream):
    """The paper's formula in float64."""
    wide = x.detach().double().requires_grad_()
    inner = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    expected = 0.5 * wide * (1 + torch.tanh(inner))
    (gradient,) = torch.autograd.grad(expected, wide, upstream.double())
    return expected.detach(), gradient


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("block", [7, 1000, 2**18])
def test_values_and_gradient_are_those_of_the_formula(dtype, block, monkeypatch):
    monkeypatch.setattr(linear, "GELU_BLOCK", block)
    x = values().to(dtype).requires_grad_()
    upstream = torch.randn(x.shape).to(dtype)
    output = gelu(x)
    (gradient,) = torch.autograd.grad(output, x, upstream)
    expected, expected_gradient = exact(x, upstream)
    assert output.dtype == gradient.dtype == dtype
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(output.double(), expected, atol=limit, rtol=limit)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=4 * limit, rtol=limit)
    with torch.no_grad():
        assert torch.equal(gelu(x), output), "without a gradient the same numbers"


def test_the_input_stays_as_it_was_and_need_not_be_contiguous():
    x = values()[:4000].view(40, 100).t()
    before = x.clone()
    torch.testing.assert_close(gelu(x), functional.gelu(before, approximate="tanh"))
    assert torch.equal(x, before)


def test_what_is_not_finite_stays_so():
    """The step guard looks for it in the loss."""
    x = torch.tensor([float("nan"), float("inf"), 1.0], requires_grad=True)
    output = gelu(x)
    assert output.isnan()[0]
    assert not output.isfinite()[1]
    assert output[2].item() == pytest.approx(0.8411920, abs=1e-6)


def test_wider_types_take_torchs_own_function(monkeypatch):
    monkeypatch.setattr(linear, "_gelu_in_blocks", lambda *_: pytest.fail("not asked for"))
    wide = values().double()
    assert torch.equal(gelu(wide), functional.gelu(wide, approximate="tanh"))


def test_the_slope_is_kept_in_place_of_the_input():
    """What a layer holds until its backward pass must not grow."""
    x = torch.randn(50, 40, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gelu(x)
    assert [tensor.shape for tensor in kept] == [x.shape]
