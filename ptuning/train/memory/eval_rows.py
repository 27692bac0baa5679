"""How many rows are answered and validated at a time, where no number was typed.

Many rows share the reading of the weights, but each holds keys and values of its own: 64 rows of
128 tokens are 7.5 GB in ChatGLM-6B in float32, 3.8 GB in 16 bits. So the number is halved until
they fit in addition to the loaded model.
"""

import logging

from ptuning.train.answering_flags import LEAST_ROWS, MOST_ROWS
from ptuning.train.flags import Arguments
from ptuning.train.memory.memory_model import (
    ADAM_BYTES,
    FLOAT32,
    ModelSize,
    answering_memory,
    validating_bytes,
)
from ptuning.train.memory.plan import largest_batch
from ptuning.train.memory.recomputing import FREE_SHARE, free_bytes
from ptuning.train.processes.processes import gather
from ptuning.train.rows import Rows
from ptuning.train.settings import RunSettings

logger = logging.getLogger("main")


def settle_eval_rows(
    arguments: Arguments, rows: Rows, settings: RunSettings, size: ModelSize, *, free: int | None
) -> None:
    """Lower --per_device_eval_batch_size to what fits, unless it was typed; say so.

    free: bytes in addition to the loaded model, None to ask the device that it is on. Processes
    take the same.
    """
    data, training = arguments.data, arguments.training
    if training.eval_rows_typed:
        return
    if free is None:
        free = free_bytes(training.device, training.world_size, training.memory_target)
    if training.do_train:  # its gradients and optimiser are not there yet
        free -= size.trained * (FLOAT32 + ADAM_BYTES)
    fitting = fitting_rows(
        size,
        rows,
        new_tokens=data.val_max_target_length or settings.max_target_length,
        num_beams=data.num_beams or training.generation_num_beams or 1,
        free=free,
        on_cpu=training.on_cpu,
    )
    fitting = min(gather(fitting))
    if fitting < training.per_device_eval_batch_size:
        logger.info(
            "Answering and validating %d rows at a time, as %d need more than the %.1f GB that are "
            "free; --per_device_eval_batch_size decides otherwise",
            fitting,
            training.per_device_eval_batch_size,
            free / 1e9,
        )
    training.per_device_eval_batch_size = fitting


def fitting_rows(
    size: ModelSize, rows: Rows, *, new_tokens: int, num_beams: int, free: int, on_cpu: bool
) -> int:
    """Return 64, halved while a batch of the longest rows needs more than is free; 8 at least."""
    count = MOST_ROWS
    while count > LEAST_ROWS:
        needed = max(
            _validating(size, rows, count, on_cpu=on_cpu),
            _answering(size, rows, count, num_beams, new_tokens, on_cpu=on_cpu),
        )
        if needed <= FREE_SHARE * free:
            break
        count //= 2
    return count


def _answering(
    size: ModelSize, rows: Rows, count: int, num_beams: int, new_tokens: int, *, on_cpu: bool
) -> int:
    """Return the bytes of answering beside the model, each beam a row; 0 without rows to answer."""
    if rows.test is None:
        return 0
    prompts = [int(length) for length in rows.test.lengths]
    memory = answering_memory(
        size,
        prompts * num_beams,
        num_rows=count * num_beams,
        new_tokens=new_tokens,
        on_cpu=on_cpu,
    )
    return memory.cache + memory.working


def _validating(size: ModelSize, rows: Rows, count: int, *, on_cpu: bool) -> int:
    """Return the bytes of a forward pass that keeps nothing; 0 where nothing is validated."""
    if rows.validation is None:
        return 0
    found = rows.validation
    batch = largest_batch(found.lengths, found.arrays.context_lengths, count)
    return validating_bytes(size, batch, on_cpu=on_cpu)
