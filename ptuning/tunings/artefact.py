"""What training left in a directory: a prefix, a LoRA adapter, or a whole model.

`kind_of` tells them apart. A prefix describes itself in prefix_config.json, an adapter and a whole
model in tuning_config.json; either file is written last. Importing this module does not import
torch, so that a command line is checked at once; the tensors are read by `ptuning.tunings.prefix`
and `ptuning.model.adapter`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptuning.storage import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    FORMAT_VERSION,
    INFO_NAME,
    TARGET_MODULES,
    read_description,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

PTUNING, LORA, FULL = "ptuning", "lora", "full"
TUNINGS = (PTUNING, LORA, FULL)
PREFIX_CONFIG_NAME = "prefix_config.json"
PREFIX_WEIGHTS_NAME = "prefix.safetensors"
PUBLISHED_NAME = "pytorch_model.bin"
EXPORT_FORMATS = ("published", "peft", "kv")
# The files that tell the kind of a directory; a run that writes one kind deletes the others'.
MARKS = {
    PTUNING: (PREFIX_CONFIG_NAME, PREFIX_WEIGHTS_NAME),
    LORA: (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME),
    FULL: (),
}
# The linears of a layer that LoRA can adapt; the first is peft's own choice for ChatGLM.
DEFAULT_TARGETS = TARGET_MODULES[:1]

# Keys of one of the two files alone.
SIZES_OF_A_PREFIX = (
    *("prefix_length", "prefix_projection", "num_layers", "hidden_size", "num_attention_heads"),
    "vocab_size",
)
OF_OTHER_TUNINGS = ("tuning", "trained_parameters")


class ModelError(ValueError):
    """A base, or what was tuned on it, cannot be used as asked."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """What was trained and on which base: the contents of prefix_config.json or tuning_config.json.

    base_fingerprint is that of the base before training, None where it is not known (a published
    prefix, an adapter that peft wrote). settings holds how rows became tokens, metrics the newest
    figures. The sizes are those of a prefix, 0 for other tunings.
    """

    tuning: str
    prefix_length: int = 0
    prefix_projection: bool = False
    num_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    vocab_size: int = 0
    base_model_name_or_path: str = ""
    base_fingerprint: str | None = None
    trained_parameters: int | None = None
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


class TrainedState(NamedTuple):
    """What an Info takes from the trainer, and the model's tensors by name where a launcher
    gathered them from several processes (DeepSpeed, FSDP); None: the model holds its own.
    """

    step: int
    metrics: dict[str, float]
    settings: dict[str, Any]
    tensors: "Mapping[str, Tensor] | None" = None


def kind_of(path: str | Path) -> str:
    """Return what a directory or file holds: "ptuning", "lora" or "full".

    A published P-Tuning directory has a config.json too, so there the names of the stored tensors
    decide. FileNotFoundError for a path with none of the three, ValueError for peft's other kinds
    of adapters and for damaged weights.
    """
    path = Path(path)
    if path.is_file() or any((path / name).is_file() for name in MARKS[PTUNING]):
        return PTUNING
    if (path / ADAPTER_CONFIG_NAME).is_file():
        kind = read_json(path / ADAPTER_CONFIG_NAME).get("peft_type")
        if kind != "LORA":
            raise ValueError(
                f"{path} holds a peft adapter of type {kind}; give a LoRA adapter, or a prefix "
                "as training wrote it."
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


def read_info(path: str | Path) -> Info | None:
    """Return what the artefact at path, a directory or a file, says of itself, if anything."""
    path = Path(path)
    kind = kind_of(path)
    if kind == PTUNING:
        return read_prefix_info(path)
    if (path / INFO_NAME).is_file():
        return _parse_info(path / INFO_NAME)
    if kind == LORA:  # written by peft alone
        base = read_json(path / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
        return Info(tuning=LORA, base_model_name_or_path=str(base or ""))
    return None


def read_adapter_shape(directory: Path) -> tuple[int, tuple[str, ...]]:
    """Return a LoRA adapter's rank and the linears of a layer that it adapts."""
    config = read_json(directory / ADAPTER_CONFIG_NAME)
    return int(config["r"]), tuple(n for n in TARGET_MODULES if n in config["target_modules"])


def read_prefix_info(path: Path) -> Info | None:
    """Return the description next to the prefix at path, None for a published checkpoint."""
    file = (path if path.is_dir() else path.parent) / PREFIX_CONFIG_NAME
    if not file.is_file() or find_prefix_weights(path).name != PREFIX_WEIGHTS_NAME:
        return None
    return _parse_info(file)


def _parse_info(file: Path) -> Info:
    needed = SIZES_OF_A_PREFIX if file.name == PREFIX_CONFIG_NAME else ("tuning",)
    values = read_description(file, *needed)
    known = {f.name: values[f.name] for f in fields(Info) if f.name in values}
    return Info(**({"tuning": PTUNING} | known))


def write_info(directory: Path, info: Info) -> None:
    """Write the description, which makes an artefact complete: call it after the weights."""
    of_a_prefix = info.tuning == PTUNING
    unused = OF_OTHER_TUNINGS if of_a_prefix else SIZES_OF_A_PREFIX
    values = {key: value for key, value in asdict(info).items() if key not in unused}
    write_json(directory / (PREFIX_CONFIG_NAME if of_a_prefix else INFO_NAME), values)


def remove_other_marks(directory: Path, kind: str) -> None:
    """Delete the files that would make directory be taken for another kind than kind."""
    others = [name for other, names in MARKS.items() if other != kind for name in names]
    for name in (*others, INFO_NAME) if kind == PTUNING else others:
        (directory / name).unlink(missing_ok=True)


def find_prefix_weights(path: Path) -> Path:
    """Return the file that holds the prefix at path; FileNotFoundError says what was looked for."""
    if path.is_file():
        return path
    for name in (PREFIX_WEIGHTS_NAME, PUBLISHED_NAME):
        if (path / name).is_file():
            return path / name
    if (path / ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{path} holds a peft adapter and no prefix; load it and its base with "
            f"AutoModelForCausalLM.from_pretrained({str(path)!r})."
        )
    what = "has no" if path.is_dir() else "does not exist, so it has no"
    raise FileNotFoundError(
        f"{path} {what} {PREFIX_WEIGHTS_NAME} or {PUBLISHED_NAME}; give a prefix directory written "
        "by training (output/.../checkpoint-N) or one such file."
    )


def check_kind(directory: Path, wanted: str) -> None:
    """Refuse a checkpoint of another kind of tuning (ModelError)."""
    kind = kind_of(directory)
    if kind != wanted:
        raise ModelError(f"{directory} is a {kind} checkpoint, and --tuning is {wanted}.")
