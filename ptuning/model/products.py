"""Matrix products of half-precision operands, summed and returned in float32."""

import torch
from torch import Tensor


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (..., N, D) @ right (..., D, M) in float32.

    CUDA's products read half precision as it is; elsewhere the operands are copied to float32.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.bmm.html (out_dtype)
    """
    if left.dtype is torch.float32 or left.device.type != "cuda":
        return left.float() @ right.float()
    by_batch = (left.flatten(0, -3), right.flatten(0, -3))
    product = torch.bmm(*by_batch, out_dtype=torch.float32)  # type: ignore[call-overload]
    found: Tensor = product.unflatten(0, left.shape[:-2])
    return found
