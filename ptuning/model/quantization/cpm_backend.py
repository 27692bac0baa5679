"""The `cpm_kernels` back end: our CUDA C++ (kernels.cu), launched through cpm_kernels as published.

The published code launched kernels of a stored binary for older GPUs. Here cpm_kernels' NVRTC
compiles the source for the GPU at hand, its LazyKernelCModule loads and its KernelFunction launches
it; a library product then multiplies by the float block. cpm_kernels opens the CUDA libraries and
queries every GPU while it is imported, so it is imported at the first use.
Shapes: see `torch_backend`.
"""

import ctypes
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ptuning.model.quantization.torch_backend import (
    ACTIVATION_DTYPES,
    Dequantize,
    blockwise_matmul,
    blockwise_matmul_transposed,
)
from ptuning.storage import SUPPORTED_BITS

KERNEL_SOURCE = Path(__file__).with_name("kernels.cu")
THREADS_PER_BLOCK = 256
WEIGHTS_PER_THREAD = 8  # as in kernels.cu
# In /proc/self/maps, by the names that cpm_kernels looks for.
LOADED_LIBRARY = re.compile(r"(/\S*/lib(cuda|cudart|cublasLt|nvrtc)\.so[.\d]*)$", re.MULTILINE)

# KernelFunction.__call__: (grid, block, shared memory bytes, stream, parameters).
Launch = Callable[[tuple[int, int, int], tuple[int, int, int], int, int, list[Any]], None]


def kernel_name(bits: int, dtype: torch.dtype) -> str:
    """Return the kernel that writes this dtype.

    >>> kernel_name(4, torch.bfloat16)
    'extract_int4_bfloat16'
    """
    return f"extract_int{bits}_{str(dtype).removeprefix('torch.')}"


def kernel_names() -> list[str]:
    """Return the name of every kernel in kernels.cu."""
    return [kernel_name(bits, dtype) for bits in SUPPORTED_BITS for dtype in ACTIVATION_DTYPES]


def loaded_libraries(memory_map: str) -> dict[str, Path]:
    """Return the CUDA libraries in a text of /proc/self/maps, by short name.

    >>> loaded_libraries("7f00-7f01 r-xp 0 08:01 42 /opt/lib/libcudart.so.13")
    {'cudart': PosixPath('/opt/lib/libcudart.so.13')}
    """
    return {name: Path(path) for path, name in LOADED_LIBRARY.findall(memory_map)}


def load_nvrtc() -> None:
    """Load NVRTC, unless torch has, from next to torch, NVIDIA's packages or a CUDA toolkit."""
    name = f"libnvrtc.so.{str(torch.version.cuda).split('.')[0]}"
    nvidia = importlib.util.find_spec("nvidia")
    packages = (nvidia and nvidia.submodule_search_locations) or ()
    toolkits = (os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key))
    folders = [
        Path(torch.__file__).parent / "lib",
        *(folder for package in packages for folder in sorted(Path(package).glob("*/lib"))),
        *(Path(toolkit) / "lib64" for toolkit in toolkits),
    ]
    for library in (name, *(str(folder / name) for folder in folders)):
        with suppress(OSError):
            # NVRTC opens its built-ins by name alone: found when they are loaded already.
            for builtins in sorted(Path(library).parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins))
            ctypes.CDLL(library)
            return


@contextmanager
def torch_libraries() -> Iterator[None]:
    """Let cpm_kernels, while it is imported, find the CUDA libraries that torch has loaded.

    It looks for names without a version in $CUDA_PATH/lib64, in /usr/local/cuda and on the loader's
    path; those of a pip-installed torch are in none of them, so CUDA_PATH points at links to them.
    """
    load_nvrtc()
    before = os.environ.get("CUDA_PATH")
    with tempfile.TemporaryDirectory(prefix="ptuning-cuda-") as folder:
        links = Path(folder) / "lib64"
        links.mkdir()
        memory_map = Path("/proc/self/maps").read_text(encoding="utf-8")
        for name, library in loaded_libraries(memory_map).items():
            (links / f"lib{name}.so").symlink_to(library)
        os.environ["CUDA_PATH"] = folder
        try:
            yield
        finally:
            del os.environ["CUDA_PATH"]
            if before is not None:
                os.environ["CUDA_PATH"] = before


