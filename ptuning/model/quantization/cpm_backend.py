"""The `cpm_kernels` back end: our CUDA C++ (kernels.cu), loaded and launched through cpm_kernels as
published code did.

NVRTC compiles the source for the card at hand, cpm_kernels' LazyKernelCModule loads it and
KernelFunction launches it; a library product then multiplies by the float block. cpm_kernels opens
the CUDA libraries and asks every card for its attributes as it is imported, so nothing here imports
it before the first use, and each way that can fail is a reason. Shapes: num_out x num_in is the
weight; packed rows are num_in bytes, or half of that in int4.
"""

import ctypes
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptuning.model.quantization import nvrtc
from ptuning.model.quantization.blockwise import (
    Dequantize,
    blockwise_matmul,
    blockwise_matmul_transposed,
)
from ptuning.model.quantization.interface import ACTIVATION_DTYPES, dtype_reason

KERNEL_SOURCE = Path(__file__).with_name("kernels.cu")
THREADS_PER_BLOCK = 256
WEIGHTS_PER_THREAD = 8  # as kernels.cu has it
# The libraries cpm_kernels opens, by the name it looks for, with the version suffix a running
# process shows.
LOADED_LIBRARY = re.compile(r"(/\S*/lib(cuda|cudart|cublasLt|nvrtc)\.so[.\d]*)$")

# Launches a kernel: (grid, block, shared memory bytes, stream, parameters), which is
# KernelFunction.__call__.
Launch = Callable[[tuple[int, int, int], tuple[int, int, int], int, int, list[Any]], None]


def kernel_name(bits: int, dtype: torch.dtype) -> str:
    """Return the kernel that writes this dtype.

    >>> kernel_name(4, torch.bfloat16)
    'extract_int4_bfloat16'
    """
    return f"extract_int{bits}_{str(dtype).removeprefix('torch.')}"


def kernel_names() -> list[str]:
    """Return the name of every kernel in kernels.cu."""
    return [kernel_name(bits, dtype) for bits in (4, 8) for dtype in ACTIVATION_DTYPES]


def loaded_libraries(memory_map: str) -> dict[str, Path]:
    """Return the CUDA libraries in a process's memory map (the text of /proc/self/maps), by short
    name.

    >>> loaded_libraries("7f00-7f01 r-xp 0 08:01 42 /opt/lib/libcudart.so.13")
    {'cudart': PosixPath('/opt/lib/libcudart.so.13')}
    """
    matches = (LOADED_LIBRARY.search(line) for line in memory_map.splitlines())
    return {match[2]: Path(match[1]) for match in matches if match}


