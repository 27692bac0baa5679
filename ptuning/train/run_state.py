"""What transformers does not store in a checkpoint, so that a resumed run takes the same steps.

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
from torch.utils.data import DataLoader

FORMAT_VERSION = 1
STATE_NAME = "run_state_{rank}.json"


@dataclass
class RunState:
    """The part of a run's state that `trainer_state.json` does not hold."""

    loss_since_log: float = 0.0  # sum over the steps since the last log line
    loss_logged: float = 0.0  # sum over the steps before it
    last_logged_step: int = 0
    skipped: int = 0  # steps of the whole run
    skipped_since_log: int = 0
    skipped_in_a_row: int = 0
    epoch_random_state: dict[str, Any] = field(default_factory=dict)


def save_run_state(checkpoint: Path, rank: int, state: RunState) -> None:
    """Write one process's state to a checkpoint; numbers come back bit for bit."""
    content = {"format_version": FORMAT_VERSION, **asdict(state)}
    path = checkpoint / STATE_NAME.format(rank=rank)
    path.write_text(json.dumps(content), encoding="utf-8")


def load_run_state(checkpoint: Path, rank: int) -> RunState:
    """Read one process's state, or process 0's if fewer processes wrote the checkpoint."""
    path = checkpoint / STATE_NAME.format(rank=rank)
    if not path.is_file():
        path = checkpoint / STATE_NAME.format(rank=0)
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} was written by another version of this toolkit; resume with that version, or "
            f"start a new training from its weights: --init_from {checkpoint}"
        )
    return RunState(**content)


def capture_random_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's CPU generator as JSON values."""
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
    """Set the generators to a captured state."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = {**state["numpy"], "state": dict(state["numpy"]["state"])}
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch_state = np.frombuffer(base64.b64decode(state["torch"]), dtype=np.uint8).copy()
    torch.set_rng_state(torch.from_numpy(torch_state))


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Set the epoch of every sampler of a loader, however deep a launcher wrapped it."""
    sampler: Any = loader.batch_sampler
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
