"""The processes of a run: how many, on which device each, and how they exchange Python objects.

A launcher (torchrun, accelerate, srun) sets WORLD_SIZE. Without one a run uses one device;
nn.DataParallel, which transformers chooses by itself when it sees several, is never used. All
processes must call the functions that communicate, in the same order; accelerate sends tensors.
"""

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from transformers import Seq2SeqTrainingArguments

from ptuning.train.legacy_flags import TRUE_WORDS
from ptuning.train.run_config import RunConfig, UsageError

T = TypeVar("T")

# What a process sees when another one has ended: gloo's, NCCL's and the rendezvous store's words.
LOST_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")


def num_launched() -> int:
    """Return the number of processes that a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_name() -> str:
    """Return the prefix of this process's messages; "" if it is the only one.

    >>> process_name()
    ''
    """
    return f"process {os.environ.get('RANK') or 0}: " if num_launched() > 1 else ""


def process_values(config: RunConfig) -> dict[str, Any]:
    """Return the keywords of transformers' training arguments, set for the processes of the run."""
    values = config.trainer_values()
    if num_launched() > 1:
        if not torch.accelerator.is_available():
            values["use_cpu"] = True  # else every process would take itself for the only one
        if values["use_cpu"]:
            values["ddp_backend"] = values.get("ddp_backend") or "gloo"
    # Every trained parameter has a gradient in every step, so DDP need not look for others.
    values.setdefault("ddp_find_unused_parameters", False)
    return values


def trainer_arguments(config: RunConfig) -> Seq2SeqTrainingArguments:
    """Return what transformers' Trainer takes; joins the processes of a launcher.

    UsageError for values that transformers refuses, or processes that cannot find each other.
    """
    if config.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            f"--deepspeed is {config.deepspeed}, but the deepspeed library is not installed; "
            f"type: {sys.executable} -m pip install deepspeed"
        )
    try:
        arguments = Seq2SeqTrainingArguments(**process_values(config))
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    device = arguments.device
    if num_launched() > 1 and arguments.world_size == 1:
        raise UsageError(
            f"WORLD_SIZE is {num_launched()}, but torch has no way to join several processes on "
            f"{device.type}; add --use_cpu true, or start main.py without a launcher."
        )
    if config.do_train and config.do_predict and shards_weights(arguments):
        raise UsageError(
            "--do_train with --do_predict needs the whole model in every process, and FSDP and "
            "ZeRO stage 3 shard it; train first, then type: PREFIX=OUTPUT_DIR bash evaluate.sh"
        )
    if device.type != "cuda":
        arguments.dataloader_pin_memory = False  # it only helps copies to a CUDA device
    if device == torch.device("cpu", 0):  # accelerate's name, which torch.load does not know
        arguments.distributed_state.device = torch.device("cpu")
        arguments.__dict__["_setup_devices"] = torch.device("cpu")
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def shards_weights(arguments: Seq2SeqTrainingArguments) -> bool:
    """Tell whether an engine (FSDP, ZeRO stage 3) leaves each process a part of the weights."""
    zero = getattr(arguments, "hf_deepspeed_config", None)
    by_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in TRUE_WORDS
    return bool(arguments.fsdp) or by_accelerate or (zero is not None and zero.is_zero3())


def check_gpu_is_here(config: RunConfig, device: torch.device) -> None:
    """Refuse --gpu_memory for a run without a CUDA device (UsageError); a plan accepts it."""
    if config.gpu_memory is not None and device.type != "cuda":
        raise UsageError(
            f"--gpu_memory is {config.gpu_memory:g} and this run computes on {device}, which is "
            "not a CUDA device; leave it out, or plan for a GPU with python -m ptuning plan and "
            "the same flags."
        )


def launch_notices(config: RunConfig, device: torch.device, num_processes: int) -> list[str]:
    """Say which devices are left unused, and how several processes on a CPU share its cores."""
    if num_processes > 1 and device.type == "cpu":
        return [
            f"No CUDA device: {num_processes} processes on the CPU, {torch.get_num_threads()} "
            "thread(s) each (torchrun sets 1 unless OMP_NUM_THREADS is set)"
        ]
    if num_processes == 1 and device.type == "cuda" and torch.cuda.device_count() > 1:
        return [how_to_use_all(config, device, torch.cuda.device_count())]
    return []


def how_to_use_all(config: RunConfig, device: torch.device, num_devices: int) -> str:
    """Say which of several devices is used, and what to type for all of them."""
    again, note = list(config.argv), ""
    takes_flags = not again[0].endswith(".json")
    accumulation = config.gradient_accumulation_steps
    if config.do_train and takes_flags and accumulation % num_devices == 0:
        again += ["--gradient_accumulation_steps", str(accumulation // num_devices)]
    elif config.do_train:
        note = f", with {num_devices} times the rows in a step"
    return (
        f"{num_devices} GPUs are visible and one process was started, so only {device} is used. To "
        f"use all{note} (docs/multi-gpu.md), type:\n"
        f"  torchrun --nproc_per_node {num_devices} main.py {shlex.join(again)}"
    )


# ---- Communication ----


def num_processes() -> int:
    """Return how many processes this run has."""
    is_joined = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_joined else 1


def process_index() -> int:
    """Return the rank of this process, from 0."""
    return distributed.get_rank() if num_processes() > 1 else 0


def is_main_process() -> bool:
    """Tell whether this is the process that writes what the processes share."""
    return process_index() == 0


def gather(value: Any) -> list[Any]:
    """Return one value per process, in rank order."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    distributed.all_gather_object(values, value)
    return values


def in_main_process(decide: Callable[[], T]) -> T:
    """Call decide in the main process; return its result, or raise its error, in all of them.

    An error that is neither a ValueError nor an OSError stays with the main process.
    """
    outcome: tuple[Any, Exception | None] = None, None
    if is_main_process():
        try:
            outcome = decide(), None
        except (ValueError, OSError) as error:
            outcome = None, error
    result, failure = gather(outcome)[0]
    if failure is not None:
        raise failure
    return result


def check_shared_folder(folder: Path, mark: str) -> None:
    """Refuse to start (UsageError) if a process does not see the main process's file in folder."""
    seen = gather((folder / mark).is_file())
    if not all(seen):
        raise UsageError(
            f"--output_dir is {folder}, and process {seen.index(False)} does not see there what "
            "process 0 writes; give a folder that every machine of this run shares."
        )


def leave_frozen_alone(model: nn.Module) -> None:
    """Exclude frozen weights and buffers from DistributedDataParallel's communication.

    Every process read the same files, and what is not trained does not change.
    """
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    ignored: Any = [*frozen, *(name for name, _ in model.named_buffers())]
    model._ddp_params_and_buffers_to_ignore = ignored


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error comes from another process that has ended."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER_WORDS)
