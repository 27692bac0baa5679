"""--per_device_eval_batch_size: rows answered or validated at a time, by device where unset."""

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments

from ptuning.train.count_flags import check_counts

ROWS = 8  # transformers' own default
# On a CPU a step's time is the reading of the weights until many rows share it: 64 rows are about
# ten times as fast as one (docs/performance.md). Prompts are read in small passes whatever it is.
ROWS_CPU = 64


@dataclass
class AnsweringArguments(Seq2SeqTrainingArguments):
    """How many rows are computed together where nothing is trained; a part of TrainingArguments."""

    per_device_eval_batch_size: int = field(
        default=None,  # type: ignore[assignment]  # an int from __post_init__ on
        metadata={
            "help": f"Rows answered or validated at a time; unset is {ROWS}, on a CPU {ROWS_CPU} "
            "where memory is free for them."
        },
    )

    def __post_init__(self) -> None:
        """Take the device's default where nothing was typed."""
        check_counts(self)
        self.eval_rows_typed = self.per_device_eval_batch_size is not None
        if not self.eval_rows_typed:
            self.per_device_eval_batch_size = ROWS
        super().__post_init__()
        if not self.eval_rows_typed and self.device.type == "cpu":
            self.per_device_eval_batch_size = ROWS_CPU
