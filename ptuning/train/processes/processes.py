"""Communication between the processes of a run by objects, used rarely; accelerate sends tensors.

All processes must call the functions that communicate, in the same order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed, nn
from transformers import set_seed

from ptuning.train.config import UsageError

T = TypeVar("T")

# What a process sees when another one has ended: gloo's, NCCL's and the rendezvous store's words.
LOST_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")


def is_shared() -> bool:
    """Tell whether this run has several processes."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def gather(value: Any) -> list[Any]:
    """Return one value per process, in rank order."""
    if not is_shared():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def num_processes() -> int:
    """Return how many processes this run has."""
    return distributed.get_world_size() if is_shared() else 1


def process_index() -> int:
    """Return the rank of this process, from 0."""
    return distributed.get_rank() if is_shared() else 0


def is_main_process() -> bool:
    """Tell whether this is the process that writes what the processes share."""
    return process_index() == 0


def in_main_process(decide: Callable[[], T]) -> T:
    """Call decide in the main process; return its result, or raise its error, in all of them.

    An error that is neither a ValueError nor an OSError stays with the main process.
    """
    result: T | None = None
    failure: Exception | None = None
    if is_main_process():
        try:
            result = decide()
        except (ValueError, OSError) as error:
            failure = error
    result, failure = gather((result, failure))[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # what decide returned


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


def draw_apart(seed: int, process_index: int) -> None:
    """Seed each process differently, for its own dropout masks; the row order is not affected."""
    set_seed(seed + process_index)


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error comes from another process that has ended."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER_WORDS)
