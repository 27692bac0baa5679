"""What the processes of one run tell each other, as objects and seldom; accelerate sends tensors.

Every function here that talks has to be called by all processes, in the same order.
"""

from pathlib import Path
from typing import Any

from torch import distributed, nn
from transformers import set_seed

from ptuning.train.config import UsageError

# What a process meets when another one is gone: gloo's, NCCL's and the rendezvous store's words.
LOST_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")


def is_shared() -> bool:
    """Tell whether this run has several processes."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def gather(value: Any) -> list[Any]:
    """Return every process's value, by process; the own one alone where there is but one."""
    if not is_shared():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def check_same_everywhere(what: str, value: object, *, needed: str) -> None:
    """Refuse (UsageError) to start where processes see different things."""
    values = gather(value)
    if any(other != values[0] for other in values):
        index = next(i for i, other in enumerate(values) if other != values[0])
        raise UsageError(
            f"{what} is {values[0]} for process 0 and {values[index]} for process {index}; {needed}"
        )


def check_shared_folder(folder: Path, mark: str) -> None:
    """Refuse to start where a process does not see the file that the main one keeps in folder."""
    seen = gather((folder / mark).is_file())
    if not all(seen):
        raise UsageError(
            f"--output_dir is {folder}, and process {seen.index(False)} does not see there what "
            "process 0 writes; give a folder that every machine of this run shares."
        )


def leave_frozen_alone(model: nn.Module) -> None:
    """Tell DistributedDataParallel to send neither frozen weights nor buffers around.

    Every process read the same files, and what is not trained stays as it is.
    """
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    ignored: Any = [*frozen, *(name for name, _ in model.named_buffers())]
    model._ddp_params_and_buffers_to_ignore = ignored


def draw_apart(seed: int, process_index: int) -> None:
    """Give each process dropout masks of its own; the order of the rows does not depend on this."""
    set_seed(seed + process_index)


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error comes from another process that is gone."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER_WORDS)
