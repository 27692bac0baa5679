"""Products of half precision are those of float32: nothing is rounded on the way."""

import pytest
import torch

from ptuning.engine.prefixes import float_product

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(7, 1, 16, 5), (7, 3, 16, 5), (2, 3, 4, 16, 5), (2, 3, 1, 64, 1)]  # (..., N, D, M)


def operands(shape, dtype, transposed):
    """Return left (..., N, D) and right (..., D, M); transposed ones lie the other way round."""
    torch.manual_seed(0)
    *batch, num_left, width, num_right = shape
    made = []
    for size, turned in zip(((num_left, width), (width, num_right)), transposed, strict=True):
        drawn = torch.randn(*batch, *(size[::-1] if turned else size)).to(dtype)
        made.append(drawn.transpose(-1, -2) if turned else drawn)
    return made


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_exact_but_for_float32_sums(dtype, shape, transposed):
    left, right = operands(shape, dtype, transposed)
    found = float_product(left, right)
    assert found.dtype is torch.float32
    assert found.shape == (*shape[:-3], shape[-3], shape[-1])
    exact = left.double() @ right.double()
    # one rounding to float32 for each of D products and D - 1 sums
    bound = (
        2
        * shape[-2]
        * torch.finfo(torch.float32).eps
        * (left.double().abs() @ right.double().abs())
    )
    assert ((found.double() - exact).abs() <= bound).all()


def test_sums_that_half_precision_cannot_hold_are_exact():
    ones = torch.full((1, 1, 4099), 16.0, dtype=torch.float16)
    assert float_product(ones, ones.transpose(1, 2)).item() == 4099 * 256  # float16 ends at 65504
    ones = ones.bfloat16()
    assert float_product(ones, ones.transpose(1, 2)).item() == 4099 * 256  # bfloat16: 8 bits
