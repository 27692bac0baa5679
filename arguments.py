"""The flags of main.py, under the published file's name.

`ptuning.train.flags` declares them; `ptuning.train.run_config` makes a RunConfig of what was typed.
"""

from ptuning.train.flags import DataArguments, ModelArguments, TrainingArguments, UsageError
from ptuning.train.run_config import RunConfig, parse_arguments

__all__ = [
    "DataArguments",
    "ModelArguments",
    "RunConfig",
    "TrainingArguments",
    "UsageError",
    "parse_arguments",
]
