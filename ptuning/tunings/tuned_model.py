"""What a name given as the model stands for: a base, a whole model that was tuned, or an adapter.

A LoRA adapter changes the base's own weights, so it stands for a model of its own: the session
loads the base that it names and puts the adapter on it, for every answer.
"""

from pathlib import Path
from typing import NamedTuple

from ptuning.tunings.artefact import (
    ADAPTER_CONFIG_NAME,
    INFO_NAME,
    LORA,
    PREFIX_CONFIG_NAME,
    PTUNING,
    TunedInfo,
    kind_of,
    read_tuned_info,
)
from ptuning.tunings.bundled import NANO_DIR
from ptuning.tunings.loading import BaseModelError, find_base


class NamedModel(NamedTuple):
    """Where the weights lie (directory or hub id), the adapter on them, and how it was tuned."""

    weights: str
    adapter: Path | None
    info: TunedInfo | None


def find_model(name_or_path: str) -> NamedModel:
    """Return what a model's name stands for; nothing of it is loaded.

    ValueError for a prefix, which needs a base, and for an adapter without one that is there.
    """
    path = Path(name_or_path)
    if (path / ADAPTER_CONFIG_NAME).is_file() and kind_of(path) == LORA:
        info = read_tuned_info(path)
        assert isinstance(info, TunedInfo), "an adapter describes itself, or peft did"
        return NamedModel(base_of(path), path, info)
    weights = find_base(name_or_path, flag="--model", tuned_flag="--prefix")
    info = read_tuned_info(path) if (path / INFO_NAME).is_file() else None
    return NamedModel(weights, None, info if isinstance(info, TunedInfo) else None)


def base_of(tuned: Path) -> str:
    """Return the base that a prefix or an adapter says it was trained on; ValueError without it."""
    remedy = "give it with --model"
    if (tuned / ADAPTER_CONFIG_NAME).is_file():
        file = INFO_NAME if (tuned / INFO_NAME).is_file() else ADAPTER_CONFIG_NAME
        remedy = f"write it as base_model_name_or_path into {tuned / file}"
    info = read_tuned_info(tuned)
    if info is None or not info.base_model_name_or_path:
        raise ValueError(
            f"{tuned} does not name the base it was trained on ({PREFIX_CONFIG_NAME} or "
            f"{INFO_NAME} would); {remedy}."
        )
    base = info.base_model_name_or_path
    checkout = NANO_DIR.parents[2]
    if not Path(base).is_dir() and (checkout / base / "config.json").is_file():
        return str(checkout / base)  # trained by train.sh, which runs in the checkout
    try:
        return find_base(base, flag="--model")
    except BaseModelError as error:
        raise ValueError(
            f"{tuned} was trained on {base}, and no model is there; where it is now, {remedy}."
        ) from error


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
