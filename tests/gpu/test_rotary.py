"""The rotation's Triton kernel against the plain operations, on a GPU."""

import pytest
import torch

from ptuning.model.positions import inverse_frequencies, rotate, rotation_at
from ptuning.model.rotary_triton import can_rotate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "width"), [(32, 128), (3, 48)])
def test_the_kernel_agrees_with_the_plain_operations(
    dtype: torch.dtype, num_heads: int, width: int
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    if not can_rotate(device, dtype):
        pytest.skip(f"no Triton for {dtype} here; the log says why")
    torch.manual_seed(0)
    rotation = rotation_at(torch.randint(0, 900, (2, 2, 37)), inverse_frequencies(width))
    heads = torch.randn(2, 37, num_heads, 3, width).to(dtype).requires_grad_()
    upstream = torch.randn_like(heads)
    (expected_gradient,) = torch.autograd.grad(rotate(heads, rotation), heads, upstream)
    there = heads.detach().to(device).requires_grad_()
    found = rotate(there, type(rotation)(*(angles.to(device) for angles in rotation)))
    (gradient,) = torch.autograd.grad(found, there, upstream.to(device))
    # Numbers reach 6, where a unit in the last place is 4 eps; each result is rounded once.
    bound = 4 * torch.finfo(dtype).eps
    for result, expected in ((found, rotate(heads, rotation)), (gradient, expected_gradient)):
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=bound)
