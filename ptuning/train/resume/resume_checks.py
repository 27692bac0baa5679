"""Whether a checkpoint belongs to the run that goes on from it: the same rows, batches, ranks, and
as long a way to go.
"""

import json
import logging
import zlib
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ptuning.data.dataset import TokenDataset
from ptuning.train.flags import UsageError
from ptuning.train.resume.checkpointing import read_facts

logger = logging.getLogger("main")

# Whose learning rate does not ask how long a run is.
STEADY_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")


def fingerprint_rows(rows: TokenDataset | None) -> str:
    """Return a short checksum of the training rows in their order; "" without any.

    The order in which rows are seen is drawn over their numbers, so other rows are another run.
    """
    if rows is None:
        return ""
    checksum = zlib.crc32(rows.arrays.offsets.tobytes())
    checksum = zlib.crc32(rows.arrays.context_lengths.tobytes(), checksum)
    checksum = zlib.crc32(rows.arrays.ids.tobytes(), checksum)
    return f"{len(rows)}-{checksum:08x}"


def check_same_run(checkpoint: Path, *, rows: str, rows_per_step: int, processes: int) -> None:
    """Refuse (UsageError) to go on with other rows; warn where the resume cannot be exact.

    Checkpoints of earlier versions do not say what they were trained on and are not checked.
    """
    facts = read_facts(checkpoint)
    if facts is None:
        return
    if facts["rows"] != rows:
        raise UsageError(
            f"{checkpoint} was trained on other rows ({facts['rows'] or 'none'}) than --train_file "
            f"has with these flags ({rows}); go on with the old file and lengths, or start a new "
            f"training from its weights: --init_from {checkpoint} with another --output_dir."
        )
    for what, then, now in (
        ("rows per step", facts["rows_per_step"], rows_per_step),
        ("processes", facts["processes"], processes),
    ):
        if then != now:
            logger.warning(
                "%s was written with %s %s and this run has %s: it goes on, but not exactly as "
                "one run would have",
                checkpoint,
                then,
                what,
                now,
            )


def warn_of_other_length(checkpoint: Path, *, num_steps: int, schedule: str) -> None:
    """Warn where a checkpoint was written on the way to another number of steps than num_steps.

    schedule is --lr_scheduler_type: all but the steady ones spread the learning rate over the whole
    run, so that it jumps where the run goes on.
    """
    path = checkpoint / TRAINER_STATE_NAME
    state = json.loads(path.read_text(encoding="utf-8"))  # transformers has read it before
    step, planned = state["global_step"], state["max_steps"]
    if planned == num_steps:
        return
    keep = f"To keep the course it was on, type --max_steps {planned}"
    if num_steps <= step:
        what = "no step is left to train"
        keep = f"To train on, type a larger --max_steps: it was meant to have {planned}"
    elif schedule in STEADY_SCHEDULES:
        what = f"it ends at step {num_steps}, at the learning rate of before"
    else:
        what = (
            f"the {schedule} schedule of the learning rate is laid over {num_steps} steps from "
            "here on and changes course, so the result is that of neither length"
        )
        if step >= planned:
            keep = (
                "For a schedule of its own, start a new training from the weights: --init_from "
                f"{checkpoint} with another --output_dir"
            )
    logger.warning(
        "%s was written at step %d of %d, and this run asks for %d: %s. %s",
        checkpoint,
        step,
        planned,
        num_steps,
        what,
        keep,
    )
