"""Weights and activations of ordinary size, and the error a product may carry."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptuning.model.quantization.reference import QuantizedWeight, dequantize_weight, quantize_weight

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture
def make_weight() -> Callable[..., QuantizedWeight]:
    """A function that quantises a random weight (num_out, num_in)."""

    def make(num_out: int, num_in: int, bits: int, seed: int = 0) -> QuantizedWeight:
        generator = torch.Generator().manual_seed(seed)
        return quantize_weight(torch.randn(num_out, num_in, generator=generator) * 0.05, bits)

    return make


@pytest.fixture
def make_linear() -> Callable[..., nn.Linear]:
    """A function that builds a random float linear."""

    def make(in_features: int, out_features: int, seed: int = 0) -> nn.Linear:
        torch.manual_seed(seed)
        return nn.Linear(in_features, out_features)

    return make


def exact_product(x: Tensor, weight: QuantizedWeight, bits: int, *, transposed: bool) -> Tensor:
    """Return the reference weight's product in float64: (M, num_out), or (M, num_in)."""
    dense = dequantize_weight(*weight, bits, x.dtype).double()
    return x.double() @ (dense if transposed else dense.T)


def product_tolerance(x: Tensor, weight: QuantizedWeight, bits: int, *, transposed: bool) -> Tensor:
    """Return how far each entry of a back end's product may lie from exact_product.

    u is the unit roundoff of x's dtype, n the number of terms, A = sum |x_i w_i|. Every back end multiplies by the
    reference weight itself. It sums in float32 in any order: at most n 2^-24 A. It rounds the result, and a library
    or a block-wise sum may first round parts of it to x's dtype: 3 u A. Below float16's normal range a rounding is
    2^-25 in absolute terms, once for the result and once for each of at most n parts.
    """
    dense = dequantize_weight(*weight, bits, x.dtype).double().abs()
    absolute = x.double().abs() @ (dense if transposed else dense.T)  # A
    num_terms = x.shape[1]
    relative = 3 * UNIT_ROUNDOFF[x.dtype] + num_terms * 2.0**-24
    tiny = 2.0**-25 * (1 + num_terms) if x.dtype == torch.float16 else 0.0
    return relative * absolute + tiny
