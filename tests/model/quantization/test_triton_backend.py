"""The Triton kernels against the reference, in Triton's interpreter: the arithmetic, not the machine code."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptuning.model.quantization.backends import triton_backend
from ptuning.model.quantization.backends.triton_backend import TritonBackend, fits_fused

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_both_products_agree_with_the_reference_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.model.quantization.triton_interpreted"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    worst = json.loads(result.stdout)
    assert len(worst) == 2 * (10 + 10 + 4)  # bits x (float32 + float16 + what bfloat16 has left)
    assert all(ratio <= 1 for ratio in worst.values()), worst


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda _name: None)
    reason = TritonBackend().unavailable_reason(torch.device("cuda"), torch.float16, 4)
    assert reason == "triton is not installed: pip install triton"


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((6, 1), torch.float16, "torch.float16 needs compute capability 7.0; the card has 6.1"),
        ((7, 5), torch.bfloat16, "torch.bfloat16 needs compute capability 8.0; the card has 7.5"),
    ],
)
def test_cards_too_old_for_it_are_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, expected: str
) -> None:
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert TritonBackend().unavailable_reason(torch.device("cuda"), dtype, 4) == expected


def test_a_large_batch_is_left_to_the_library() -> None:
    assert fits_fused(torch.empty(256, 1, dtype=torch.float16))
    assert not fits_fused(torch.empty(257, 1, dtype=torch.float16))
    assert not fits_fused(torch.empty(17, 1))
