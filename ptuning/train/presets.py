"""--preset: values that go together, as defaults; whatever is typed wins.

`task` is the published recipe, for the best score on the task. `gentle` keeps more of what the base
could do before: a smaller learning rate, and a prefix that starts near zero. Measured in
docs/forgetting.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PRESETS: dict[str, dict[str, float]] = {
    "task": {"learning_rate": 2e-2},
    "gentle": {"learning_rate": 1e-3, "prefix_init_std": 1e-3},
}
OF_A_NEW_PREFIX = ("prefix_init_std",)
STARTS = ("ptuning_checkpoint", "init_from")  # flags with which the prefix is not a new one


def with_preset(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line with the preset's values added, and a line for each preset.

    ValueError for an unknown preset.

    >>> with_preset(["--preset", "gentle", "--learning_rate=1e-4"])[0][3:]
    ['--prefix_init_std', '0.001']
    """
    given: dict[str, Any] = {}
    for word, following in zip(flags, [*flags[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name] = value if equals else following
    added, notices = preset_values(given)
    words = [word for name, value in added.items() for word in (f"--{name}", str(value))]
    return [*flags, *words], notices


def preset_values(given: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Return the values that the preset among the given flags adds, and what to say of it."""
    name = given.get("preset")
    if name is None:
        return {}, []
    if name not in PRESETS:
        raise ValueError(f"--preset is {name}; use {' or '.join(PRESETS)}.")
    is_new = all(given.get(start) is None for start in STARTS)
    values = {
        flag: value
        for flag, value in PRESETS[name].items()
        if flag not in given and (is_new or flag not in OF_A_NEW_PREFIX)
    }
    said = [f"--{flag} {value:g}" for flag, value in values.items()]
    said += [f"--{flag} {given[flag]} as typed" for flag in PRESETS[name] if flag in given]
    return values, [f"--preset {name}: {', '.join(said)}"]
