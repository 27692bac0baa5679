"""A card's own product of half precision sums in float32, wherever its operands lie."""

import pytest
import torch

from ptuning.engine.prefixes import float_product

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    """The first card."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_product_is_that_of_float32(
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    batch: tuple[int, ...],
    transposed: bool,
) -> None:
    torch.manual_seed(0)
    left = torch.randn(*batch, num_rows, 128).to(dtype)
    right = torch.randn(*batch, 128, 40).to(dtype)
    if transposed:  # keys (M, D) read as (D, M)
        right = right.mT.contiguous().mT
    found = float_product(left.to(device), right.to(device))
    assert found.dtype is torch.float32
    assert found.shape == (*batch, num_rows, 40)
    exact = left.double() @ right.double()
    error = (found.cpu().double() - exact).abs()
    # A rounding for each of 128 products and sums; tensor cores keep fewer guard bits, hence 4.
    bound = 4 * 128 * 2.0**-24 * (left.double().abs() @ right.double().abs())
    assert (error <= bound).all(), f"{(error / bound).max().item()} times the bound"
    if dtype is not torch.float32:
        assert not torch.equal(found, found.to(dtype).float()), "rounded to half precision"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slots_of_a_larger_cache_are_read_where_they_lie(
    device: torch.device, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    cache = torch.randn(8, 4, 64, 128).to(dtype)
    query = torch.randn(5, 4, 1, 128).to(dtype)
    expected = float_product(query, cache[:5, :, :24].transpose(-1, -2))
    on_card = cache.to(device)[:5, :, :24].transpose(-1, -2)
    found = float_product(query.to(device), on_card)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)
