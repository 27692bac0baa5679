"""Run by test_triton_backend in a process of its own: the kernels under Triton's interpreter, on the CPU.

Arguments: batch sizes to run instead of all. Prints one JSON object: case -> largest error in units of the tolerance. The interpreter multiplies bfloat16 as if its
bits were integers (`tl.dot`), so the fused products are left out in bfloat16; a card covers them (tests/gpu).
"""

import json
import sys
from typing import Any

import torch
from triton.runtime import interpreter

from ptuning.model.quantization import torch_backend
from ptuning.model.quantization.reference import quantize_weight
from ptuning.model.quantization.torch_backend import transposed_by_columns
from ptuning.model.quantization.triton_backend import (
    MAX_MATVEC_ROWS,
    TritonBackend,
    dequantize,
    fits_fused,
)
from tests.model.quantization.conftest import exact_product, product_tolerance

NUM_OUT, NUM_IN = 72, 96  # neither divides into whole tiles
ROWS = (1, 3, 6, 40, 300)


def index_by_item(patch: Any) -> Any:
    """Let a loop run to a size that is an argument: numpy 2.4 makes no number of an array (1,)."""

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def main() -> None:
    interpreter._patch_lang_tensor = index_by_item(interpreter._patch_lang_tensor)
    backend = TritonBackend()
    reason = backend.unavailable_reason(torch.device("cpu"), torch.float32)
    assert reason is None, reason
    torch_backend.CPU_BLOCK_BYTES = 1  # the smallest blocks
    torch.manual_seed(0)
    some_rows = [int(word) for word in sys.argv[1:]] or ROWS
    worst = {}
    for bits in (4, 8):
        weight = quantize_weight(torch.randn(NUM_OUT, NUM_IN) * 0.05, bits)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for num_rows in some_rows:
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
            # What a GPU does with a large gradient: blocks of 64 columns and of 32.
            grad = torch.randn(8, NUM_OUT).to(dtype)
            product = transposed_by_columns(grad, *weight, bits, dequantize)
            error = product.double() - exact_product(grad, weight, bits, transposed=True)
            ratio = error.abs() / product_tolerance(grad, weight, bits, transposed=True)
            worst[f"int{bits} {dtype} by columns"] = ratio.max().item()
    json.dump(worst, sys.stdout)


if __name__ == "__main__":
    main()
