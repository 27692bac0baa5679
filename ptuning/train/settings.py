"""How rows become tokens in this run: what was typed, else what the prefix was trained with, else
the defaults.
"""

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
