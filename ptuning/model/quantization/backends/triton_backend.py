"""The `triton` back end: products that convert the packed weight on the fly, compiled for the card
by Triton.

Three ways, by the number of activation rows M: a few (decoding) read the weight once per row
without tensor cores; up to MAX_FUSED_ROWS the conversion happens inside the product; beyond that
each weight tile would be converted many times over, so a block of the weight is converted once and
a library product does the rest.
Shapes: M rows of activations, num_out x num_in the weight.
"""

import importlib.util
import os
import subprocess
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ptuning.model.quantization.backends.blockwise import (
    Extract,
    blockwise_matmul,
    blockwise_matmul_transposed,
)
from ptuning.model.quantization.backends.interface import dtype_reason

MAX_MATVEC_ROWS = 4
MAX_FUSED_ROWS = 256
# In float32 there are no full-precision tensor cores to feed, and larger tiles outgrow most cards.
MAX_FUSED_ROWS_FLOAT32 = 16
# Tiles (BLOCK_N, BLOCK_K, warps, stages) tried once per shape; few, since each one is compiled.
TILES = ((32, 128, 4, 3), (64, 128, 4, 3), (128, 64, 8, 3))
TRANSPOSED_TILES = ((128, 32, 4, 3), (128, 64, 4, 3), (64, 128, 8, 3))
MATVEC_TILE = (8, 512)
EXTRACT_TILE = (16, 256)


def interpreting() -> bool:
    """Return whether TRITON_INTERPRET is set: kernels then run in Python, on CPU tensors, for
    tests.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def rows_tile(num_rows: int) -> int:
    """Return BLOCK_M: a power of two from 16, the least tensor cores take, to 128.

    >>> rows_tile(1), rows_tile(100), rows_tile(1000)
    (16, 128, 128)
    """
    return min(128, max(16, 1 << (num_rows - 1).bit_length()))


def fits_fused(x: Tensor) -> bool:
    """Return whether converting inside the product pays for these activation rows (M, anything)."""
    limit = MAX_FUSED_ROWS_FLOAT32 if x.dtype == torch.float32 else MAX_FUSED_ROWS
    return x.shape[0] <= limit


@cache
def tuned_kernel(name: str, tiles: tuple[tuple[int, int, int, int], ...]) -> Any:
    """Return a kernel that tries `tiles` the first time it meets a shape; the interpreter takes the
    first one.
    """
    import triton

    from ptuning.model.quantization.backends import triton_kernels

    configs = [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in tiles
    ]
    key = ["num_out", "num_in", "BITS", "BLOCK_M"]
    tune = triton.autotune(configs=configs[:1] if interpreting() else configs, key=key)
    return tune(getattr(triton_kernels, name))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make device the current card, which is where Triton launches; nothing to do under the
    interpreter.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def ceil_div(count: int, size: int) -> int:
    """Return how many tiles of size cover count.

    >>> ceil_div(9, 4)
    3
    """
    return -(-count // size)


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
            needed = (8, 0) if dtype == torch.bfloat16 else (7, 0)
            capability = torch.cuda.get_device_capability(device)
            if capability < needed:
                return (
                    f"{dtype} needs compute capability {needed[0]}.{needed[1]}; "
                    f"the card has {capability[0]}.{capability[1]}"
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
                return blockwise_matmul(x, packed.shape[0], tile_extractor(packed, scale, bits))
            product = x.new_empty(x.shape[0], packed.shape[0])
            self._fused("matmul_kernel", TILES, "BLOCK_N", x, packed, scale, product, bits)
            return product

    def matmul_transposed(self, grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
        num_in = packed.shape[1] * (8 // bits)
        with on_device(grad.device):
            if not fits_fused(grad):
                extract = tile_extractor(packed, scale, bits)
                return blockwise_matmul_transposed(grad, num_in, extract)
            product = grad.new_empty(grad.shape[0], num_in)
            kernel = "matmul_transposed_kernel"
            self._fused(kernel, TRANSPOSED_TILES, "BLOCK_K", grad, packed, scale, product, bits)
            return product

    @staticmethod
    def _fused(
        name: str,
        tiles: tuple[tuple[int, int, int, int], ...],
        tiled: str,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        product: Tensor,
        bits: int,
    ) -> None:
        """Fill product (M, width): one program per BLOCK_M rows and per tile of the width, which
        `tiled` names.
        """
        num_rows, width = product.shape
        block_m = rows_tile(num_rows)

        def grid(chosen: dict[str, int]) -> tuple[int, int]:
            return ceil_div(num_rows, block_m), ceil_div(width, chosen[tiled])

        tuned_kernel(name, tiles)[grid](
            x, packed, scale, product, num_rows, packed.shape[0], packed.shape[1] * (8 // bits),
            BITS=bits, BLOCK_M=block_m,
            # float32 products in full precision: tensor cores would keep 10 of 23 bits
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        )  # fmt: skip

    @staticmethod
    def _matvec(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        from ptuning.model.quantization.backends.triton_kernels import matvec_kernel

        num_out, num_in = packed.shape[0], packed.shape[1] * (8 // bits)
        product = x.new_empty(x.shape[0], num_out)
        block_n, block_k = MATVEC_TILE
        grid = (ceil_div(num_out, block_n), x.shape[0])
        matvec_kernel[grid](
            x, packed, scale, product, num_out, num_in, BITS=bits, BLOCK_N=block_n, BLOCK_K=block_k
        )
        return product


def tile_extractor(packed: Tensor, scale: Tensor, bits: int) -> Extract:
    """Return the function that writes the float weight rows start..stop into a block."""
    from ptuning.model.quantization.backends.triton_kernels import extract_kernel

    def extract(start: int, stop: int, block: Tensor) -> None:
        rows, num_in = block.shape
        block_n, block_k = EXTRACT_TILE
        grid = (ceil_div(rows, block_n), ceil_div(num_in, block_k))
        extract_kernel[grid](
            packed[start:stop], scale[start:stop], block, rows, num_in,
            BITS=bits, BLOCK_N=block_n, BLOCK_K=block_k,
        )  # fmt: skip

    return extract
