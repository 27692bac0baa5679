"""The two-dimensional rotary embedding against its definition, written out the long way."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptuning.model.positions import Rotation, inverse_frequencies, rotate, rotation_at


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x (B, S, H, D) as queries; as keys they must turn alike, as values stay as they are."""
    query, key, value = rotate(torch.stack((x, x, x), dim=3), rotation).unbind(3)
    assert torch.equal(query, key)
    assert torch.equal(value, x)
    return query


def rotated_half(half: Tensor, position: int) -> Tensor:
    """Rotate one half of width D/2 as the definition says: x cos + rotate_half(x) sin."""
    width = half.shape[-1]
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    frequencies = (10000.0**-exponents).half().double()
    angles = position * torch.cat((frequencies, frequencies))
    turned = torch.cat((-half[width // 2 :], half[: width // 2]))
    return half * angles.cos() + turned * angles.sin()


@pytest.mark.parametrize("head_dim", [4, 16, 128])
def test_frequencies_are_those_of_one_half_rounded_to_float16(head_dim: int) -> None:
    found = inverse_frequencies(head_dim)
    assert found.shape == (head_dim // 4,)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.half().float())
    wanted = [10000.0 ** (-2 * j / (head_dim // 2)) for j in range(head_dim // 4)]
    assert found.tolist() == pytest.approx(wanted, rel=2**-11, abs=2**-24)  # one float16 rounding


@pytest.mark.parametrize("head_dim", [4, 16, 128])
def test_each_half_follows_its_own_channel(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, head_dim, generator=generator)  # (B, S, H, D)
    positions = torch.tensor([[[0, 1, 2, 3], [0, 0, 5, 1000]], [[7, 7, 7, 7], [1, 2, 3, 4]]])
    found = turned(x, rotation_at(positions, inverse_frequencies(head_dim)))
    assert found.shape == x.shape
    for row in range(2):
        for head in range(3):
            for token in range(4):
                first, second = x[row, token, head].double().chunk(2)
                wanted = torch.cat(
                    (
                        rotated_half(first, int(positions[row, 0, token])),
                        rotated_half(second, int(positions[row, 1, token])),
                    )
                )
                # An angle of 1000 rounded to float32 is off by 3e-5.
                torch.testing.assert_close(
                    found[row, token, head].double(), wanted, atol=2e-4, rtol=0
                )


def test_shapes_of_a_rotation() -> None:
    rotation = rotation_at(torch.zeros(2, 2, 5, dtype=torch.long), inverse_frequencies(16))
    assert rotation.cos.shape == rotation.sin.shape == (2, 5, 16)
    assert rotation.cos.dtype == torch.float32


def test_position_zero_rotates_nothing() -> None:
    x = torch.randn(1, 3, 2, 8)
    rotation = rotation_at(torch.zeros(1, 2, 3, dtype=torch.long), inverse_frequencies(8))
    assert torch.equal(turned(x, rotation), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_stays_and_the_arithmetic_is_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 1, 8).to(dtype)
    rotation = rotation_at(torch.tensor([[[3, 900], [0, 2]]]), inverse_frequencies(8))
    found = turned(x, rotation)
    assert found.dtype == dtype
    assert torch.equal(found, turned(x.float(), rotation).to(dtype))


def test_scores_depend_on_distance_only() -> None:
    query, key = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    frequencies = inverse_frequencies(16)

    def score(query_at: int, key_at: int) -> float:
        def at(position: int) -> Tensor:
            return torch.tensor([[[position], [position]]])

        turned_query = turned(query, rotation_at(at(query_at), frequencies))
        return float((turned_query * turned(key, rotation_at(at(key_at), frequencies))).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 7), abs=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_agrees_with_the_plain_operations_in_the_interpreter() -> None:
    """Numbers reach 4.5, where a unit in the last place is 4 eps; there and back are 2 roundings."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.model.rotary_interpreted"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 8


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    rotation = rotation_at(torch.randint(0, 50, (2, 2, 3)), inverse_frequencies(8))
    x = torch.randn(2, 3, 2, 3, 8, requires_grad=True)  # (B, S, H, 3, D)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((rotate(x, rotation) * weights).sum(), x)
    step = torch.randn_like(x)
    ahead, behind = rotate(x + step, rotation), rotate(x - step, rotation)
    slope = ((ahead - behind) * weights).sum() / 2  # exact: a rotation is linear
    torch.testing.assert_close(slope, (gradient * step).sum(), rtol=1e-4, atol=1e-5)


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    rotation = rotation_at(torch.randint(0, 50, (1, 2, 5)), inverse_frequencies(16))
    x = torch.randn(1, 5, 2, 3, 16).bfloat16()
    assert rotate(x, rotation).equal(rotate(x.float(), rotation).bfloat16())