def compile_kernels(nvrtc: ModuleType, capability: int) -> bytes:
    """Return kernels.cu as machine code for a compute capability (90 for 9.0).

    nvrtc is cpm_kernels.library.nvrtc; RuntimeError if it has no library or refuses the source.
    """
    if nvrtc.version == (0, 0):
        raise RuntimeError("libnvrtc was not found: pip install nvidia-cuda-nvrtc")
    source, program = KERNEL_SOURCE.read_text(encoding="utf-8"), nvrtc.nvrtcProgram()
    nvrtc.nvrtcCreateProgram(program, source, KERNEL_SOURCE.name, 0, [], [])
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17"]
    nvrtc.nvrtcCompileProgram(program, len(options), options)
    binary = ctypes.create_string_buffer(nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, binary)
    nvrtc.nvrtcDestroyProgram(program)
    return binary.raw


@cache
def load_kernels(capability: int) -> Mapping[str, Launch]:
    """Return the kernels of kernels.cu by name, compiled for a compute capability."""
    with torch_libraries():
        from cpm_kernels.kernels.base import KernelFunction, LazyKernelCModule
        from cpm_kernels.library import nvrtc
    module = LazyKernelCModule(compile_kernels(nvrtc, capability))
    return {name: KernelFunction(module, name) for name in kernel_names()}


def kernel_dequantizer(launch: Launch, stream: int) -> Dequantize:
    """Return a `torch_backend.Dequantize` that launches a kernel."""

    def dequantize(packed: Tensor, scale: Tensor, block: Tensor) -> None:
        rows, columns = block.shape
        stride = packed.stride(0)
        # Eight codes are one load, eight weights one or two stores: all must be aligned.
        aligned = all(value % 16 == 0 for value in (packed.data_ptr(), block.data_ptr(), stride))
        wide = aligned and columns % WEIGHTS_PER_THREAD == 0
        threads = rows * -(-columns // WEIGHTS_PER_THREAD)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, scale, block)]
        sizes = [ctypes.c_int(size) for size in (columns, stride, wide)]
        grid = (-(-threads // THREADS_PER_BLOCK), 1, 1)
        parameters = [*pointers, ctypes.c_longlong(rows), *sizes]
        launch(grid, (THREADS_PER_BLOCK, 1, 1), 0, stream, parameters)

    return dequantize


class CpmBackend:
    """NVIDIA GPUs, through cpm_kernels."""

    name = "cpm_kernels"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return the reason; load and launch the kernels where the device should run them."""
        if device.type != "cuda":
            return f"it needs a CUDA device; the device is {device}"
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return "it needs an NVIDIA GPU and a CUDA build of PyTorch; this PyTorch sees none"
        return self._load_error(device)

    @staticmethod
    @cache
    def _load_error(device: torch.device) -> str | None:
        """Load the kernels and run each of them once."""
        try:
            load_kernels(capability_of(device))
            for bits in SUPPORTED_BITS:
                for dtype in ACTIVATION_DTYPES:
                    packed = torch.zeros(1, bits, dtype=torch.int8, device=device)  # 8 columns
                    scale = torch.ones(1, dtype=torch.float16, device=device)
                    x = torch.zeros(1, 8, dtype=dtype, device=device)
                    CpmBackend().matmul(x, packed, scale, bits)
        except ModuleNotFoundError as error:
            if error.name == "pkg_resources":
                return "cpm_kernels needs pkg_resources: pip install 'setuptools<81'"
            return f"{error.name} is not installed: pip install cpm_kernels"
        except (OSError, RuntimeError, AttributeError, ValueError, IndexError) as error:
            # A library or symbol that cpm_kernels cannot find, a CUDA status, an unlisted GPU.
            return f"cpm_kernels could not load the kernels: {type(error).__name__}: {error}"
        return None

    def matmul(self, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
        with torch.cuda.device(x.device):
            return blockwise_matmul(x, packed, scale, _dequantizer(x, bits))

    def matmul_transposed(self, grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
        with torch.cuda.device(grad.device):
            dequantize = _dequantizer(grad, bits)
            return blockwise_matmul_transposed(grad, packed, scale, bits, dequantize)


def _dequantizer(like: Tensor, bits: int) -> Dequantize:
    launch = load_kernels(capability_of(like.device))[kernel_name(bits, like.dtype)]
    return kernel_dequantizer(launch, torch.cuda.current_stream(like.device).cuda_stream)


def capability_of(device: torch.device) -> int:
    """Return a GPU's compute capability as 10 * major + minor."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
