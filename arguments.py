"""The flags of main.py, under the published file's name.

`ptuning.train.flags` declares them; `ptuning.train.config` turns a command line into a RunConfig.
"""

from ptuning.train.config import RunConfig, parse_arguments
from ptuning.train.flags import DataArguments, ModelArguments, TrainingArguments, UsageError

__all__ = [
    "DataArguments",
    "ModelArguments",
    "RunConfig",
    "TrainingArguments",
    "UsageError",
    "parse_arguments",
]
