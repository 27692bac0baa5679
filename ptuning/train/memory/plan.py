"""What a run will take, from its flags and its rows, before any weight is loaded: pure arithmetic.

Useful FLOPs are those of docs/performance.md. `ptuning.train.memory.memory_model` has the bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ptuning.train.memory.memory_model import (
    AnsweringMemory,
    Batch,
    ModelSize,
    TrainingMemory,
    answering_memory,
    training_memory,
)
from ptuning.train.memory.recomputing import FREE_SHARE

# Share of a measured large matrix product that a whole step is assumed to reach;
# docs/performance.md has what was measured. Answering reads memory more than it multiplies.
TRAINING_SHARE = {"cpu-float32": 0.6, "cpu-half": 0.5, "cuda": 0.45}
ANSWERING_SHARE = 0.4


class Speed(NamedTuple):
    """What the device multiplies, measured, and the shares of it assumed."""

    product_flops: float  # per second
    training_share: float
    answering_share: float = ANSWERING_SHARE


@dataclass(frozen=True)
class RunShape:
    """What the flags say of a run; counts are per device where the flag is."""

    batch_rows: int
    accumulation: int
    processes: int
    epochs: float
    max_steps: int  # 0 or less: epochs decide
    recomputed_layers: int
    answer_rows: int  # decoded at a time
    new_tokens: int  # of an answer at most
    chunk_tokens: int | None = None  # of the loss at a time; None: the device's own


class Steps(NamedTuple):
    """How long a run is."""

    per_epoch: int
    total: int
    rows_per_step: int

    @property
    def epochs(self) -> float:
        """Passes over the rows."""
        return self.total / self.per_epoch


class Advice(NamedTuple):
    """Flags to type, and the bytes they need in all."""

    flags: str
    needed: int


def count_steps(num_rows: int, shape: RunShape) -> Steps:
    """Return how many steps a run takes.

    >>> shape = RunShape(1, 16, 1, 3.0, 3000, 0, 8, 64)
    >>> count_steps(114599, shape)
    Steps(per_epoch=7163, total=3000, rows_per_step=16)
    """
    rows_per_step = shape.batch_rows * shape.accumulation * shape.processes
    per_epoch = max(1, math.ceil(num_rows / rows_per_step))
    total = shape.max_steps if shape.max_steps > 0 else math.ceil(per_epoch * shape.epochs)
    return Steps(per_epoch, total, rows_per_step)


def largest_batch(lengths: np.ndarray, context_lengths: np.ndarray, num_rows: int) -> Batch:
    """Return the batch of the longest rows: no batch of the run needs more.

    >>> largest_batch(np.array([5, 9, 7]), np.array([2, 3, 3]), 2)
    Batch(lengths=(9, 7), answer_tokens=10)
    """
    longest = np.argsort(-lengths, kind="stable")[:num_rows]
    answers = lengths[longest] - context_lengths[longest]
    return Batch(tuple(int(n) for n in lengths[longest]), int(answers.sum()))


def training_flops(
    size: ModelSize,
    *,
    num_rows: float,
    tokens: float,
    answer_tokens: float,
    recomputed_layers: int = 0,
) -> float:
    """Return the FLOPs of one step: forward, input gradients, and layers computed again.

    Full fine-tuning adds the weights' gradients.
    """
    layers, hidden = size.num_layers, size.hidden_size
    linear = 2 * size.layer_weights * tokens
    keys = size.prefix_length + tokens / max(num_rows, 1)
    attention = 4 * tokens * keys * hidden * layers
    head = 2 * answer_tokens * hidden * size.vocab_size
    weight_gradients = linear + head if size.tuning == "full" else 0
    again = (linear + attention) * recomputed_layers / layers
    return 2 * (linear + head) + 3 * attention + weight_gradients + again


def answering_flops(size: ModelSize, *, prompt_tokens: float, new_tokens: float) -> float:
    """Return the FLOPs of reading prompts and making new tokens, attention left out."""
    head = 2 * new_tokens * size.hidden_size * size.vocab_size
    return 2 * size.layer_weights * (prompt_tokens + new_tokens) + head


def memory_of(size: ModelSize, batch: Batch, shape: RunShape, *, on_cpu: bool) -> TrainingMemory:
    """Return what a step of that batch holds under these flags."""
    return training_memory(
        size,
        batch,
        on_cpu=on_cpu,
        recomputed_layers=shape.recomputed_layers,
        accumulates=shape.accumulation > 1,
        chunk_tokens=shape.chunk_tokens,
    )


def answering_of(
    size: ModelSize, prompts: Sequence[int], shape: RunShape, *, on_cpu: bool
) -> AnsweringMemory:
    """Return what answering those prompts holds under these flags."""
    return answering_memory(
        size, prompts, num_rows=shape.answer_rows, new_tokens=shape.new_tokens, on_cpu=on_cpu
    )


def advise_training(
    size: ModelSize,
    lengths: np.ndarray,
    context_lengths: np.ndarray,
    shape: RunShape,
    *,
    on_cpu: bool,
    available: int,
) -> list[Advice]:
    """Return changes that need less, each alone, those that fit `available` bytes first.

    Smaller batches keep the rows of a step; int4 is left out where the base is trained or has it.
    """
    batch = largest_batch(lengths, context_lengths, shape.batch_rows)

    def needed(size: ModelSize, batch: Batch, shape: RunShape) -> int:
        return memory_of(size, batch, shape, on_cpu=on_cpu).total

    found = []
    if shape.batch_rows > 1:
        smaller = shape.batch_rows // 2
        accumulation = shape.accumulation * shape.batch_rows // smaller
        less = replace(shape, batch_rows=smaller, accumulation=accumulation)
        text = f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps"
        rows = largest_batch(lengths, context_lengths, smaller)
        found.append(Advice(f"{text} {accumulation}", needed(size, rows, less)))
    if shape.recomputed_layers < size.num_layers:
        all_layers = replace(shape, recomputed_layers=size.num_layers)
        found.append(Advice("--gradient_checkpointing true", needed(size, batch, all_layers)))
    for bits in (8, 4):
        if size.tuning != "full" and (size.weight_bits == 0 or bits < size.weight_bits):
            smaller_size = replace(size, weight_bits=bits)
            found.append(Advice(f"--quantization_bit {bits}", needed(smaller_size, batch, shape)))
    halves = np.maximum(lengths // 2, 1), context_lengths // 2
    found.append(
        Advice(
            "--max_source_length and --max_target_length halved",
            needed(size, largest_batch(*halves, shape.batch_rows), shape),
        )
    )
    now = needed(size, batch, shape)
    useful = [advice for advice in found if advice.needed < now]
    return sorted(useful, key=lambda advice: advice.needed > available * FREE_SHARE)


def advise_answering(
    size: ModelSize, prompts: Sequence[int], shape: RunShape, *, on_cpu: bool
) -> list[Advice]:
    """Return changes with which answering needs less."""
    found = []
    if shape.answer_rows > 1:
        fewer = replace(shape, answer_rows=shape.answer_rows // 2)
        total = answering_of(size, prompts, fewer, on_cpu=on_cpu).total
        found.append(Advice(f"--per_device_eval_batch_size {fewer.answer_rows}", total))
    if not size.weight_bits:
        smaller = replace(size, weight_bits=4)
        total = answering_of(smaller, prompts, shape, on_cpu=on_cpu).total
        found.append(Advice("--quantization_bit 4", total))
    return found
