"""Compile CUDA C++ for one card with NVRTC, the compiler library that CUDA builds of PyTorch bring
along.

Called through ctypes, since the six functions needed have kept their signatures since CUDA 11.1. No
headers are given to the compiler: the source must need none.
Source: https://docs.nvidia.com/cuda/nvrtc/index.html
"""

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch

LIBRARY_PATTERN = "libnvrtc.so*"


class NvrtcError(RuntimeError):
    """NVRTC is missing or refused the source; the message says which."""


def library_folders() -> Iterator[Path]:
    """Yield where libnvrtc may lie: beside torch, in NVIDIA's packages, in a CUDA toolkit."""
    yield Path(torch.__file__).parent / "lib"
    nvidia = importlib.util.find_spec("nvidia")
    for root in nvidia.submodule_search_locations or () if nvidia is not None else ():
        yield from sorted(Path(root).glob("*/lib"))
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for toolkit in filter(None, toolkits):
        yield from (Path(toolkit) / "lib64", Path(toolkit) / "lib")


def library_candidates(cuda_version: str | None) -> Iterator[str]:
    """Yield names and paths to open, in order; those of torch's own CUDA version first.

    cuda_version is torch.version.cuda, None for a build without CUDA.
    """
    major = f".{cuda_version.split('.')[0]}" if cuda_version else ""
    if major:
        yield f"libnvrtc.so{major}"  # already loaded, or on the loader's path
    for folder in library_folders():
        found = [path for path in sorted(folder.glob(LIBRARY_PATTERN)) if ".alt." not in path.name]
        yield from (
            str(path) for path in sorted(found, key=lambda path: major not in path.suffixes)
        )
    yield "libnvrtc.so"


def load_nvrtc() -> ctypes.CDLL:
    """Open libnvrtc; NvrtcError when there is none."""
    for candidate in library_candidates(torch.version.cuda):
        try:
            # NVRTC opens its built-ins by name alone: found when they are loaded already.
            for builtins in sorted(Path(candidate).parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(candidate)
        except OSError:
            continue  # the next place; all of them missing is reported below
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise NvrtcError(
        "libnvrtc was not found beside torch, in NVIDIA's Python packages or in a CUDA toolkit; "
        "install it: pip install nvidia-cuda-nvrtc"
    )


def _check(library: ctypes.CDLL, status: int, action: str, log: str = "") -> None:
    if status:
        message = library.nvrtcGetErrorString(status).decode()
        raise NvrtcError(f"NVRTC could not {action}: {message}{log and ': ' + log}")


def supported_architectures(library: ctypes.CDLL) -> list[int]:
    """Return the compute capabilities this NVRTC compiles for, as 10 * major + minor."""
    count = ctypes.c_int()
    _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "list its targets")
    architectures = (ctypes.c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(architectures), "list its targets")
    return sorted(architectures)


def target_option(capability: int, supported: list[int]) -> str:
    """Return the option for a card: its own machine code, or portable code when the card is newer
    than NVRTC.

    >>> target_option(90, [80, 90])
    '--gpu-architecture=sm_90'
    >>> target_option(121, [80, 90])
    '--gpu-architecture=compute_90'
    """
    if capability in supported:
        return f"--gpu-architecture=sm_{capability}"
    older = [architecture for architecture in supported if architecture < capability]
    if not older:
        raise NvrtcError(
            f"this NVRTC compiles for compute capability {min(supported) / 10} and later; "
            f"the card has {capability / 10}"
        )
    return f"--gpu-architecture=compute_{max(older)}"


def compile_for_card(source: str, name: str, capability: int) -> bytes:
    """Return the module for a card of capability (90 for 9.0): a cubin, or PTX for a card NVRTC
    does not know yet.
    """
    library = load_nvrtc()
    option = target_option(capability, supported_architectures(library))
    program = ctypes.c_void_p()
    status = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), name.encode(), 0, None, None
    )
    _check(library, status, f"read {name}")
    try:
        options = (ctypes.c_char_p * 2)(option.encode(), b"--std=c++17")
        status = library.nvrtcCompileProgram(program, len(options), options)
        _check(
            library,
            status,
            f"compile {name} with {option}",
            _log(library, program) if status else "",
        )
        return _result(library, program, "CUBIN" if "=sm_" in option else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _result(library: ctypes.CDLL, program: ctypes.c_void_p, kind: str) -> bytes:
    size = ctypes.c_size_t()
    get_size, get = getattr(library, f"nvrtcGet{kind}Size"), getattr(library, f"nvrtcGet{kind}")
    _check(library, get_size(program, ctypes.byref(size)), f"size the {kind}")
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, get(program, buffer), f"return the {kind}")
    return buffer.raw


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(library, library.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "size its log")
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, library.nvrtcGetProgramLog(program, buffer), "return its log")
    return buffer.value.decode(errors="replace").strip()
