"""What transformers forgets between a checkpoint and the run that goes on from it.

The loss summed since the last log line, the counts of skipped steps, and the random state at the
start of the epoch, from which a sampler without a seed of its own draws the order of the rows.
Each process writes its own file.
"""

import base64
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

FORMAT_VERSION = 1


@dataclass
class RunState:
    """The part of a run's state that `trainer_state.json` does not hold."""

    loss_since_log: float = 0.0  # sum over the steps since the last log line
    loss_logged: float = 0.0  # sum over the steps before it
    last_logged_step: int = 0
    skipped: int = 0  # steps of the whole run
    skipped_since_log: int = 0
    skipped_in_a_row: int = 0
    epoch_random_state: dict[str, Any] = field(default_factory=dict)  # empty: not known


def run_state_name(process_index: int, num_processes: int) -> str:
    """Return the file name of one process's state.

    >>> run_state_name(0, 1), run_state_name(1, 2)
    ('run_state.json', 'run_state_1.json')
    """
    return "run_state.json" if num_processes == 1 else f"run_state_{process_index}.json"


def save_run_state(path: Path, state: RunState) -> None:
    """Write a state; numbers come back bit for bit."""
    content = {"format_version": FORMAT_VERSION, **asdict(state)}
    path.write_text(json.dumps(content), encoding="utf-8")


def load_run_state(path: Path) -> RunState | None:
    """Read a state; None where there is none, as in checkpoints of earlier versions."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} was written by another version of this toolkit; go on with that one, or start "
            "anew from its weights with --init_from."
        )
    return RunState(**content)


def capture_random_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's CPU generator, as JSON can hold it."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002  # what trainers seed
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    torch_state = torch.get_rng_state().numpy().tobytes()
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy_state,
        "torch": base64.b64encode(torch_state).decode("ascii"),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to a captured state."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = {**state["numpy"], "state": dict(state["numpy"]["state"])}
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch_state = np.frombuffer(base64.b64decode(state["torch"]), dtype=np.uint8).copy()
    torch.set_rng_state(torch.from_numpy(torch_state))


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Tell every sampler of a loader which epoch it is, however deep a launcher wrapped it."""
    sampler: Any = loader.batch_sampler
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def checkpoint_bytes(model: nn.Module, optimizer: Optimizer | None) -> int:
    """Return about how large a checkpoint is: what is trained, and the optimiser's state."""
    tensors: list[Any] = [p for p in model.parameters() if p.requires_grad]
    for state in optimizer.state.values() if optimizer is not None else ():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
