"""Run by test_triton_backend in a process of its own: the kernels under Triton's interpreter, on the CPU.

Prints one JSON object: case -> largest error in units of the tolerance. The interpreter multiplies bfloat16 as if its
bits were integers (`tl.dot`), so the fused products are left out in bfloat16; a card covers them (tests/gpu).
"""

import json
import sys

import torch

from ptuning.model.quantization.backends.triton_backend import (
    MAX_MATVEC_ROWS,
    TritonBackend,
    fits_fused,
)
from ptuning.model.quantization.reference import quantize_weight
from tests.model.quantization.conftest import exact_product, product_tolerance

NUM_OUT, NUM_IN = 72, 96  # neither divides into whole tiles
ROWS = (1, 3, 6, 40, 300)


def main() -> None:
    backend = TritonBackend()
    reason = backend.unavailable_reason(torch.device("cpu"), torch.float32, 4)
    assert reason is None, reason
    torch.manual_seed(0)
    worst = {}
    for bits in (4, 8):
        weight = quantize_weight(torch.randn(NUM_OUT, NUM_IN) * 0.05, bits)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for num_rows in ROWS:
                for transposed, width in ((False, NUM_IN), (True, NUM_OUT)):
                    x = torch.randn(num_rows, width).to(dtype)
                    fused = fits_fused(x) and (transposed or num_rows > MAX_MATVEC_ROWS)
                    if dtype == torch.bfloat16 and fused:
                        continue
                    product = backend.matmul_transposed if transposed else backend.matmul
                    error = product(x, *weight, bits).double() - exact_product(
                        x, weight, bits, transposed=transposed
                    )
                    ratio = error.abs() / product_tolerance(x, weight, bits, transposed=transposed)
                    worst[f"int{bits} {dtype} M={num_rows} transposed={transposed}"] = (
                        ratio.max().item()
                    )
    json.dump(worst, sys.stdout)


if __name__ == "__main__":
    main()
