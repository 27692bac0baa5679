"""The `triton` back end: products that dequantise the packed weight on the fly, compiled by Triton.

Three ways, by the number of activation rows M: a few (decoding) read the weight once per row
without tensor cores; up to MAX_FUSED_ROWS in half precision the weight is dequantised inside the
product; beyond that, fusing would dequantise each tile many times or leave tensor cores idle, so a
block of the weight is dequantised once and a library product does the rest.
Shapes: M rows of activations, num_out x num_in the weight.
"""

import importlib.util
import os
import subprocess
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ptuning.model.quantization.blockwise import (
    blockwise_matmul,
    blockwise_matmul_transposed,
)
from ptuning.model.quantization.interface import dtype_reason

MAX_MATVEC_ROWS = 4
MAX_FUSED_ROWS = 256
MIN_CAPABILITY = (7, 0)
# Triton's products use tensor cores from here on; below they are plain multiply-adds that spill.
MIN_FUSED_CAPABILITY = (8, 0)
MIN_PROGRAMS = 128  # an A100 has 108 multiprocessors, an H100 132
MATVEC_TILE = (8, 512)
DEQUANTIZE_TILE = (16, 256)


def ceil_div(count: int, size: int) -> int:
    """Return how many tiles of size cover count.

    >>> ceil_div(9, 4)
    3
    """
    return -(-count // size)


class Tile(NamedTuple):
    """The part of a product that one program of a fused kernel computes, and how."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 3


def fused_tile(num_rows: int, product_width: int, *, transposed: bool) -> Tile:
    """Return the tile for a product (num_rows, product_width).

    A table in place of autotuning: no trial runs, whose 256 MiB buffer would fall into the first
    backward pass, and the same order of sums in every process. Tiles are as wide as possible while
    at least MIN_PROGRAMS remain, and none spills (tests/model/quantization/test_triton_aot.py).

    >>> fused_tile(16, 4096, transposed=False)
    Tile(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=3)
    """
    block_m = min(128, max(16, 1 << (num_rows - 1).bit_length()))  # tensor cores take 16 at least
    width = 128
    while (
        width > 32 and ceil_div(num_rows, block_m) * ceil_div(product_width, width) < MIN_PROGRAMS
    ):
        width //= 2
    depth = 128 if block_m * width <= 1024 else 64  # 128 spills for larger ones, on 8.0 or on 9.0
    num_warps = 8 if width == 128 else 4
    if transposed:
        return Tile(block_m, depth, width, num_warps)
    return Tile(block_m, width, depth, num_warps)


def interpreting() -> bool:
    """Return whether TRITON_INTERPRET is set: kernels then run in Python, on CPU tensors, for
    tests.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def fits_fused(x: Tensor) -> bool:
    """Return whether dequantising inside the product pays for these activation rows (M, anything).

    Not in float32, which has no full-precision tensor cores and whose tiles spill registers.
    """
    if x.dtype == torch.float32 or x.shape[0] > MAX_FUSED_ROWS:
        return False
    return x.device.type != "cuda" or capability(x.device) >= MIN_FUSED_CAPABILITY


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return a card's compute capability."""
    return torch.cuda.get_device_capability(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make device the current card, which is where Triton launches; nothing to do under the
    interpreter.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TritonBackend:
    """CUDA cards from compute capability 7.0 on (bfloat16 from 8.0)."""

    name = "triton"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, bits: int) -> str | None:
        """Return the reason, after compiling one small kernel where the device could run it."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        if device.type != "cuda" and not (interpreting() and device.type == "cpu"):
            return f"it needs a CUDA device; the device is {device}"
        if device.type == "cuda":
            if not torch.cuda.is_available():
                return "it needs a card and a CUDA build of PyTorch; this PyTorch sees none"
            needed = (8, 0) if dtype == torch.bfloat16 else MIN_CAPABILITY
            found = torch.cuda.get_device_capability(device)
            if found < needed:
                return (
                    f"{dtype} needs compute capability {needed[0]}.{needed[1]}; "
                    f"the card has {found[0]}.{found[1]}"
                )
        return dtype_reason(dtype) or self._compiling_reason(device)

    @staticmethod
    @cache
    def _compiling_reason(device: torch.device) -> str | None:
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
                return blockwise_matmul(x, packed, scale, bits, dequantize)
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
        from ptuning.model.quantization import triton_kernels

        num_rows, (num_out, width) = x.shape[0], packed.shape
        product = x.new_empty(num_rows, width * (8 // bits) if transposed else num_out)
        product_width = product.shape[1]
        tile = fused_tile(num_rows, product_width, transposed=transposed)
        kernel, block_width = triton_kernels.matmul_kernel, tile.block_n
        if transposed:
            kernel, block_width = triton_kernels.matmul_transposed_kernel, tile.block_k
        kernel[ceil_div(num_rows, tile.block_m), ceil_div(product_width, block_width)](
            x, packed, scale, product, num_rows, num_out, width, BITS=bits,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return product

    @staticmethod
    def _matvec(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        from ptuning.model.quantization.triton_kernels import matvec_kernel

        num_out, width = packed.shape
        product = x.new_empty(x.shape[0], num_out)
        block_n, block_k = MATVEC_TILE
        matvec_kernel[ceil_div(num_out, block_n), x.shape[0]](
            x, packed, scale, product, num_out, width, BITS=bits, BLOCK_N=block_n, BLOCK_K=block_k
        )
        return product


def dequantize(packed: Tensor, scale: Tensor, block: Tensor) -> None:
    """Fill block (rows, columns) with the float weight; see `blockwise.Dequantize`."""
    from ptuning.model.quantization.triton_kernels import dequantize_kernel

    (num_rows, num_columns), width = block.shape, packed.shape[1]
    block_n, block_k = DEQUANTIZE_TILE
    dequantize_kernel[ceil_div(num_rows, block_n), ceil_div(num_columns, block_k)](
        packed, scale, block, num_rows, width, packed.stride(0),
        BITS=8 * width // num_columns, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
