"""The `torch` back end against the reference, with blocks that divide the weight and blocks that do not."""

from collections.abc import Callable

import pytest
import torch

from ptuning.model.quantization import torch_backend
from ptuning.model.quantization.reference import QuantizedWeight
from ptuning.model.quantization.torch_backend import (
    Dequantizer,
    TorchBackend,
    block_bytes,
    columns_per_block,
    rows_per_block,
    transposed_by_columns,
)
from tests.model.quantization.conftest import exact_product, product_tolerance

NUM_OUT, NUM_IN = 45, 64


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_rows", [1, 7, 15, 1000])
@pytest.mark.parametrize("num_rows", [1, 6])
def test_both_products_agree_with_the_reference(
    make_weight: Callable[..., QuantizedWeight],
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    dtype: torch.dtype,
    block_rows: int,
    num_rows: int,
) -> None:
    monkeypatch.setattr(torch_backend, "CPU_BLOCK_BYTES", block_rows * NUM_IN * dtype.itemsize)
    weight = make_weight(NUM_OUT, NUM_IN, bits)
    generator = torch.Generator().manual_seed(1)
    for transposed, width in ((False, NUM_IN), (True, NUM_OUT)):
        x = torch.randn(num_rows, width, generator=generator).to(dtype)
        backend = TorchBackend()
        product = backend.matmul_transposed if transposed else backend.matmul
        result = product(x, *weight, bits)
        assert result.dtype == dtype
        error = (result.double() - exact_product(x, weight, bits, transposed=transposed)).abs()
        assert bool((error <= product_tolerance(x, weight, bits, transposed=transposed)).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_in", [192, 160, 42])
def test_blocks_of_columns_agree_with_the_reference(
    make_weight: Callable[..., QuantizedWeight],
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    num_in: int,
) -> None:
    """As on a GPU: codes in their own order, blocks of 64 columns and a narrower last one."""
    monkeypatch.setattr(torch_backend, "CPU_BLOCK_BYTES", 64 * NUM_OUT * 2)
    weight = make_weight(NUM_OUT, num_in, bits)
    grad = torch.randn(6, NUM_OUT, generator=torch.Generator().manual_seed(1)).bfloat16()
    result = transposed_by_columns(grad, *weight, bits, Dequantizer(in_halves=False))
    error = (result.double() - exact_product(grad, weight, bits, transposed=True)).abs()
    assert bool((error <= product_tolerance(grad, weight, bits, transposed=True)).all())


def test_the_tolerance_catches_a_weight_that_was_not_rounded_to_float16(
    make_weight: Callable[..., QuantizedWeight],
) -> None:
    """The check itself: the mistake that misses the golden logits is also outside the tolerance."""
    weight = make_weight(NUM_OUT, NUM_IN, 8)
    x = torch.randn(6, NUM_IN, generator=torch.Generator().manual_seed(1))
    unrounded = weight.packed.float() * weight.scale.float()[:, None]
    error = (x @ unrounded.T - exact_product(x, weight, 8, transposed=False)).abs()
    assert bool((error > product_tolerance(x, weight, 8, transposed=False)).any())


def test_a_block_is_never_larger_than_its_budget_nor_empty() -> None:
    x = torch.empty(1, 4096)
    assert rows_per_block(16384, 4096, x) == 256  # 4 MiB / (4096 x 4 bytes)
    assert rows_per_block(100, 4096, x) == 100
    assert rows_per_block(100, 2**21, x) == 1
    assert columns_per_block(16384, 4096, x) == 64
    assert columns_per_block(1000, 4096, x) == 1024  # 1,048 rounded down to a multiple of 64
    assert columns_per_block(16, 100, x) == 100


def test_other_devices_take_the_smallest_block() -> None:
    """There is no way to ask them all for their memory."""
    assert block_bytes(torch.device("mps")) == 32 * 2**20


def test_float16_products_that_overflow_on_the_way_do_not_overflow_here() -> None:
    """The codes alone would sum to 127 x 64 x 100, far beyond 65504; the product is 64."""
    packed = torch.full((1, 64), 127, dtype=torch.int8)
    scale = torch.tensor([0.01 / 127], dtype=torch.float16)
    x = torch.full((1, 64), 100.0, dtype=torch.float16)
    assert TorchBackend().matmul(x, packed, scale, 8).item() == pytest.approx(64, rel=2e-2)
