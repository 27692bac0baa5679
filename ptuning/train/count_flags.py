"""Flags that count rows or batches: below one, nothing could be computed."""

from typing import Any

COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)


def check_counts(training: Any) -> None:
    """Refuse a count below one; ValueError names the flag. None is left to the device."""
    for name in COUNTS:
        count = getattr(training, name)
        if count is not None and count < 1:
            raise ValueError(f"--{name} is {count}; give 1 or more.")
