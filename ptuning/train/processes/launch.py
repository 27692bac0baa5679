"""How many processes a run has, what each computes on, and what to type for more of them.

A launcher (torchrun, accelerate, srun) says so in WORLD_SIZE. Without one a run uses one device:
nn.DataParallel, which transformers takes up by itself where it sees several, is never used.
"""

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch


def num_launched() -> int:
    """Return the number of processes that a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched_index() -> int:
    """Return which of them this one is, from 0."""
    return int(os.environ.get("RANK") or 0)


def process_name() -> str:
    """Return what to put before a message of this process; "" where there is but one.

    >>> process_name()
    ''
    """
    return f"process {launched_index()}: " if num_launched() > 1 else ""


def prepare_processes(training: Any) -> None:
    """Set transformers' arguments before they look for devices: gloo on a CPU, and lean DDP.

    Every trained parameter has a gradient in every step, so DDP need not look for others.
    ValueError without the library that --deepspeed needs.
    """
    if training.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"--deepspeed is {training.deepspeed}, but the deepspeed library is not installed; "
            f"type: {sys.executable} -m pip install deepspeed"
        )
    if num_launched() > 1 and not torch.accelerator.is_available():
        training.use_cpu = True  # without it every process would take itself for the only one
    if num_launched() > 1 and training.use_cpu and training.ddp_backend is None:
        training.ddp_backend = "gloo"
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False


def keep_to_one_device(training: Any) -> int:
    """Use one device in this process, and return how many it sees.

    ValueError where a launcher's processes do not find each other, or none has the whole model to
    answer with.
    """
    if num_launched() > 1 and training.world_size == 1:
        raise ValueError(
            f"WORLD_SIZE is {num_launched()}, but torch has no way to join several processes on "
            f"{training.device.type}; add --use_cpu true, or start main.py without a launcher."
        )
    if training.do_train and training.do_predict and _is_sharded(training):
        raise ValueError(
            "--do_train with --do_predict needs the whole model in every process, and FSDP and "
            "ZeRO stage 3 spread it; train first, then type: bash evaluate.sh"
        )
    if training.device == torch.device("cpu", 0):  # accelerate's name for it, which torch.load
        training.distributed_state.device = torch.device("cpu")  # does not know
        training.__dict__["_setup_devices"] = torch.device("cpu")
    seen = int(training.n_gpu)
    if seen > 1:
        training._n_gpu = 1
    return seen


def _is_sharded(training: Any) -> bool:
    """Tell whether an engine keeps only a part of the weights in each process."""
    zero = getattr(training, "hf_deepspeed_config", None)
    uses_fsdp = bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    return uses_fsdp or (zero is not None and zero.is_zero3())


def launch_notices(training: Any, argv: Sequence[str]) -> tuple[str, ...]:
    """Say what is left unused: devices without a launcher, or cores of a CPU run with one."""
    if training.visible_devices > 1:
        return (how_to_use_all(training, argv),)
    if training.world_size > 1 and training.device.type == "cpu":
        return (
            f"No CUDA device: {training.world_size} processes on the CPU, "
            f"{torch.get_num_threads()} thread(s) each (torchrun takes 1 where OMP_NUM_THREADS is "
            "not set)",
        )
    return ()


def how_to_use_all(training: Any, argv: Sequence[str]) -> str:
    """Say which of several devices is used, and what to type for all of them."""
    devices, accumulation = training.visible_devices, training.gradient_accumulation_steps
    again, note = list(argv), ""
    takes_flags = not (len(argv) == 1 and argv[0].endswith(".json"))
    if training.do_train and takes_flags and accumulation % devices == 0:
        again += ["--gradient_accumulation_steps", str(accumulation // devices)]
    elif training.do_train:
        note = f", with {devices} times the rows in a step"
    return (
        f"{devices} GPUs are visible and one process was started, so {training.device} alone is "
        f"used. To use all{note} (docs/multi-gpu.md), type:\n"
        f"  torchrun --nproc_per_node {devices} main.py {shlex.join(again)}"
    )
