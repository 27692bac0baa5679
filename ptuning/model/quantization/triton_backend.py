"""The `triton` back end: products that dequantise the packed weight inside a Triton kernel.

Three ways, by the number of activation rows M. Up to MAX_MATVEC_ROWS (decoding), the weight is read
once per row, without tensor cores. Up to MAX_FUSED_ROWS in half precision, it is dequantised inside
the product. Beyond, that would dequantise each tile many times, so a block of the weight is
dequantised once and a library product reads it.
Codes become the reference's weights in registers: code x scale in float16, then the activations'
dtype. Sums are float32, offsets 64-bit. Sizes are arguments: Triton specialises them only on being
multiples of 16, which vector loads need, and `num_rows`, which changes with every batch, not at
all, so a kernel serves all weights. Import this module only when a GPU is used: it imports triton.
Without Triton the kernels are plain functions that are never called.
Shapes: M rows of activations (`num_rows`), num_out x num_in the weight, `width` bytes in a packed
row; BLOCK_M x BLOCK_N (x BLOCK_K) the tile of one program.
"""

# Kernel parameters take Triton's own annotations or none.
# mypy: disable-error-code="no-untyped-def"

import os
import subprocess
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptuning.model.quantization.torch_backend import (
    MAX_FUSED_ROWS,
    blockwise_matmul,
    blockwise_matmul_transposed,
)

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # TritonBackend.unavailable_reason says what to install
    triton = tl = constexpr = None

MAX_MATVEC_ROWS = 4
MIN_CAPABILITY = (7, 0)
MIN_FUSED_CAPABILITY = (8, 0)  # below, Triton's products take no tensor cores and spill registers
MIN_PROGRAMS = 128  # an A100 has 108 multiprocessors, an H100 132
MATVEC_TILE = (8, 512)
DEQUANTIZE_TILE = (16, 256)


