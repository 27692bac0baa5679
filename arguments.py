"""The flags of main.py, under the published file's name.

They are written in `ptuning.train.flags`, where `python -m ptuning plan` finds them too.
"""

from ptuning.train.flags import (
    Arguments,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    UsageError,
    check_gpu_is_here,
    parse_arguments,
)

__all__ = [
    "Arguments",
    "DataArguments",
    "ModelArguments",
    "TrainingArguments",
    "UsageError",
    "check_gpu_is_here",
    "parse_arguments",
]
