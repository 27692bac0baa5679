"""As many threads as the processors that this process may use, and only where they compute.

PyTorch counts the machine's cores. In a container that gets a share of their time only, that many
threads wait for each other, ten times slower at worst. Source of the limit's format: the kernel's
cgroup v2 documentation, `cpu.max`, https://docs.kernel.org/admin-guide/cgroup-v2.html

OpenMP gives every thread that computes helpers of its own and keeps them. GNU's counts them all:
with more than there are processors each wait for a helper becomes a system call, and decoding in a
thread of its own, after the main thread loaded the weights, took twice as long and more.
Source: https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html and
https://www.openmp.org/spec-html/5.0/openmpsu155.html (omp_pause_resource_all)
"""

import ctypes
import math
import os
from contextlib import suppress
from pathlib import Path

import torch

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
LOADED_FILES = Path("/proc/self/maps")
OPENMP_NAMES = ("libgomp", "libiomp", "libomp")
OMP_PAUSE_SOFT = 1  # of OpenMP's enumeration omp_pause_resource_t
CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def limit_threads(limit_file: Path = CGROUP_LIMIT) -> int:
    """Lower PyTorch's threads to the container's share of processors; return how many there are.

    A number that the user set in OMP_NUM_THREADS or MKL_NUM_THREADS stays as it is.
    """
    share = container_cpus(limit_file)
    if share is not None and not _is_chosen() and share < torch.get_num_threads():
        torch.set_num_threads(share)
    return torch.get_num_threads()


def leave_a_processor() -> int:
    """Compute with one thread less, for work beside it; return how many there are, at least one.

    For a small model, whose threads would rather wait for each other than share a processor. A
    number that the user set stays as it is.
    """
    if not _is_chosen() and torch.get_num_threads() > 1:
        torch.set_num_threads(torch.get_num_threads() - 1)
    return torch.get_num_threads()


def _is_chosen() -> bool:
    return any(os.environ.get(name) for name in CHOSEN_BY_USER)


def container_cpus(limit_file: Path = CGROUP_LIMIT) -> int | None:
    """Return how many processors' time a container may use, rounded up; None without a limit."""
    try:
        quota, period = limit_file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None  # no such limit on this system
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None  # "max"
    return max(1, math.ceil(int(quota) / int(period)))


def release_helper_threads() -> bool:
    """End the helpers that OpenMP keeps for the calling thread; they come back when it computes.

    For a thread that is done computing while another goes on. Returns False where nothing could be
    done: no Linux, or an OpenMP before 5.0.
    """
    pauses = [getattr(library, "omp_pause_resource_all", None) for library in _openmp_libraries()]
    results = [pause(OMP_PAUSE_SOFT) == 0 for pause in pauses if pause is not None]
    return any(results)


def _openmp_libraries() -> list[ctypes.CDLL]:
    """Return PyTorch's OpenMP, and the copies that other packages brought along."""
    try:
        lines = LOADED_FILES.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []  # no Linux
    loaded = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines)
    found = []
    for path in loaded:
        if Path(path).name.startswith(OPENMP_NAMES):
            with suppress(OSError):  # replaced on disk since it was loaded
                found.append(ctypes.CDLL(path))
    return found