@contextmanager
def cuda_path_of_this_process() -> Iterator[None]:
    """Point CUDA_PATH, while cpm_kernels is imported, at the libraries torch has loaded.

    cpm_kernels looks in $CUDA_PATH/lib64, in /usr/local/cuda and on the loader's path, for names
    without a version; a pip-installed torch brings its CUDA libraries in none of these places.
    Links in a temporary folder make it open the very libraries torch uses.
    """
    nvrtc.load_nvrtc()  # torch opens this one late, and cpm_kernels binds to it as well
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    before = os.environ.get("CUDA_PATH")
    with tempfile.TemporaryDirectory(prefix="ptuning-cuda-") as folder:
        links = Path(folder) / "lib64"
        links.mkdir()
        for name, library in loaded_libraries(maps).items():
            (links / f"lib{name}.so").symlink_to(library)
        os.environ["CUDA_PATH"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["CUDA_PATH"]
            else:
                os.environ["CUDA_PATH"] = before


@cache
def load_kernels(capability: int) -> Mapping[str, Launch]:
    """Compile kernels.cu for a capability (90 for 9.0) and return its kernels by name.

    Raises ImportError (cpm_kernels or pkg_resources is missing) and RuntimeError (NVRTC, the
    driver, the card).
    """
    source = KERNEL_SOURCE.read_text(encoding="utf-8")
    binary = nvrtc.compile_for_card(source, KERNEL_SOURCE.name, capability)
    with cuda_path_of_this_process():
        from cpm_kernels.kernels.base import KernelFunction, LazyKernelCModule
    module = LazyKernelCModule(binary)
    return {name: KernelFunction(module, name) for name in kernel_names()}


def kernel_dequantizer(launch: Launch, stream: int) -> Dequantize:
    """Return a `blockwise.Dequantize` that goes through `launch`."""

    def dequantize(packed: Tensor, scale: Tensor, block: Tensor) -> None:
        rows, columns = block.shape
        stride = packed.stride(0)
        # Eight codes are one load, eight weights one or two stores: all at round addresses.
        are_round = (packed.data_ptr(), block.data_ptr(), stride)
        wide = columns % WEIGHTS_PER_THREAD == 0 and all(value % 16 == 0 for value in are_round)
        threads = rows * -(-columns // WEIGHTS_PER_THREAD)
        launch(
            (-(-threads // THREADS_PER_BLOCK), 1, 1),
            (THREADS_PER_BLOCK, 1, 1),
            0,
            stream,
            [
                ctypes.c_void_p(packed.data_ptr()),
                ctypes.c_void_p(scale.data_ptr()),
                ctypes.c_void_p(block.data_ptr()),
                ctypes.c_longlong(rows),
                ctypes.c_int(columns),
                ctypes.c_int(stride),
                ctypes.c_int(wide),
            ],
        )

    return dequantize


class CpmBackend:
    """CUDA cards, through cpm_kernels' module loader."""

    name = "cpm_kernels"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, bits: int) -> str | None:
        """Return the reason, after compiling and loading the kernels where the device could run
        them.
        """
        if device.type != "cuda":
            return f"it needs a CUDA device; the device is {device}"
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return "it needs an NVIDIA card and a CUDA build of PyTorch; this PyTorch sees none"
        return dtype_reason(dtype) or self._loading_reason(device)

    @staticmethod
    @cache
    def _loading_reason(device: torch.device) -> str | None:
        try:
            for launch in load_kernels(capability_of(device)).values():
                with torch.cuda.device(device):
                    launch_nothing(launch)
        except ModuleNotFoundError as error:
            if error.name == "pkg_resources":
                return "cpm_kernels needs pkg_resources: pip install 'setuptools<81'"
            return f"{error.name} is not installed: pip install cpm_kernels"
        except (OSError, RuntimeError, AttributeError, ValueError, IndexError) as error:
            # What cpm_kernels raises: a library or symbol it cannot find, a CUDA status, a card it
            # did not list.
            return f"cpm_kernels could not load the kernels: {type(error).__name__}: {error}"
        return None

    def matmul(self, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
        with torch.cuda.device(x.device):
            return blockwise_matmul(x, packed, scale, bits, self._dequantizer(x, bits))

    def matmul_transposed(self, grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
        with torch.cuda.device(grad.device):
            dequantize = self._dequantizer(grad, bits)
            return blockwise_matmul_transposed(grad, packed, scale, bits, dequantize)

    @staticmethod
    def _dequantizer(like: Tensor, bits: int) -> Dequantize:
        launch = load_kernels(capability_of(like.device))[kernel_name(bits, like.dtype)]
        return kernel_dequantizer(launch, torch.cuda.current_stream(like.device).cuda_stream)


def capability_of(device: torch.device) -> int:
    """Return a card's compute capability as 10 * major + minor."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch_nothing(launch: Launch) -> None:
    """Launch a kernel over zero rows on the current card: proof that it loads, without touching
    memory.
    """
    nothing = ctypes.c_void_p(0)
    sizes = [ctypes.c_int(size) for size in (WEIGHTS_PER_THREAD, WEIGHTS_PER_THREAD, 1)]
    parameters = [nothing, nothing, nothing, ctypes.c_longlong(0), *sizes]
    stream = torch.cuda.current_stream().cuda_stream
    launch((1, 1, 1), (THREADS_PER_BLOCK, 1, 1), 0, stream, parameters)
