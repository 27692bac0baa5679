"""--gradient_checkpointing auto, true or false, under the names of every transformers version.

transformers 5.23 calls its switch activation_checkpointing and warns of the old name. Layers are
recomputed by `ptuning.train.memory.recomputing` instead, so transformers is told nothing.
"""

import json
from typing import Any

WANTED = ("auto", "true", "false")
OLD_WORDS = {"yes": "true", "y": "true", "t": "true", "1": "true", "no": "false", "n": "false"}
OLD_WORDS |= {"f": "false", "0": "false"}


def take_recomputing(training: Any) -> tuple[str, dict[str, Any] | None]:
    """Return what is wanted, and torch.utils.checkpoint's options, None for ours.

    Reads and clears transformers' fields of either name, before its own __post_init__ sees them.
    ValueError for another word, or for options that are not a JSON object.
    """
    given = training.gradient_checkpointing
    newer = getattr(training, "activation_checkpointing", None)
    if newer is not None:
        given, training.activation_checkpointing = newer, None
    training.gradient_checkpointing = None
    options = training.gradient_checkpointing_kwargs
    if getattr(training, "activation_checkpointing_kwargs", None) is not None:
        options = training.activation_checkpointing_kwargs
        training.activation_checkpointing_kwargs = None
    training.gradient_checkpointing_kwargs = None
    wanted = "false" if given is None else str(given).lower()
    wanted = OLD_WORDS.get(wanted, wanted)
    if wanted not in WANTED:
        raise ValueError(f"--gradient_checkpointing is {given}; use auto, true or false.")
    return wanted, _read_options(options)


def _read_options(options: Any) -> dict[str, Any] | None:
    try:
        read = json.loads(options) if isinstance(options, str) else options
    except json.JSONDecodeError:
        read = options
    if read is not None and not isinstance(read, dict):
        raise ValueError(
            f"--gradient_checkpointing_kwargs is {options}; give a JSON object such as "
            "'{\"use_reentrant\": false}', or leave it out."
        )
    return read
