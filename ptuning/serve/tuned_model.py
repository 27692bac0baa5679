"""What a name given as the model stands for: a base, a whole model that was tuned, or an adapter.

A LoRA adapter changes the base's own weights, so it stands for a model of its own: the session
loads the base that it names and puts the adapter on it, for every answer.
"""

from pathlib import Path
from typing import NamedTuple

from ptuning.model.tuned import (
    ADAPTER_CONFIG_NAME,
    INFO_NAME,
    LORA,
    PREFIX_CONFIG_NAME,
    PTUNING,
    TunedInfo,
    kind_of,
    read_tuned_info,
)
from ptuning.nano.paths import NANO_DIR

MARKS = (PREFIX_CONFIG_NAME, INFO_NAME, ADAPTER_CONFIG_NAME)


class NamedModel(NamedTuple):
    """Where the weights lie (directory or hub id), the adapter on them, and how it was tuned."""

    weights: str
    adapter: Path | None
    info: TunedInfo | None


def find_model(name_or_path: str) -> NamedModel:
    """Return what a model's name stands for; nothing of it is loaded.

    ValueError for a prefix, which needs a base to be named with, and for an adapter that does not
    say what its base is.
    """
    path = Path(name_or_path)
    if not any((path / mark).is_file() for mark in MARKS):
        return NamedModel(name_or_path, None, None)
    kind = kind_of(path)
    if kind == PTUNING:
        raise ValueError(
            f"{path} holds a prefix, not a model; give it as --prefix NAME={path} instead."
        )
    info = read_tuned_info(path)
    assert isinstance(info, TunedInfo), "an adapter or a whole model with tuning_config.json"
    if kind == LORA:
        return NamedModel(base_of(path), path, info)
    return NamedModel(name_or_path, None, info)


def base_of(tuned: Path) -> str:
    """Return the base that a prefix or an adapter says it was trained on; ValueError without it."""
    info = read_tuned_info(tuned)
    if info is None or not info.base_model_name_or_path:
        raise ValueError(
            f"{tuned} does not name its base model (no {PREFIX_CONFIG_NAME} or {INFO_NAME}, or an "
            "empty name); give a prefix's base with --model, and write an adapter's as "
            f"base_model_name_or_path into {ADAPTER_CONFIG_NAME}."
        )
    base = info.base_model_name_or_path
    checkout = NANO_DIR.parents[2]
    if not Path(base).is_dir() and (checkout / base / "config.json").is_file():
        return str(checkout / base)  # trained by train.sh, which runs in the checkout
    return base


def refuse_other_kinds(path: Path) -> None:
    """Refuse an adapter or a whole model where a prefix is wanted (ValueError)."""
    if not any((path / mark).is_file() for mark in (INFO_NAME, ADAPTER_CONFIG_NAME)):
        return
    kind = kind_of(path)
    if kind != PTUNING:
        what = "a LoRA adapter" if kind == LORA else "a whole model"
        raise ValueError(
            f"{path} holds {what}, which changes every answer and not one row's as a prefix does; "
            f"start with it as the model: --model {path}"
        )
