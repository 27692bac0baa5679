"""Skip steps with a bad loss or gradient, and stop the run if there are too many in a row.

A loss or gradient that is not finite, or exactly zero, teaches nothing and may destroy what was
learned. Such a step leaves weights and optimizer unchanged; the step number, the data and the
learning-rate schedule move on. The check costs one device transfer of two numbers per step. A run
that stops names the likely cause and writes the batch to a file.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.loss import IGNORED_LABEL
from ptuning.storage import write_atomically
from ptuning.train.checkpoints import RunState

BAD_BATCH_NAME = "bad_batch{rank}.txt"  # rank: "" for one process, else _0, _1, ...
RISING = 1.5  # a logged loss this many times the lowest one is diverging
LARGE_WEIGHT = 100.0  # a prefix starts from N(0, 1) and stays near it; 128 x 229,376 draws reach 6

Batch = Mapping[str, Any]

logger = logging.getLogger("main")


class BadStepsError(RuntimeError):
    """Too many bad steps in a row; the text says why and what to type."""


def fault_in(loss: float, grad_norm: float) -> str | None:
    """Say what is wrong with a step; None for a good one.

    >>> fault_in(2.0, 0.5), fault_in(float("nan"), 0.5), fault_in(2.0, 0.0)
    (None, 'the loss is nan', 'the gradient is exactly 0')
    """
    for name, value in (("loss", loss), ("gradient", grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if value == 0:
            return f"the {name} is exactly 0"
    return None


@dataclass(frozen=True)
class Evidence:
    """What is known when bad steps stop a run."""

    loss: float
    grad_norm: float
    num_labels: int  # answer tokens in the last batch
    dtype: str  # of the base, "float16"
    base_is_finite: bool
    largest_weight: float  # of what is trained; nan if any is
    learning_rate: float
    logged_losses: Sequence[float]


def likely_cause(evidence: Evidence) -> str:
    """Name the most likely cause and what to type."""
    if evidence.num_labels == 0:
        return (
            "every label of the batch is masked (-100), so there is no answer to learn; look at "
            "the rows in --train_file and at --response_column"
        )
    if not evidence.base_is_finite:
        return (
            "the base itself holds weights that are not finite; load it with --bf16 true, or "
            "download it again"
        )
    lower = evidence.learning_rate / 10
    losses = [loss for loss in evidence.logged_losses if math.isfinite(loss)]
    signs = []
    if len(losses) > 1 and losses[-1] > RISING * min(losses):
        signs.append(f"the loss rose from {min(losses):.4g} to {losses[-1]:.4g}")
    if not evidence.largest_weight <= LARGE_WEIGHT:  # nan is too large
        signs.append(f"the largest trained weight is {evidence.largest_weight:.4g}")
    if signs:
        return (
            f"the learning rate is too high ({' and '.join(signs)}); start over with "
            f"--learning_rate {lower:.1g}"
        )
    if evidence.dtype == "float16":
        is_zero = evidence.loss == 0 or evidence.grad_norm == 0
        what = "what is below 6e-8 becomes 0" if is_zero else "what is above 65504 overflows"
        return f"the base computes in float16, where {what}; use --bf16 true in place of --fp16"
    return (
        f"nothing stands out: the base is finite in {evidence.dtype} and the loss had not risen; "
        f"look at the batch, and try --learning_rate {lower:.1g}"
    )


def gather_evidence(
    model: ChatGLMForConditionalGeneration,
    batches: Sequence[Batch],
    values: tuple[float, float],
    *,
    learning_rate: float,
    log_history: Sequence[Mapping[str, Any]],
) -> Evidence:
    """Inspect the weights and labels once; values are the last loss and gradient norm."""
    parameters = list(model.parameters())
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point()]
    largest = [p.detach().abs().max().item() for p in parameters if p.requires_grad and p.numel()]
    is_nan = any(math.isnan(value) for value in largest)  # max() would pass over it
    return Evidence(
        loss=values[0],
        grad_norm=values[1],
        num_labels=sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches),
        dtype=str(model.dtype).removeprefix("torch."),
        base_is_finite=all(bool(p.isfinite().all()) for p in frozen),
        largest_weight=math.nan if is_nan else max(largest, default=0.0),
        learning_rate=learning_rate,
        logged_losses=[float(entry["loss"]) for entry in log_history if "loss" in entry],
    )


class StepGuard:
    """Watches the micro-batches of one optimizer step at a time."""

    def __init__(self, *, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row  # skipped steps that stop a run; 0 never does
        self._losses: list[Tensor] = []  # on the device, so that nothing waits for it
        self.batches: list[Batch] = []
        self._loss_before: Tensor | None = None

    def begin(self, loss_so_far: Tensor) -> None:
        """Remember the trainer's sum of losses at the first micro-batch of a step."""
        if not self._losses:
            self._loss_before = loss_so_far.clone()

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Keep one micro-batch until the step is checked."""
        self._losses.append(loss.detach().float())
        self.batches.append(batch)

    def values(self, grad_norm: Tensor | float | None) -> Tensor:
        """Return (2,) float32 on the device: the step's loss, and its gradient norm.

        grad_norm None is unknown, as under DeepSpeed, and counts as 1.
        """
        loss = torch.stack(self._losses).sum()
        norm = 1.0 if grad_norm is None else grad_norm
        return torch.stack([loss, torch.as_tensor(norm, dtype=loss.dtype, device=loss.device)])

    def refuse(
        self, model: nn.Module, loss_so_far: Tensor, fault: str, state: RunState, *, step: int
    ) -> bool:
        """Cancel a step and count it; return whether it is one too many in a row.

        An optimizer ignores parameters without a gradient. loss_so_far is restored.
        """
        for parameter in model.parameters():
            parameter.grad = None
        assert self._loss_before is not None, "begin ran before"
        loss_so_far.copy_(self._loss_before)
        state.skipped += 1
        state.skipped_since_log += 1
        state.skipped_in_a_row += 1
        count = f"{state.skipped_in_a_row} in a row, {state.skipped} in all"
        logger.warning("Step %d is skipped: %s (%s)", step, fault, count)
        return state.skipped_in_a_row == self.max_in_a_row

    def clear(self) -> None:
        """Drop the step's batches."""
        self._losses.clear()
        self.batches.clear()

    def explain(
        self,
        evidence: Evidence,
        path: Path,
        *,
        decode: Callable[[list[int]], str],
        step: int,
        last_sound: Path | None,
    ) -> str:
        """Write the batch to path, readable, and say what happened and why.

        last_sound is the checkpoint to return to, None without one.
        """
        fault, cause = fault_in(evidence.loss, evidence.grad_norm), likely_cause(evidence)
        lines = [f"step {step}: {fault}", f"{evidence}", f"likely cause: {cause}", ""]
        rows: list[Any] = []
        for batch in self.batches:
            rows += zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        for number, (ids, labels) in enumerate(rows, start=1):
            answer = [label for label in labels if label != IGNORED_LABEL]
            size = f"{len(ids)} tokens with padding, {len(answer)} labels"
            lines += [
                f"row {number} of {len(rows)}: {size}",
                f"  text:   {decode(ids)!r}",
                f"  answer: {decode(answer)!r}",
                f"  ids:    {ids}",
                f"  labels: {labels}",
                "",
            ]
        write_atomically(path, "\n".join(lines).encode("utf-8", "backslashreplace"))
        kept = "no checkpoint was written before" if last_sound is None else f"{last_sound} is kept"
        return (
            f"Stopped after {self.max_in_a_row} consecutive skipped steps; at step {step}, "
            f"{fault}. Likely cause: {cause}. The batch is in {path}; {kept}."
        )


def correct_mean(logs: dict[str, float], state: RunState, *, step: int) -> None:
    """Average the loss of a log entry over the steps taken, and add the count of skipped ones."""
    if state.skipped_since_log:
        steps = step - state.last_logged_step
        taken = steps - state.skipped_since_log
        logs["loss"] = logs["loss"] * steps / taken if taken else math.nan
        logs["skipped_steps"] = state.skipped_since_log
    state.last_logged_step, state.skipped_since_log = step, 0
