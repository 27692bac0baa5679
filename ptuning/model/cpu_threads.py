"""As many threads as the processors that this process may use.

PyTorch counts the machine's cores. In a container that gets a share of their time only, that many
threads wait for each other, ten times slower at worst. Source of the limit's format: the kernel's
cgroup v2 documentation, `cpu.max`, https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

import math
import os
from pathlib import Path

import torch

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def limit_threads(limit_file: Path = CGROUP_LIMIT) -> int:
    """Lower PyTorch's threads to the container's share of processors; return how many there are.

    A number that the user set in OMP_NUM_THREADS or MKL_NUM_THREADS stays as it is.
    """
    share = container_cpus(limit_file)
    chosen = any(os.environ.get(name) for name in CHOSEN_BY_USER)
    if share is not None and not chosen and share < torch.get_num_threads():
        torch.set_num_threads(share)
    return torch.get_num_threads()


def container_cpus(limit_file: Path = CGROUP_LIMIT) -> int | None:
    """Return how many processors' time a container may use, rounded up; None without a limit."""
    try:
        quota, period = limit_file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None  # no such limit on this system
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None  # "max"
    return max(1, math.ceil(int(quota) / int(period)))
