"""The processes of a run: how many, on which device each, what they exchange, and their rows.

A launcher (torchrun, accelerate, srun) sets WORLD_SIZE. Without one a run uses one device;
nn.DataParallel, which transformers chooses when it sees several, is never used. All processes must
call the functions that communicate, in the same order; accelerate sends the tensors.

Each step has the same rows as in one process: a global batch is num_processes x batch_size rows in
the order that one process would see, and every process takes its part. accelerate would repeat rows
at the end of an epoch, which then count twice.
"""

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, distributed, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers import Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import seed_worker

from ptuning.data.tokenization import IGNORED_LABEL
from ptuning.train.parser import TRUE_WORDS
from ptuning.train.run_config import RunConfig, UsageError

T = TypeVar("T")

# The messages of gloo, NCCL and the rendezvous store about a process that has ended.
LOST_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")


def num_launched() -> int:
    """Return the number of processes that a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_name() -> str:
    """Return the prefix of this process's messages; "" if it is the only one."""
    return f"process {os.environ.get('RANK') or 0}: " if num_launched() > 1 else ""


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


def process_values(config: RunConfig) -> dict[str, Any]:
    """Return the keywords of transformers' training arguments, set for the processes of the run."""
    values = config.trainer_values()
    if num_launched() > 1:
        if not torch.accelerator.is_available():
            values["use_cpu"] = True  # otherwise the processes do not join
        if values["use_cpu"]:
            values["ddp_backend"] = values.get("ddp_backend") or "gloo"
    # Every trained parameter has a gradient in every step, so DDP need not look for others.
    values.setdefault("ddp_find_unused_parameters", False)
    return values


def shards_weights(arguments: Seq2SeqTrainingArguments) -> bool:
    """Return whether an engine (FSDP, ZeRO stage 3) leaves each process a part of the weights."""
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
    """Say which devices are unused, and how several processes on a CPU share its cores."""
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
    """Return the rank of this process."""
    return distributed.get_rank() if num_processes() > 1 else 0


def is_main_process() -> bool:
    """Return whether this is rank 0, which writes the shared files."""
    return process_index() == 0


def gather(value: Any) -> list[Any]:
    """Return one value per rank, in rank order."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    distributed.all_gather_object(values, value)
    return values


def in_main_process(decide: Callable[[], T]) -> T:
    """Call decide in the main process; return its result, or raise its error, in all of them.

    An error that is neither a ValueError nor an OSError stays in the main process.
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


def exclude_frozen_from_ddp(model: nn.Module) -> None:
    """Exclude frozen weights and buffers from DistributedDataParallel's broadcasts.

    All ranks read them from the same files, and they do not change.
    """
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    ignored: Any = [*frozen, *(name for name, _ in model.named_buffers())]
    model._ddp_params_and_buffers_to_ignore = ignored


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error comes from another process that has ended."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER_WORDS)


# ---- Rows ----


class ShardedBatches(BatchSampler):
    """One rank's part of every global batch, as row numbers; ~i stands for row i, masked.

    A rank without rows in the last batch computes one row with every label masked: it adds nothing
    to loss and gradient, and all ranks take part in every step.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        *,
        batch_size: int,
        num_processes: int,
        process_index: int,
        drop_last: bool = False,
    ) -> None:
        """Take the order of all rows, and the rows of one rank in a full batch."""
        super().__init__(sampler, batch_size * num_processes, drop_last)
        self.num_processes, self.process_index = num_processes, process_index

    def __iter__(self) -> Iterator[list[int]]:
        """Yield contiguous rows of each global batch; ranks differ by one row at most."""
        for batch in super().__iter__():
            start = len(batch) * self.process_index // self.num_processes
            end = len(batch) * (self.process_index + 1) // self.num_processes
            yield batch[start:end] or [~batch[0]]


class MaskableRows(Dataset[dict[str, Tensor]]):
    """Rows by their numbers; ~i is row i with every label masked."""

    def __init__(self, rows: Dataset[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)  # type: ignore[arg-type]  # map-style

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row, or a masked one."""
        if index >= 0:
            return self.rows[index]
        row = self.rows[~index]
        return {**row, "labels": torch.full_like(row["labels"], IGNORED_LABEL)}


class EpochOrder(Sampler[int]):
    """An order drawn from the seed and the epoch alone, so that all ranks have the same."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        """Yield the row numbers in their order."""
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


def sharded_loader(
    rows: Dataset[dict[str, Tensor]],
    order: Sampler[int],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    args: Any,
    *,
    batch_size: int,
    trains: bool,
) -> DataLoader[Any]:
    """Return the loader of this rank's part; args are transformers' training arguments."""
    if isinstance(order, LengthGroupedSampler):
        order.batch_size *= args.world_size  # rows of similar length share a global batch
        order = EpochOrder(order, args.seed)
    batches = ShardedBatches(
        order,
        batch_size=batch_size,
        num_processes=args.world_size,
        process_index=args.process_index,
        drop_last=trains and args.dataloader_drop_last,
    )
    workers = args.dataloader_num_workers
    seeds = partial(seed_worker, num_workers=workers, rank=args.process_index)
    loader = DataLoader(
        MaskableRows(rows),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=seeds if trains else None,
        persistent_workers=trains and args.dataloader_persistent_workers,
    )
    return prepare_data_loader(
        loader,
        args.device,
        num_processes=1,  # it is sharded already
        process_index=0,
        put_on_device=True,
        use_seedable_sampler=args.accelerator_config.use_seedable_sampler,
        data_seed=args.data_seed,
    )
