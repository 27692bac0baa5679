"""Limit PyTorch's threads to the container's CPU quota; release OpenMP workers of idle threads.

PyTorch counts the machine's cores. In a container with a smaller CPU quota, that many threads wait
for each other, up to ten times slower. Source of the quota's format: cgroup v2, `cpu.max`,
https://docs.kernel.org/admin-guide/cgroup-v2.html

OpenMP gives each computing thread its own workers and keeps them. GNU's implementation counts them
all: once they outnumber the processors, every wait for a worker becomes a system call, and decoding
in a second thread, after the main thread loaded the weights, took more than twice as long.
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
    """Lower PyTorch's threads to the container's processors; return how many there are.

    A number that the user set in OMP_NUM_THREADS or MKL_NUM_THREADS stays.
    """
    share = container_cpus(limit_file)
    if share is not None and not _is_chosen() and share < torch.get_num_threads():
        torch.set_num_threads(share)
    return torch.get_num_threads()


def leave_a_processor() -> int:
    """Use one thread less, but at least one, and return how many; a number the user set stays.

    For a small model next to other work: its threads lose more by sharing a processor.
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
    """End the calling thread's OpenMP helpers, which return when it computes again.

    For a thread that is done computing while another continues. False if nothing could be done: no
    Linux, or an OpenMP before 5.0.
    """
    pauses = [getattr(library, "omp_pause_resource_all", None) for library in _openmp_libraries()]
    results = [pause(OMP_PAUSE_SOFT) == 0 for pause in pauses if pause is not None]
    return any(results)


def _openmp_libraries() -> list[ctypes.CDLL]:
    """Return PyTorch's OpenMP and the copies that other packages loaded."""
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
