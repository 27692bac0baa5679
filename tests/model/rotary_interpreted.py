"""Run by test_rotary in a process of its own: the Triton kernel in Triton's interpreter, on the CPU.

Prints the largest difference from the plain operations, in units of the result dtype's rounding.
"""

import sys

import torch

from ptuning.model.positions import inverse_frequencies, rotate, rotation_at
from ptuning.model.rotary_triton import launch_rotate


def main() -> None:
    torch.manual_seed(0)
    worst = 0.0
    for num_heads, width in ((3, 16), (9, 12), (2, 128)):
        rotation = rotation_at(torch.randint(0, 900, (2, 2, 5)), inverse_frequencies(width))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            heads = torch.randn(2, 5, num_heads, 3, width).to(dtype)
            found = launch_rotate(heads, *rotation, 1.0)
            back = launch_rotate(found, *rotation, -1.0)
            for result, expected in ((found, rotate(heads, rotation)), (back, heads)):
                error = (result.float() - expected.float()).abs().max().item()
                worst = max(worst, error / torch.finfo(dtype).eps)
            assert torch.equal(found[..., 2, :], heads[..., 2, :]), "values stay as they are"
    sys.stdout.write(f"{worst}\n")


if __name__ == "__main__":
    main()
