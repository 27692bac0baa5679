"""What a back end offers: two products with a packed weight, and the reason when it cannot run.

Shapes: M rows of activations, num_out x num_in the weight; packed is (num_out, num_in) or (num_out,
num_in / 2).
"""

from typing import Protocol

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(Protocol):
    """Multiplies by the weight `dequantize_weight` describes, and keeps no float copy of it."""

    name: str

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, bits: int) -> str | None:
        """Return why this back end cannot run there, with what to do about it; None when it can."""
        ...

    def matmul(self, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
        ...

    def matmul_transposed(self, grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
        ...


def dtype_reason(dtype: torch.dtype) -> str | None:
    """Return why no back end takes this dtype, or None."""
    if dtype in ACTIVATION_DTYPES:
        return None
    names = ", ".join(str(known).removeprefix("torch.") for known in ACTIVATION_DTYPES)
    return f"the activations are {str(dtype).removeprefix('torch.')}; use one of {names}"