class Tile(NamedTuple):
    """The part of a product that one program of a fused kernel computes, and how."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 3


def ceil_div(count: int, size: int) -> int:
    """Return how many tiles of size cover count.

    >>> ceil_div(9, 4)
    3
    """
    return -(-count // size)


def fused_tile(num_rows: int, product_width: int, *, transposed: bool) -> Tile:
    """Return the tile for a product (num_rows, product_width).

    A table instead of autotuning, which would allocate a 256 MiB buffer in the first backward pass
    and could sum in another order in every process. Tiles are as wide as possible while at least
    MIN_PROGRAMS remain, and none spills (tests/model/quantization/test_triton_aot.py).

    >>> fused_tile(16, 4096, transposed=False)
    Tile(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=3)
    """
    block_m = min(128, max(16, 1 << (num_rows - 1).bit_length()))  # tensor cores take at least 16
    row_tiles, width = ceil_div(num_rows, block_m), 128
    while width > 32 and row_tiles * ceil_div(product_width, width) < MIN_PROGRAMS:
        width //= 2
    depth = 128 if block_m * width <= 1024 else 64  # 128 spills for larger ones, on 8.0 or on 9.0
    num_warps = 8 if width == 128 else 4
    if transposed:
        return Tile(block_m, depth, width, num_warps)
    return Tile(block_m, width, depth, num_warps)


def is_interpreted() -> bool:
    """Return whether TRITON_INTERPRET is set: tests run the kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fits_fused(x: Tensor) -> bool:
    """Return whether dequantising inside the product pays for these activation rows (M, any).

    Not in float32, which has no full-precision tensor cores and whose tiles spill registers.
    """
    if x.dtype == torch.float32 or x.shape[0] > MAX_FUSED_ROWS:
        return False
    return x.device.type != "cuda" or capability(x.device) >= MIN_FUSED_CAPABILITY


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability."""
    return torch.cuda.get_device_capability(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make device the current GPU, where Triton launches; do nothing in the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TritonBackend:
    """NVIDIA GPUs from compute capability 7.0 on (bfloat16 from 8.0)."""

    name = "triton"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return the reason; compile and run one small kernel where the device should run it."""
        if triton is None:
            return "triton is not installed: pip install triton"
        if device.type != "cuda" and not (is_interpreted() and device.type == "cpu"):
            return f"it needs a CUDA device; the device is {device}"
        if device.type == "cuda":
            if not torch.cuda.is_available():
                return "it needs a GPU and a CUDA build of PyTorch; this PyTorch sees none"
            needed = (8, 0) if dtype == torch.bfloat16 else MIN_CAPABILITY
            found = torch.cuda.get_device_capability(device)
            if found < needed:
                return (
                    f"{dtype} needs compute capability {needed[0]}.{needed[1]}; "
                    f"the GPU has {found[0]}.{found[1]}"
                )
        return self._compile_error(device)

    @staticmethod
    @cache
    def _compile_error(device: torch.device) -> str | None:
        """Compile and run the smallest kernel: Triton needs a C compiler and a driver it knows."""
        from triton.errors import TritonError

        packed = torch.zeros(1, 16, dtype=torch.int8, device=device)
        scale = torch.ones(1, dtype=torch.float16, device=device)
        try:
            with on_device(device):
                TritonBackend._matvec(torch.zeros(1, 16, device=device), packed, scale, 8)
        except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            return f"triton could not compile or run a kernel: {type(error).__name__}: {error}"
        return None

    def matmul(self, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
        with on_device(x.device):
            if x.shape[0] <= MAX_MATVEC_ROWS:
                return self._matvec(x, packed, scale, bits)
            if not fits_fused(x):
                return blockwise_matmul(x, packed, scale, dequantize)
            return self._fused(x, packed, scale, bits, transposed=False)

    def matmul_transposed(self, grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
        with on_device(grad.device):
            if not fits_fused(grad):
                return blockwise_matmul_transposed(grad, packed, scale, bits, dequantize)
            return self._fused(grad, packed, scale, bits, transposed=True)

    @staticmethod
    def _fused(x: Tensor, packed: Tensor, scale: Tensor, bits: int, *, transposed: bool) -> Tensor:
        """Return the product (M, its width): a program per BLOCK_M rows and tile of the width."""
        num_rows, (num_out, width) = x.shape[0], packed.shape
        product = x.new_empty(num_rows, width * (8 // bits) if transposed else num_out)
        product_width = product.shape[1]
        tile = fused_tile(num_rows, product_width, transposed=transposed)
        kernel, block_width = matmul_kernel, tile.block_n
        if transposed:
            kernel, block_width = matmul_transposed_kernel, tile.block_k
        kernel[ceil_div(num_rows, tile.block_m), ceil_div(product_width, block_width)](
            x, packed, scale, product, num_rows, num_out, width, BITS=bits,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return product

    @staticmethod
    def _matvec(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        num_out, width = packed.shape
        product = x.new_empty(x.shape[0], num_out)
        block_n, block_k = MATVEC_TILE
        matvec_kernel[ceil_div(num_out, block_n), x.shape[0]](
            x, packed, scale, product, num_out, width, BITS=bits, BLOCK_N=block_n, BLOCK_K=block_k
        )
        return product


def dequantize(packed: Tensor, scale: Tensor, block: Tensor) -> None:
    """Fill block (rows, columns) with the float weight; see `torch_backend.Dequantize`."""
    (num_rows, num_columns), width = block.shape, packed.shape[1]
    block_n, block_k = DEQUANTIZE_TILE
    dequantize_kernel[ceil_div(num_rows, block_n), ceil_div(num_columns, block_k)](
        packed, scale, block, num_rows, width, packed.stride(0),
        BITS=8 * width // num_columns, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip


def jit(kernel: Any) -> Any:
    """Compile a kernel with Triton, where that is installed."""
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["num_rows"])


@jit
def load_weight(
    packed, scale, rows, first, num_out, width, stride, BITS: constexpr, BLOCK_K: constexpr
):  # fmt: skip
    """Return float16 weights (len(rows), BLOCK_K) of the columns from `first` on; 0 outside.

    `stride` is the distance in bytes between consecutive rows of codes.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    columns = first // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    inside = (rows[:, None] < num_out) & (columns[None, :] < width)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    codes = tl.load(packed + offsets, mask=inside, other=0).to(tl.int32)
    if BITS == 4:
        # High nibble: even column. The shifts of a signed 32-bit integer keep the nibble's sign.
        codes = tl.interleave(codes >> 4, (codes << 28) >> 28)
    row_scale = tl.load(scale + rows, mask=rows < num_out, other=0.0)
    return codes.to(tl.float16) * row_scale[:, None]


@jit
def matmul_kernel(
    x, packed, scale, product, num_rows, num_out, width,
    BITS: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """Write x (M, num_in) times the transposed weight, a BLOCK_M x BLOCK_N tile per program."""
    num_in = width * (8 // BITS)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, num_in, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < num_rows) & (inputs[None, :] < num_in)
        tile = tl.load(
            x + rows.to(tl.int64)[:, None] * num_in + inputs[None, :], mask=inside, other=0.0
        )
        weight = load_weight(packed, scale, outputs, first, num_out, width, width, BITS, BLOCK_K)
        weight = tl.trans(weight.to(tile.dtype))  # (BLOCK_K, BLOCK_N)
        total = tl.dot(tile, weight, total)
    inside = (rows[:, None] < num_rows) & (outputs[None, :] < num_out)
    offsets = rows.to(tl.int64)[:, None] * num_out + outputs[None, :]
    tl.store(product + offsets, total.to(product.dtype.element_ty), mask=inside)


@jit
def matmul_transposed_kernel(
    grad, packed, scale, product, num_rows, num_out, width,
    BITS: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """Write grad (M, num_out) times the weight, a BLOCK_M x BLOCK_K tile per program."""
    num_in = width * (8 // BITS)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    inputs = first + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for first_out in range(0, num_out, BLOCK_N):
        outputs = first_out + tl.arange(0, BLOCK_N)
        inside = (rows[:, None] < num_rows) & (outputs[None, :] < num_out)
        tile = tl.load(
            grad + rows.to(tl.int64)[:, None] * num_out + outputs[None, :], mask=inside, other=0.0
        )
        weight = load_weight(packed, scale, outputs, first, num_out, width, width, BITS, BLOCK_K)
        total = tl.dot(tile, weight.to(tile.dtype), total)
    inside = (rows[:, None] < num_rows) & (inputs[None, :] < num_in)
    offsets = rows.to(tl.int64)[:, None] * num_in + inputs[None, :]
    tl.store(product + offsets, total.to(product.dtype.element_ty), mask=inside)


@jit
def matvec_kernel(
    x, packed, scale, product, num_out, width,
    BITS: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """Write x (M, num_in) times the transposed weight for a few rows, one row per program.

    No tensor cores: a row of x gives them nothing to share, and reading the weight is the cost.
    """
    num_in = width * (8 // BITS)
    row = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(0, num_in, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        values = tl.load(x + row * num_in + inputs, mask=inputs < num_in, other=0.0).to(tl.float32)
        weight = load_weight(packed, scale, outputs, first, num_out, width, width, BITS, BLOCK_K)
        total += weight.to(tl.float32) * values[None, :]
    result = tl.sum(total, axis=1).to(product.dtype.element_ty)
    tl.store(product + row * num_out + outputs, result, mask=outputs < num_out)


@jit
def dequantize_kernel(
    packed, scale, weight, num_rows, width, stride,
    BITS: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """Write the float weight (num_rows, num_in), one BLOCK_N x BLOCK_K tile per program."""
    num_in = width * (8 // BITS)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    inputs = first + tl.arange(0, BLOCK_K)
    values = load_weight(packed, scale, outputs, first, num_rows, width, stride, BITS, BLOCK_K)
    inside = (outputs[:, None] < num_rows) & (inputs[None, :] < num_in)
    tl.store(
        weight + outputs.to(tl.int64)[:, None] * num_in + inputs[None, :],
        values.to(weight.dtype.element_ty),
        mask=inside,
    )
