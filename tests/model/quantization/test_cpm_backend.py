"""The CUDA source's arithmetic, compiled as C++ and walked on the CPU; a fake compiler; every reason."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ptuning.model.quantization import cpm_backend
from ptuning.model.quantization.cpm_backend import (
    KERNEL_SOURCE,
    CpmBackend,
    Launch,
    compile_kernels,
    kernel_dequantizer,
    kernel_name,
    kernel_names,
    loaded_libraries,
    torch_libraries,
)
from ptuning.model.quantization.reference import QuantizedWeight, dequantize_weight
from ptuning.model.quantization.torch_backend import (
    blockwise_matmul,
    transposed_by_columns,
    transposed_by_rows,
)
from tests.model.quantization.conftest import exact_product, product_tolerance

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUDA = torch.device("cuda")


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """kernels.cu compiled by the host's C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (g++ or clang++)")
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    driver = Path(__file__).with_name("host_kernels.cpp")
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    source = f'-DKERNEL_SOURCE="{KERNEL_SOURCE}"'
    subprocess.run([compiler, *options, source, str(driver), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def host_launch(library: ctypes.CDLL, name: str) -> Launch:
    """Return what KernelFunction would be: it walks grid x block threads on the CPU."""

    def launch(
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        _shared: int,
        _stream: int,
        parameters: list[Any],
    ) -> None:
        assert grid[1:] == block[1:] == (1, 1)
        threads = ctypes.c_longlong(grid[0] * block[0])
        library.walk(getattr(library, name), threads, *parameters)

    return launch


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_with_every_scale_gives_the_reference_weight(
    host_library: ctypes.CDLL, bits: int, dtype: torch.dtype
) -> None:
    """256 bytes x 31,744 scales: all that a finite, non-negative float16 scale can be."""
    scale = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    packed = torch.arange(-128, 128).to(torch.int8).repeat(len(scale), 1)  # (rows, 256)
    block = torch.empty(len(scale), 256 * (8 // bits), dtype=dtype)
    launch = host_launch(host_library, kernel_name(bits, dtype))
    kernel_dequantizer(launch, stream=0)(packed, scale, block)
    expected = dequantize_weight(packed, scale, bits, dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    same = block.view(integers) == expected.view(integers)
    both_zero = (block == 0) & (expected == 0)  # -0 from a rounded negative product, or 0
    assert bool((same | both_zero).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_in", [192, 42])
def test_blocks_of_rows_and_columns_aligned_or_not_multiply_as_the_reference(
    host_library: ctypes.CDLL,
    make_weight: Callable[..., QuantizedWeight],
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    dtype: torch.dtype,
    num_in: int,
) -> None:
    """192 columns take the 16-byte path, in blocks of 64, 42 the narrow one; 5 rows a block leave a last one of 2."""
    monkeypatch.setattr(
        "ptuning.model.quantization.torch_backend.CPU_BLOCK_BYTES", 5 * num_in * dtype.itemsize
    )
    weight = make_weight(37, num_in, bits)
    launch = host_launch(host_library, kernel_name(bits, dtype))
    dequantize = kernel_dequantizer(launch, stream=0)
    x, grad = torch.randn(3, num_in).to(dtype), torch.randn(3, 37).to(dtype)
    forward = blockwise_matmul(x, *weight, dequantize)
    error = (forward.double() - exact_product(x, weight, bits, transposed=False)).abs()
    assert bool((error <= product_tolerance(x, weight, bits, transposed=False)).all())
    bound = product_tolerance(grad, weight, bits, transposed=True)
    for by_blocks in (transposed_by_rows, transposed_by_columns):
        backward = by_blocks(grad, *weight, bits, dequantize)
        error = (backward.double() - exact_product(grad, weight, bits, transposed=True)).abs()
        assert bool((error <= bound).all())


def test_threads_past_the_last_row_touch_nothing(host_library: ctypes.CDLL) -> None:
    for name in kernel_names():
        host_library.walk_one(
            getattr(host_library, name), ctypes.c_longlong(2 * 3), ctypes.c_longlong(2), 24
        )


class FakeNvrtc(ModuleType):
    """Stands in for cpm_kernels.library.nvrtc; compiles to the names of the calls."""

    nvrtcProgram = ctypes.c_void_p

    def __init__(self, version: tuple[int, int] = (13, 0)) -> None:
        super().__init__("nvrtc")
        self.version = version
        self.calls: list[tuple[Any, ...]] = []

    def nvrtcCreateProgram(self, _program: Any, source: str, *others: Any) -> None:
        self.calls.append(("create", source, *others))

    def nvrtcCompileProgram(self, _program: Any, count: int, options: list[str]) -> None:
        self.calls.append(("compile", count, options))

    def nvrtcGetCUBINSize(self, _program: Any) -> int:
        return 4

    def nvrtcGetCUBIN(self, _program: Any, buffer: Any) -> None:
        buffer.raw = b"a\0b\0"

    def nvrtcDestroyProgram(self, _program: Any) -> None:
        self.calls.append(("destroy",))


def test_the_source_is_compiled_for_the_gpu_at_hand() -> None:
    nvrtc = FakeNvrtc()
    assert compile_kernels(nvrtc, 90) == b"a\0b\0"
    assert nvrtc.calls == [
        ("create", KERNEL_SOURCE.read_text(encoding="utf-8"), "kernels.cu", 0, [], []),
        ("compile", 2, ["--gpu-architecture=sm_90", "--std=c++17"]),
        ("destroy",),
    ]


def test_a_missing_nvrtc_is_named_with_what_to_install() -> None:
    with pytest.raises(RuntimeError, match="pip install nvidia-cuda-nvrtc"):
        compile_kernels(FakeNvrtc(version=(0, 0)), 90)


def test_libraries_are_found_in_a_memory_map() -> None:
    lines = [
        "7f0 r-xp 00 08:01 1 /usr/lib/libcuda.so.580.1",
        "7f1 r-xp 00 08:01 2 /v/nvidia/cu13/lib/libcublasLt.so.13",
        "7f1 r-xp 00 08:01 3 /v/nvidia/cu13/lib/libcublas.so.13",
        "7f2 rw-p 00 00:00 0 [heap]",
    ]
    assert {name: str(path) for name, path in loaded_libraries("\n".join(lines)).items()} == {
        "cuda": "/usr/lib/libcuda.so.580.1",
        "cublasLt": "/v/nvidia/cu13/lib/libcublasLt.so.13",
    }


@pytest.mark.parametrize("before", [None, "/opt/cuda"])
def test_cuda_path_points_at_the_loaded_libraries_for_a_moment_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str | None
) -> None:
    library = tmp_path / "libcudart.so.13"
    library.write_bytes(b"library")
    monkeypatch.setattr(cpm_backend, "loaded_libraries", lambda _maps: {"cudart": library})
    if before is None:
        monkeypatch.delenv("CUDA_PATH", raising=False)
    else:
        monkeypatch.setenv("CUDA_PATH", before)
    with torch_libraries():
        assert (Path(os.environ["CUDA_PATH"]) / "lib64" / "libcudart.so").read_bytes() == b"library"
    assert os.environ.get("CUDA_PATH") == before


@pytest.fixture
def failing_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception], None]]:
    """A function that makes loading the kernels fail on a machine that otherwise looks like a CUDA one."""

    def fail_with(error: Exception) -> None:
        def load(_capability: int) -> None:
            raise error

        monkeypatch.setattr(cpm_backend, "load_kernels", load)

    monkeypatch.setattr(cpm_backend, "capability_of", lambda _device: 90)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    CpmBackend._load_error.cache_clear()
    yield fail_with
    CpmBackend._load_error.cache_clear()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ModuleNotFoundError("x", name="cpm_kernels"),
            "cpm_kernels is not installed: pip install cpm_kernels",
        ),
        (
            ModuleNotFoundError("x", name="pkg_resources"),
            "needs pkg_resources: pip install 'setuptools<81'",
        ),
        (RuntimeError("CUDA Error: invalid image"), "RuntimeError: CUDA Error: invalid image"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
    ],
)
def test_each_failure_to_load_is_a_reason(
    failing_load: Callable[[Exception], None], error: Exception, expected: str
) -> None:
    failing_load(error)
    reason = CpmBackend().unavailable_reason(CUDA, torch.float16)
    assert reason is not None
    assert expected in reason


def test_it_needs_a_cuda_device() -> None:
    reason = CpmBackend().unavailable_reason(torch.device("cpu"), torch.float16)
    assert reason == "it needs a CUDA device; the device is cpu"
