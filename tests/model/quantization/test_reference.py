"""The published numbers: bytes and scales of the golden files, and what packing must always hold."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ptuning.model.quantization.reference import (
    QuantizedWeight,
    dequantize_weight,
    largest_code,
    pack_codes,
    packed_columns,
    quantize_weight,
    unpack_codes,
)

BITS = [4, 8]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALLEST_HALF = 2.0**-24


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_layer_linear_quantises_to_the_published_bytes(
    golden: Path, bits: int, dtype: torch.dtype
) -> None:
    weights = load_file(golden / "chatglm-tiny" / "model.safetensors")
    stored = load_file(golden / "chatglm-tiny" / f"model-int{bits}.safetensors")
    names = [name for name in stored if name.endswith("weight_scale")]
    assert len(names) == 4 * 28
    for name in names:
        weight = name.removesuffix("_scale")
        packed, scale = quantize_weight(weights[weight].to(dtype), bits)
        assert torch.equal(packed, stored[weight]), weight
        assert torch.equal(scale, stored[name]), name


@st.composite
def code_tables(draw: st.DrawFn, bits: int) -> Tensor:
    rows, pairs = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    limit = largest_code(bits)
    values = st.integers(-limit - 1, limit)
    codes = draw(st.lists(values, min_size=rows * pairs * 2, max_size=rows * pairs * 2))
    return torch.tensor(codes, dtype=torch.int8).view(rows, pairs * 2)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_unpacking_undoes_packing(bits: int, data: st.DataObject) -> None:
    codes = data.draw(code_tables(bits))
    packed = pack_codes(codes, bits)
    assert packed.shape == (codes.shape[0], packed_columns(codes.shape[1], bits))
    assert packed.dtype == torch.int8
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_every_byte_is_two_signed_nibbles_even_column_high() -> None:
    every_byte = torch.arange(-128, 128).to(torch.int8)[:, None]
    codes = unpack_codes(every_byte, bits=4)
    for byte, (even, odd) in zip(every_byte.flatten().tolist(), codes.tolist(), strict=True):
        assert -8 <= even <= 7
        assert -8 <= odd <= 7
        assert byte == 16 * even + odd % 16


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=50, deadline=None)
@given(
    exponents=st.lists(st.integers(-30, 12), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_a_weight_comes_back_within_half_a_step(bits: int, exponents: list[int], seed: int) -> None:
    """Rounding to a code costs scale / 2; float16's division moves the quotient by 2^-11 of at most limit + 1.

    The product is rounded to float16 as well: 2^-11 of at most limit x scale, or 2^-25 below the normal range.
    Where the scale is coarse (subnormal), rounding it down moves the row's largest value out of the symmetric range;
    the code is then held at the limit, and the error is at most what the scale lost: limit x 2^-25.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** torch.tensor(exponents, dtype=torch.float32)[:, None]
    weight = (torch.randn(len(exponents), 16, generator=generator) * sizes).to(torch.float16)
    packed, scale = quantize_weight(weight, bits)
    limit = largest_code(bits)
    back = dequantize_weight(packed, scale, bits, torch.float32)
    steps = scale.float()[:, None]
    bound = steps * (0.5 + 2.0**-11 * (2 * limit + 1)) + (limit + 1) * 2.0**-25
    assert bool(((back - weight.float()).abs() <= bound).all())
    assert bool((unpack_codes(packed, bits).abs() <= limit).all())


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_zeros_and_rows_too_small_for_a_scale_become_zeros(bits: int) -> None:
    weight = torch.tensor([[0.0] * 4, [SMALLEST_HALF, 0.0, -SMALLEST_HALF, 0.0]])
    packed, scale = quantize_weight(weight, bits)
    assert scale.tolist() == [0.0, 0.0]
    assert packed.count_nonzero() == 0
    assert dequantize_weight(packed, scale, bits, torch.float16).count_nonzero() == 0


def test_codes_do_not_wrap_where_a_coarse_scale_would_push_them_past_the_nibble() -> None:
    """10 x 2^-24 / 7 rounds down to the smallest scale 2^-24, so the quotient is 10 and a nibble holds 7."""
    packed, scale = quantize_weight(torch.tensor([[10 * SMALLEST_HALF, 0.0]]), bits=4)
    assert scale.item() == SMALLEST_HALF
    assert unpack_codes(packed, bits=4).tolist() == [[7, 0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_float16_cannot_hold_are_refused_with_their_row(value: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"row 1 of a weight of shape \(3, 4\)"):
        quantize_weight(weight, bits=8)


def test_other_bits_and_odd_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="quantization_bit is 3; use 4 or 8"):
        quantize_weight(torch.ones(2, 2), bits=3)
    with pytest.raises(ValueError, match="3 columns; int4 packs them in pairs"):
        quantize_weight(torch.ones(2, 3), bits=4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantising_rounds_the_exact_product_to_float16_and_then_converts(
    make_weight: Callable[..., QuantizedWeight], bits: int, dtype: torch.dtype
) -> None:
    packed, scale = make_weight(5, 8, bits)
    exact = unpack_codes(packed, bits).double() * scale.double()[:, None]
    result = dequantize_weight(packed, scale, bits, dtype)
    assert result.shape == (5, 8)
    assert result.dtype == dtype
    assert torch.equal(result, exact.to(torch.float16).to(dtype))
    assert torch.equal(exact.to(torch.float16), unpack_codes(packed, bits).half() * scale[:, None])
