"""--per_device_eval_batch_size: rows answered or validated at a time; unset, as many as fit."""

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments

from ptuning.train.count_flags import check_counts

# A step's time is the reading of the weights until many rows share it: on a CPU 64 rows are about
# ten times as fast as one (docs/performance.md). Prompts are read in small passes whatever it is.
MOST_ROWS = 64
LEAST_ROWS = 8  # however little memory is free: transformers' own default


@dataclass
class AnsweringArguments(Seq2SeqTrainingArguments):
    """How many rows are computed together where nothing is trained; a part of TrainingArguments."""

    per_device_eval_batch_size: int = field(
        default=None,  # type: ignore[assignment]  # an int from __post_init__ on
        metadata={
            "help": f"Rows answered or validated at a time; unset is {MOST_ROWS}, fewer where "
            f"memory is short, {LEAST_ROWS} at least."
        },
    )

    def __post_init__(self) -> None:
        """Take 64 where nothing was typed; `ptuning.train.memory.eval_rows` lowers it."""
        check_counts(self)
        self.eval_rows_typed = self.per_device_eval_batch_size is not None
        if not self.eval_rows_typed:
            self.per_device_eval_batch_size = MOST_ROWS
        super().__post_init__()
