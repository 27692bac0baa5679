"""What a training run left in a directory: a prefix, a LoRA adapter, or a whole model.

`kind_of` tells them apart. A prefix describes itself in prefix_config.json, an adapter and a whole
model in tuning_config.json; either file is written last. Importing this module loads no torch, so
that a command line is checked before anything heavy is; the tensors are read by
`ptuning.tunings.prefix` and `ptuning.model.adapter`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ptuning.storage import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    INFO_NAME,
    read_json,
    write_atomically,
)

PTUNING, LORA, FULL = "ptuning", "lora", "full"
TUNINGS = (PTUNING, LORA, FULL)
FORMAT_VERSION = 1
PREFIX_CONFIG_NAME = "prefix_config.json"
PREFIX_WEIGHTS_NAME = "prefix.safetensors"
PUBLISHED_NAME = "pytorch_model.bin"
EXPORT_FORMATS = ("published", "peft", "kv")
# What names the kind of a directory; a run that writes one kind takes the others' away.
MARKS = {
    PTUNING: (PREFIX_CONFIG_NAME, PREFIX_WEIGHTS_NAME),
    LORA: (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME),
    FULL: (),
}
# The linears of a layer that LoRA can adapt; the first is peft's own choice for ChatGLM.
TARGET_MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
DEFAULT_TARGETS = TARGET_MODULES[:1]


@dataclass(frozen=True)
class PrefixInfo:
    """What a prefix is and what it was made for; the contents of prefix_config.json.

    base_fingerprint is None for a published file, which does not say what it was trained on.
    `settings` holds the prompt columns, lengths and recipe of the run; `metrics` its newest
    figures.
    """

    prefix_length: int
    prefix_projection: bool
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    base_model_name_or_path: str = ""
    base_fingerprint: str | None = None
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class TunedInfo:
    """What an adapter or a whole model was made from; the contents of tuning_config.json.

    base_fingerprint is that of the base before training, None where it is not known (an adapter
    that peft itself wrote). `settings` holds the prompt columns, lengths and recipe of the run;
    `metrics` its newest figures.
    """

    tuning: str
    base_model_name_or_path: str = ""
    base_fingerprint: str | None = None
    trained_parameters: int | None = None
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


Info = TypeVar("Info", PrefixInfo, TunedInfo)


def kind_of(path: str | Path) -> str:
    """Return what a directory or file holds: "ptuning", "lora" or "full".

    A published P-Tuning directory has a config.json too, so there the names of the stored tensors
    decide. FileNotFoundError for a path with none of the three, ValueError for PEFT's other kinds
    of adapters and for damaged weights.
    """
    path = Path(path)
    if path.is_file() or any((path / name).is_file() for name in MARKS[PTUNING]):
        return PTUNING
    if (path / ADAPTER_CONFIG_NAME).is_file():
        kind = read_json(path / ADAPTER_CONFIG_NAME).get("peft_type")
        if kind != "LORA":
            raise ValueError(
                f"{path} holds PEFT's kind of adapter {kind}; LORA is read, and a prefix in the "
                "form that training wrote it: give that directory."
            )
        return LORA
    if not (path / "config.json").is_file():
        if (path / PUBLISHED_NAME).is_file():
            return PTUNING
        what = "has" if path.is_dir() else "does not exist, so it has"
        raise FileNotFoundError(
            f"{path} {what} no prefix ({PREFIX_CONFIG_NAME}), no LoRA adapter "
            f"({ADAPTER_CONFIG_NAME}) and no whole model (config.json); give a directory written "
            "by training (output/.../checkpoint-N)."
        )
    from ptuning.model.checkpoint.files import find_weight_files, read_headers  # needs torch

    names = read_headers(find_weight_files(path))
    return PTUNING if any("prefix_encoder." in name for name in names) else FULL


def read_tuned_info(path: str | Path) -> PrefixInfo | TunedInfo | None:
    """Return what the directory or file at path says of itself, None where it says nothing."""
    path = Path(path)
    kind = kind_of(path)
    if kind == PTUNING:
        return read_prefix_info(path)
    if (path / INFO_NAME).is_file():
        return _read_info(path / INFO_NAME, TunedInfo)
    if kind == LORA:  # written by peft alone
        base = read_json(path / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
        return TunedInfo(LORA, base_model_name_or_path=str(base or ""))
    return None


def read_prefix_info(path: Path) -> PrefixInfo | None:
    """Return the description next to the prefix at path, None for a published checkpoint."""
    file = (path if path.is_dir() else path.parent) / PREFIX_CONFIG_NAME
    if not file.is_file() or find_prefix_weights(path).name != PREFIX_WEIGHTS_NAME:
        return None
    return _read_info(file, PrefixInfo)


def find_prefix_weights(path: Path) -> Path:
    """Return the file that holds the prefix at path; FileNotFoundError says what was looked for."""
    if path.is_file():
        return path
    for name in (PREFIX_WEIGHTS_NAME, PUBLISHED_NAME):
        if (path / name).is_file():
            return path / name
    if (path / ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{path} holds an adapter of peft, not a prefix of ours; load it and its base by "
            f"AutoModelForCausalLM.from_pretrained({str(path)!r})."
        )
    what = "has no" if path.is_dir() else "does not exist, so it has no"
    raise FileNotFoundError(
        f"{path} {what} {PREFIX_WEIGHTS_NAME} or {PUBLISHED_NAME}; give a prefix directory written "
        "by training (output/.../checkpoint-N) or one such file."
    )


def _read_info(file: Path, kind: type[Info]) -> Info:
    values = read_json(file)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version}; this version reads {FORMAT_VERSION}: update the "
            "toolkit."
        )
    try:
        return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
    except TypeError as error:
        raise ValueError(f"{file} is incomplete ({error}); restore it from the run.") from error


def write_tuned_info(directory: Path, info: TunedInfo) -> None:
    """Write tuning_config.json, which makes the directory complete; take other kinds' marks away.

    Call it after the weights are in place.
    """
    remove_other_marks(directory, info.tuning)
    text = json.dumps(asdict(info), ensure_ascii=False, indent=2) + "\n"
    write_atomically(directory / INFO_NAME, text.encode())


def remove_other_marks(directory: Path, kind: str) -> None:
    """Delete what would make directory be taken for another kind than it holds now."""
    others = [name for other, names in MARKS.items() if other != kind for name in names]
    if kind == PTUNING:
        others.append(INFO_NAME)
    for name in others:
        (directory / name).unlink(missing_ok=True)


def check_base(
    info: PrefixInfo | TunedInfo, base: str | None, fingerprint: str, path: Path
) -> None:
    """Refuse a prefix or adapter trained on another base than this one (ValueError)."""
    if info.base_fingerprint is None or info.base_fingerprint == fingerprint:
        return
    is_prefix = isinstance(info, PrefixInfo)
    raise ValueError(
        f"the {'prefix' if is_prefix else 'adapter'} at {path} was trained on "
        f"{info.base_model_name_or_path or 'a base'} (fingerprint {info.base_fingerprint[:8]}), "
        f"but {base or 'this base'} has {fingerprint[:8]}; load the base it was trained on"
        f"{', or pass allow_other_base=True to try it anyway' if is_prefix else ''}."
    )


def check_targets(target_modules: Sequence[str]) -> None:
    """Refuse names that are not a layer's linears (ValueError)."""
    unknown = [name for name in target_modules if name not in TARGET_MODULES]
    if unknown or not target_modules:
        raise ValueError(
            f"--lora_target_modules is {','.join(target_modules) or 'empty'}; give one or more of "
            f"{', '.join(TARGET_MODULES)}, separated by commas."
        )
