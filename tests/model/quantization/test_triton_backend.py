"""The Triton kernels against the reference, in Triton's interpreter: the arithmetic, not the machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ptuning.model.quantization import triton_backend
from ptuning.model.quantization.triton_backend import TritonBackend, fits_fused, fused_tile

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    # bits x (float32 + float16 + what bfloat16 has left + one by columns for each)
    ("rows", "count"),
    [
        ("1 40", 2 * (4 + 4 + 1 + 3)),
        pytest.param("", 2 * (10 + 10 + 4 + 3), marks=pytest.mark.slow),
    ],
    ids=["two batches", "all batches"],
)
def test_both_products_agree_with_the_reference_in_the_interpreter(rows: str, count: int) -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "tests.model.quantization.triton_interpreted", *rows.split()],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    worst = json.loads(result.stdout)
    assert len(worst) == count
    assert all(ratio <= 1 for ratio in worst.values()), worst


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "triton", None)
    reason = TritonBackend().unavailable_reason(torch.device("cuda"), torch.float16)
    assert reason == "triton is not installed: pip install triton"


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((6, 1), torch.float16, "torch.float16 needs compute capability 7.0; the GPU has 6.1"),
        ((7, 5), torch.bfloat16, "torch.bfloat16 needs compute capability 8.0; the GPU has 7.5"),
    ],
)
def test_gpus_too_old_for_it_are_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, expected: str
) -> None:
    monkeypatch.setattr(triton_backend, "triton", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert TritonBackend().unavailable_reason(torch.device("cuda"), dtype) == expected


def test_a_large_batch_and_float32_are_left_to_the_library() -> None:
    assert fits_fused(torch.empty(256, 1, dtype=torch.float16))
    assert not fits_fused(torch.empty(257, 1, dtype=torch.float16))
    assert not fits_fused(torch.empty(5, 1))


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_fused_products_need_tensor_cores_that_triton_uses(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(triton_backend, "capability", lambda _device: capability)
    with FakeTensorMode():
        assert fits_fused(torch.empty(8, 1, dtype=torch.float16, device="cuda")) is expected


def test_tiles_are_wide_where_that_leaves_a_program_for_each_multiprocessor() -> None:
    assert fused_tile(128, 4096, transposed=False)[:3] == (128, 32, 64)
    assert fused_tile(128, 12288, transposed=False)[:3] == (128, 64, 64)
    assert fused_tile(256, 16384, transposed=True)[:3] == (128, 64, 128)
    assert fused_tile(64, 16384, transposed=False)[:3] == (64, 128, 64)


def test_sizes_that_change_with_a_batch_are_not_compiled_in() -> None:
    pytest.importorskip("triton")
    for kernel in (triton_backend.matmul_kernel, triton_backend.dequantize_kernel):
        rows = next(p for p in kernel.params if p.name == "num_rows")
        assert rows.do_not_specialize
