"""Steps that cannot be right: skipped, counted, and the end of the run when they do not stop.

A loss or gradient that is not finite, or exactly zero, teaches nothing and may destroy what was
learned. Such a step leaves weights and optimiser as they are; the step number, the data and the
learning-rate schedule, which is a function of the step number, move on. The look costs one transfer
of two numbers per step.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptuning.train.faults.guards import (
    Batch,
    fault_in,
    gather_evidence,
    likely_cause,
    write_bad_batch,
)
from ptuning.train.resume.run_directory import last_sound
from ptuning.train.resume.run_state import RunState

logger = logging.getLogger("main")


class BadStepsError(RuntimeError):
    """Too many steps in a row could not be used; the text says why and what to type."""


class StepGuard:
    """Watches the micro-batches of one optimiser step at a time."""

    def __init__(self, *, max_in_a_row: int) -> None:
        """Take the skipped steps in a row that end a run; 0 skips for ever."""
        self.max_in_a_row = max_in_a_row
        self._losses: list[Tensor] = []  # on the device: looking at one would wait for it
        self._batches: list[Batch] = []
        self._loss_before: Tensor | None = None

    def begin(self, loss_so_far: Tensor) -> None:
        """Remember the trainer's sum of losses at the first micro-batch of a step."""
        if not self._losses:
            self._loss_before = loss_so_far.clone()

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Keep one micro-batch until the step is judged."""
        self._losses.append(loss.detach().float())
        self._batches.append(batch)

    def values(self, grad_norm: Tensor | float | None) -> Tensor:
        """Return (2,) float32 on the device: the step's loss, and its gradient norm.

        None for a norm that an engine keeps to itself counts as 1.
        """
        loss = torch.stack(self._losses).sum()
        norm = torch.as_tensor(
            1.0 if grad_norm is None else grad_norm, dtype=torch.float32, device=loss.device
        )
        return torch.stack([loss, norm])

    def refuse(
        self, model: nn.Module, loss_so_far: Tensor, fault: str, state: RunState, *, step: int
    ) -> bool:
        """Undo a step before it is taken and count it; True when it is one too many in a row.

        An optimiser passes over parameters without a gradient, and the sum of losses in
        loss_so_far goes back to where it was.
        """
        for parameter in model.parameters():
            parameter.grad = None
        assert self._loss_before is not None, "begin ran before"
        loss_so_far.copy_(self._loss_before)
        state.skipped += 1
        state.skipped_since_log += 1
        state.skipped_in_a_row += 1
        logger.warning(
            "Step %d is skipped: %s (%d in a row, %d in all)",
            step,
            fault,
            state.skipped_in_a_row,
            state.skipped,
        )
        return state.skipped_in_a_row == self.max_in_a_row

    def clear(self) -> None:
        """Let go of the step's batches."""
        self._losses.clear()
        self._batches.clear()

    def explain(
        self,
        model: nn.Module,
        path: Path,
        *,
        values: tuple[float, float],
        dtype: torch.dtype,
        learning_rate: float,
        log_history: Sequence[Mapping[str, Any]],
        decode: Callable[[list[int]], str],
        step: int,
    ) -> str:
        """Write the batch to path for people to read, and say what happened and why."""
        evidence = gather_evidence(
            model,
            self._batches,
            values=values,
            dtype=dtype,
            learning_rate=learning_rate,
            log_history=log_history,
        )
        fault, cause = fault_in(*values), likely_cause(evidence)
        headline = f"step {step}: {fault}\n{evidence}\nlikely cause: {cause}"
        write_bad_batch(path, self._batches, headline, decode)
        good = last_sound(path.parent)
        kept = "no checkpoint was written before" if good is None else f"{good} is kept"
        return (
            f"{self.max_in_a_row} steps in a row could not be used; of the last one, step {step}, "
            f"{fault}. Likely cause: {cause}. The batch is in {path}; {kept}."
        )


def correct_mean(logs: dict[str, float], state: RunState, *, step: int) -> None:
    """Make the mean loss of a log line one over the steps taken, and count the others in it."""
    if state.skipped_since_log:
        steps = step - state.last_logged_step
        taken = steps - state.skipped_since_log
        logs["loss"] = logs["loss"] * steps / taken if taken else float("nan")
        logs["skipped_steps"] = state.skipped_since_log
    state.last_logged_step, state.skipped_since_log = step, 0
