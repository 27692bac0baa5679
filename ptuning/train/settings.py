"""How rows become tokens in this run: what was typed, else what the prefix was trained with, else
the defaults.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PUBLISHED_MAX_SOURCE = 1024  # the published code's defaults, in tokens
PUBLISHED_MAX_TARGET = 128


@dataclass(frozen=True)
class RunSettings:
    """Columns, lengths in tokens, and recipe; an artefact remembers them."""

    prompt_column: str = "content"
    response_column: str = "summary"
    history_column: str | None = None
    source_prefix: str = ""
    max_source_length: int = PUBLISHED_MAX_SOURCE
    max_target_length: int = PUBLISHED_MAX_TARGET
    recipe: str = "corrected"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they stand in prefix_config.json."""
        return asdict(self)


def resolve_settings(typed: Mapping[str, Any], remembered: Mapping[str, Any]) -> RunSettings:
    """Return typed values where there are any (not None), else remembered ones, else the defaults.

    >>> typed = {"max_source_length": None, "prompt_column": "q"}
    >>> settings = resolve_settings(typed, {"max_source_length": 64, "prompt_column": "content"})
    >>> settings.prompt_column, settings.max_source_length, settings.max_target_length
    ('q', 64, 128)
    """
    values = {}
    for name in RunSettings.__dataclass_fields__:
        value = typed.get(name)
        if value is None:
            value = remembered.get(name)
        if value is not None:
            values[name] = value
    return RunSettings(**values)


def steps_line(num_rows: int, rows_per_step: int, epochs: float, *, max_steps: int) -> str:
    """Say how long an epoch is and how much of the data a run sees; max_steps above 0 decides.

    >>> steps_line(114599, 16, 3.0, max_steps=3000)
    '  7163 steps of 16 rows per epoch; this run takes 3000 steps, 0.42 epochs'
    """
    steps = math.ceil(num_rows / rows_per_step)
    total = max_steps if max_steps > 0 else math.ceil(steps * epochs)
    return (
        f"  {steps} steps of {rows_per_step} rows per epoch; "
        f"this run takes {total} steps, {total / steps:.2f} epochs"
    )
