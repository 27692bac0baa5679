"""Which way of tuning a command line means, and which of its flags contradict that.

--tuning says it. Old command lines do not have that flag: there --pre_seq_len means a prefix, the
checkpoint given says what it is, and DeepSpeed without a prefix length means the whole model, as in
the published ds_train_finetune.sh.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptuning.model.adapter import check_targets
from ptuning.model.tuned import FULL, INFO_NAME, LORA, PTUNING, TUNINGS, kind_of

if TYPE_CHECKING:
    from ptuning.train.flags import ModelArguments, TrainingArguments

LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")
OFF = ("false", "no", "0", "f", "n")


def with_tuning(flags: Sequence[str]) -> list[str]:
    """Return a command line that says --tuning, where it can be told from the rest.

    >>> with_tuning(["--do_train", "--pre_seq_len", "128"])[-2:]
    ['--tuning', 'ptuning']
    """
    values: dict[str, Any] = {}
    for word, following in pairwise([*flags, "--"]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values[name] = value if equals or following.startswith("--") else following
            if values[name] == "":
                values[name] = True  # a switch
    tuning = find_tuning(values)
    if tuning is None or "tuning" in values:
        return list(flags)
    return [*flags, "--tuning", tuning]


def find_tuning(values: Mapping[str, Any]) -> str | None:
    """Return what flags by name mean, None where they do not say; ValueError for an odd checkpoint.

    >>> find_tuning({"do_train": True, "deepspeed": "deepspeed.json"})
    'full'
    """
    if values.get("tuning") is not None:
        return str(values["tuning"])
    checkpoint = values.get("ptuning_checkpoint") or values.get("init_from")
    if checkpoint is not None:
        # One that is not there is told where the prefix is read.
        return kind_of(checkpoint) if Path(checkpoint).exists() else PTUNING
    if values.get("pre_seq_len") is not None:
        return PTUNING
    trains = str(values.get("do_train", "false")).lower() not in OFF
    if trains and values.get("deepspeed"):
        return FULL
    model = values.get("model_name_or_path")
    if not trains and model is not None and (Path(model) / INFO_NAME).is_file():
        return FULL
    return None


def check_tuning(model: "ModelArguments", training: "TrainingArguments") -> None:
    """Refuse flags that contradict --tuning (ValueError)."""
    tuning, checkpoint = training.tuning, model.ptuning_checkpoint
    if tuning is None:
        needed = "--ptuning_checkpoint DIR to score what was trained, or --tuning full the model"
        if training.do_train:
            needed = (
                "--pre_seq_len 128 to train a new prefix, --tuning lora for a LoRA adapter, or "
                "--tuning full for the whole model"
            )
        raise ValueError(f"no prefix, and no other way of tuning: give {needed}.")
    if tuning not in TUNINGS:
        raise ValueError(f"--tuning is {tuning}; use {', '.join(TUNINGS)}.")
    if checkpoint is not None and Path(checkpoint).exists():
        found = kind_of(checkpoint)
        if found != tuning:
            raise ValueError(
                f"--tuning is {tuning}, but --ptuning_checkpoint {checkpoint} is of the kind "
                f"{found}; leave --tuning out, or give another checkpoint."
            )
    if tuning == PTUNING and model.pre_seq_len is None and checkpoint is None:
        raise ValueError("--tuning is ptuning without a prefix; give --pre_seq_len 128.")
    if tuning == LORA and checkpoint is None and not training.do_train:
        raise ValueError("--tuning is lora without an adapter; give --ptuning_checkpoint DIR.")
    _check_strangers(model, tuning)
    if tuning == FULL:
        _check_full(model, training)
    elif tuning == LORA:
        _check_lora(model)


def _check_strangers(model: "ModelArguments", tuning: str) -> None:
    """Refuse flags of another way of tuning."""
    for owner, names in ((PTUNING, ("pre_seq_len", "prefix_projection")), (LORA, LORA_FLAGS)):
        given = [f"--{name}" for name in names if getattr(model, name) is not None]
        if given and tuning != owner:
            raise ValueError(
                f"{', '.join(given)} belong to --tuning {owner}, and --tuning is {tuning}; leave "
                "out one or the other."
            )


def _check_full(model: "ModelArguments", training: "TrainingArguments") -> None:
    if model.quantization_bit or model.quantize_embeddings:
        raise ValueError(
            "--tuning is full with a quantised base, whose weights cannot be trained; leave "
            "--quantization_bit and --quantize_embeddings out, or use --tuning lora."
        )
    sharded = training.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if sharded and training.do_train and training.do_predict:
        raise ValueError(
            "--do_predict is given with FSDP, where no process holds the whole model; train first, "
            "then type: PREFIX=OUTPUT_DIR bash evaluate.sh"
        )


def _check_lora(model: "ModelArguments") -> None:
    for name, value, fits, wanted in (
        ("lora_rank", model.lora_rank, lambda v: v >= 1, "1 or more"),
        ("lora_alpha", model.lora_alpha, lambda v: v > 0, "a number above 0"),
        ("lora_dropout", model.lora_dropout, lambda v: 0 <= v < 1, "0 to less than 1"),
    ):
        if value is not None and not fits(value):
            raise ValueError(f"--{name} is {value}; use {wanted}.")
    if model.lora_target_modules is not None:
        check_targets(model.lora_target_modules.split(","))
    given = [name for name in LORA_FLAGS if getattr(model, name) is not None]
    if model.ptuning_checkpoint is not None and given:
        raise ValueError(
            f"--{given[0]} is given with --ptuning_checkpoint {model.ptuning_checkpoint}, whose "
            "adapter has its own; leave it out."
        )
