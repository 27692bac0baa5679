"""Tile sizes of the Triton int4 products: every candidate against the one in use.

Times the back end's own launch with its tile replaced, and a cold L2 cache: in a real step a
layer's weight comes from memory. All candidates are compiled first, in parallel.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.setting import SIZES, seconds
from ptuning.model.quantization import triton_backend
from ptuning.model.quantization.reference import packed_columns
from ptuning.model.quantization.triton_backend import MAX_MATVEC_ROWS, Tile, fused_tile

BITS = 4
ROWS = (1, 16, 64, 128, 256)
WEIGHTS = ((3, 1), (1, 1), (4, 1), (1, 4))  # rows and columns of a layer's four, times hidden size
WIDTHS, DEPTHS, WARPS, STAGES = (32, 64, 128), (64, 128), (4, 8), (3, 4)
MATVEC_TILES = tuple(product((4, 8, 16), (256, 512, 1024)))
COMPILED_SIZE = 512  # of a square weight: a kernel serves every size that 16 divides
MOST_WORKERS = 12

Choice = Tile | tuple[int, int]  # of a fused kernel; BLOCK_N and BLOCK_K of the matvec kernel


class Product(NamedTuple):
    """One kind of product; transposed is the backward pass, which has no matvec kernel."""

    num_rows: int
    transposed: bool

    @property
    def is_matvec(self) -> bool:
        """Whether the matvec kernel is used."""
        return self.num_rows <= MAX_MATVEC_ROWS and not self.transposed


PRODUCTS = [Product(count, transposed) for count in ROWS for transposed in (False, True)]


def candidates(kind: Product) -> list[Choice]:
    """Return the tiles to try for a kind of product."""
    if kind.is_matvec:
        return list(MATVEC_TILES)
    block_m = fused_tile(kind.num_rows, 1, transposed=kind.transposed).block_m
    found = product(WIDTHS, DEPTHS, WARPS, STAGES)
    if kind.transposed:
        return [Tile(block_m, depth, width, *how) for width, depth, *how in found]
    return [Tile(block_m, width, depth, *how) for width, depth, *how in found]


def used_tile(kind: Product, product_width: int) -> Choice:
    """Return what the back end chooses."""
    if kind.is_matvec:
        return triton_backend.MATVEC_TILE
    return fused_tile(kind.num_rows, product_width, transposed=kind.transposed)


def replaced(kind: Product, choice: Choice) -> AbstractContextManager[object]:
    """Make the back end use this tile inside the block."""
    if kind.is_matvec:
        return mock.patch.object(triton_backend, "MATVEC_TILE", choice)

    def chosen(num_rows: int, product_width: int, *, transposed: bool) -> Choice:
        return choice

    return mock.patch.object(triton_backend, "fused_tile", chosen)


def make_product(device: str, kind: Product, num_out: int, num_in: int) -> Callable[[], object]:
    """Return the product with random operands."""
    size = num_out, packed_columns(num_in, BITS)
    packed = torch.randint(-128, 128, size, dtype=torch.int8, device=device)
    scale = torch.ones(num_out, dtype=torch.float16, device=device)
    width = num_out if kind.transposed else num_in
    x = torch.randn(kind.num_rows, width, dtype=torch.bfloat16, device=device)
    backend = triton_backend.TritonBackend()
    multiply = backend.matmul_transposed if kind.transposed else backend.matmul
    return partial(multiply, x, packed, scale, BITS)


def compile_one(device: str, kind: Product, choice: Choice) -> None:
    """Compile a candidate into Triton's cache on disk."""
    from triton.runtime.errors import OutOfResources

    work = make_product(device, kind, COMPILED_SIZE, COMPILED_SIZE)
    with replaced(kind, choice), suppress(OutOfResources):  # of shared memory: met again below
        work()


def median_ms(device: str, work: Callable[[], object]) -> float:
    """Time work with a cold L2 cache on a GPU; on a CPU once."""
    if not device.startswith("cuda"):
        return 1e3 * seconds(device, work)
    from triton.testing import do_bench

    return float(do_bench(work, warmup=2, rep=10, return_mode="median"))


def tile_times(device: str, size: str) -> Iterator[tuple[str, float, str]]:
    """Yield, for each weight and product, the time of the tile in use and of the fastest."""
    from triton.runtime.errors import OutOfResources

    jobs = [(kind, choice) for kind in PRODUCTS for choice in candidates(kind)]
    if device.startswith("cuda"):
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            list(pool.map(partial(compile_one, device), *zip(*jobs, strict=True)))
    hidden = SIZES[size][1]
    for (rows, columns), kind in product(WEIGHTS, PRODUCTS):
        num_out, num_in = rows * hidden, columns * hidden
        used = used_tile(kind, num_in if kind.transposed else num_out)
        times: dict[Choice, float] = {}
        work = make_product(device, kind, num_out, num_in)
        for choice in dict.fromkeys([used, *candidates(kind)]):
            with replaced(kind, choice), suppress(OutOfResources):
                times[choice] = median_ms(device, work)
        best = min(times, key=times.__getitem__)
        name = f"{num_out} x {num_in}, {kind.num_rows} rows{', back' if kind.transposed else ''}"
        yield f"{name}: used {tuple(used)}", 1e3 * times[used], "us"
        yield f"{name}: fastest {tuple(best)}", 1e3 * times[best], "us"
