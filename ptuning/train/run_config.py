"""From the command line to one frozen RunConfig: parse once, merge, check.

A value comes from the first of these that has one: what was typed, what the checkpoint remembers of
its training, the preset, the default in `ptuning.train.flags`. Imports neither torch nor
transformers, so that a mistake is reported at once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptuning.data.mixing import parse_mix
from ptuning.data.prompts import SHORTEST, RowFormat
from ptuning.data.reading import find_files
from ptuning.storage import INFO_NAME, SUPPORTED_BITS, check_targets
from ptuning.train.flags import (
    GROUPS,
    DataArguments,
    ModelArguments,
    TrainerArguments,
    TrainingArguments,
    UsageError,
)
from ptuning.train.parser import FALSE_WORDS, TRUE_WORDS, parse
from ptuning.tunings.artefact import (
    FULL,
    LORA,
    PTUNING,
    TUNINGS,
    kind_of,
    read_info,
)
from ptuning.tunings.loading import WORDS_OF_MAIN, find_base

if TYPE_CHECKING:
    import numpy as np

PRESETS: dict[str, dict[str, float | str]] = {
    "task": {"learning_rate": 2e-2},
    "gentle": {"learning_rate": 1e-3, "prefix_init_std": 1e-3},
    # LIMA, section 3, https://arxiv.org/abs/2305.11206, but for the rate, which is a prefix's.
    "lima": {
        "num_train_epochs": 15,
        "learning_rate": 2e-2,
        "warmup_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "save_strategy": "epoch",
        "lr_scheduler_type": "polynomial",  # of degree 1: linear, to lr_end in place of 0
    },
}
LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")
ROW_FLAGS = tuple(f.name for f in fields(RowFormat))  # an artefact remembers these
AT_LEAST = {
    0: ("checkpoint_layers", "max_bad_steps"),
    1: (
        *("pre_seq_len", "lora_rank", "num_beams", "gradient_accumulation_steps"),
        *("max_train_samples", "max_eval_samples", "max_predict_samples"),
        *("per_device_train_batch_size", "per_device_eval_batch_size"),
    ),
    SHORTEST: ("max_source_length", "max_target_length"),
}
# This toolkit does these in transformers' place: its trainer gets none of them.
NOT_FOR_THE_TRAINER = (
    *("overwrite_output_dir", "early_stopping_patience", "max_bad_steps", "checkpoint_layers"),
    *("gpu_memory", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
)
# Flags that decide what is learned: a command that differs in none of them resumes a run. The rows
# have a fingerprint in place of flags.
DECISIVE = (
    *("model_name_or_path", "model_revision", "tokenizer_name", "tuning", "ptuning_checkpoint"),
    *("init_from", "pre_seq_len", "prefix_projection", "prefix_init_std", *LORA_FLAGS),
    *("layer_dropout", "quantization_bit", "quantize_embeddings", "bf16", "fp16", "source_prefix"),
    *("max_source_length", "max_target_length", "recipe", "mix"),
    *("max_train_samples", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "seed"),
    *("load_best_model_at_end", "early_stopping_patience"),
)
# So do transformers' other flags, except those whose names begin with one of these.
INDECISIVE = (
    *("logging_", "log_", "save_", "eval_", "hub_", "run_name", "project", "trackio_"),
    *("dataloader_num_", "dataloader_p", "dataloader_multi", "dataloader_in_order"),
    *("ddp_", "local_rank", "predict_with_generate"),
)


@dataclass(frozen=True, kw_only=True)
class RunConfig(ModelArguments, DataArguments, TrainingArguments, TrainerArguments):
    """Everything a run was asked for; checked, and never changed.

    `trainer_flags` are transformers' other flags by name, as typed; `notices` are lines to print at
    the start; `argv` is the command line as typed.
    """

    trainer_flags: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every flag that needs no file of rows and no model; ValueError."""
        _check_task(self)
        _check_values(self)
        _check_tuning(self)
        _check_forgetting(self)

    @property
    def checkpoint(self) -> str | None:
        """What training starts from or what is scored, besides the base; None for a fresh start."""
        return named_checkpoint(vars(self), self.tuning)[1]

    @property
    def checkpoint_flag(self) -> str:
        """The flag that named the checkpoint."""
        return named_checkpoint(vars(self), self.tuning)[0]

    @property
    def hub(self) -> dict[str, Any]:
        """Keywords of transformers' `from_pretrained` for the hub."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": True if self.use_auth_token else None,
        }

    @cached_property
    def row_format(self) -> RowFormat:
        """How rows become tokens."""
        return RowFormat(**{name: getattr(self, name) for name in ROW_FLAGS})

    def files(self, name: str) -> list[Path]:
        """Return the files of train_file, validation_file or test_file, patterns resolved."""
        return [file for given in getattr(self, name) or () for file in find_files(given)]

    @property
    def padded_length(self) -> int | None:
        """Tokens that --pad_to_max_length pads every row to; None without it."""
        total = self.max_source_length + self.max_target_length
        return total if self.pad_to_max_length else None

    @property
    def dtype_name(self) -> str | None:
        """The dtype that --bf16 or --fp16 asks for; None without them."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else None

    @property
    def new_tokens(self) -> int:
        """Longest generated answer in tokens."""
        return self.val_max_target_length or self.max_target_length

    @property
    def beams(self) -> int:
        """Beams when answering."""
        return self.num_beams or self.generation_num_beams or 1

    @property
    def measures_retention(self) -> bool:
        """Whether general prompts are answered too."""
        return self.compare_base if self.measure_retention is None else self.measure_retention

    @property
    def memory_target(self) -> int | None:
        """--gpu_memory in bytes."""
        return None if self.gpu_memory is None else int(self.gpu_memory * 10**9)

    @property
    def validates(self) -> bool:
        """Whether the run needs validation rows."""
        return self.do_eval or (self.do_train and self.eval_strategy != "no")

    @property
    def checkpointing(self) -> str:
        """--gradient_checkpointing under either name: auto, true or false."""
        newer = self.activation_checkpointing
        given = self.gradient_checkpointing if newer is None else newer
        word = str(given).lower()
        return "true" if word in TRUE_WORDS else "false" if word in FALSE_WORDS else word

    @property
    def checkpointing_options(self) -> dict[str, Any] | None:
        """Keywords of torch.utils.checkpoint; None for this toolkit's own."""
        given = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs
        try:
            options = json.loads(given) if isinstance(given, str) else given
        except json.JSONDecodeError:
            options = given
        if options is not None and not isinstance(options, dict):
            raise UsageError(
                f"--gradient_checkpointing_kwargs is {given}; give a JSON object such as "
                "'{\"use_reentrant\": false}', or leave it out."
            )
        return options

    def rows_per_step(self, num_processes: int) -> int:
        """Return the rows that one optimizer step reads, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes

    def tokens_to_train(self, lengths: "np.ndarray", num_processes: int) -> float:
        """Return the tokens that each process trains on, given the training rows' lengths."""
        if self.max_steps > 0:
            return float(self.max_steps * self.rows_per_step(1) * lengths.mean())
        return float(self.num_train_epochs * lengths.sum() / num_processes)

    def trainer_values(self) -> dict[str, Any]:
        """Return the keywords of transformers' training arguments."""
        names = [f.name for f in (*fields(TrainerArguments), *fields(TrainingArguments))]
        values = {name: getattr(self, name) for name in names if name not in NOT_FOR_THE_TRAINER}
        values |= self.trainer_flags
        values["remove_unused_columns"] = False
        if self.tuning != FULL:
            values["bf16"] = values["fp16"] = False  # the frozen base has its dtype: no autocast
        if values["per_device_eval_batch_size"] is None:
            del values["per_device_eval_batch_size"]
        return values

    def settings(self) -> dict[str, Any]:
        """Return the flags that decide what is learned, by name, as JSON values."""
        others = {n: v for n, v in self.trainer_flags.items() if not n.startswith(INDECISIVE)}
        values = {name: getattr(self, name) for name in DECISIVE} | others
        values["layer_dropout"] = self.layer_dropout or None  # runs of earlier versions have none
        del values["num_train_epochs" if self.max_steps > 0 else "max_steps"]
        return values


def parse_arguments(argv: Sequence[str]) -> RunConfig:
    """Read flags, or a JSON file of them that flags may follow; UsageError for any mistake.

    `--help` prints and raises SystemExit.
    """
    typed, notices = parse(argv)
    for name in ("train_file", "validation_file", "test_file"):
        if name in typed:
            typed[name] = tuple(typed[name])
    try:
        if typed.get("model_name_or_path"):
            typed["model_name_or_path"] = find_base(typed["model_name_or_path"], **WORDS_OF_MAIN)
        preset, lines = preset_values(typed)
        tuning = find_tuning(typed)
        values = preset | remembered_settings(typed, tuning) | typed | {"tuning": tuning}
        own = {f.name for group in GROUPS for f in fields(group)}
        return RunConfig(
            **{name: value for name, value in values.items() if name in own},
            trainer_flags={name: value for name, value in values.items() if name not in own},
            notices=(*notices, *lines, *_notices_of(preset | typed)),
            argv=tuple(argv),
        )
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def preset_values(typed: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the preset that was typed, and the line that lists them."""
    name = typed.get("preset")
    if name is None:
        return {}, []
    if name not in PRESETS:
        raise UsageError(f"--preset is {name}; use {', '.join(PRESETS)}.")
    values: dict[str, Any] = dict(PRESETS[name])
    if typed.get("ptuning_checkpoint") or typed.get("init_from"):
        values.pop("prefix_init_std", None)  # no new prefix is made
    if "save_strategy" in values and typed.get("validation_file"):
        values["eval_strategy"] = "steps" if "eval_steps" in typed else values["save_strategy"]
    if "save_steps" in typed:
        values.pop("save_strategy", None)  # or they would have no effect
    if "lr_scheduler_type" in values and "lr_scheduler_type" not in typed:
        rate = typed.get("learning_rate", values["learning_rate"])
        values["lr_scheduler_kwargs"] = f'{{"lr_end": {rate / 10:g}}}'
    said = []
    for flag, value in (values | {flag: typed[flag] for flag in values if flag in typed}).items():
        shown = f"{value:g}" if isinstance(value, float | int) else value
        said.append(f"--{flag} {shown}{' (typed)' if flag in typed else ''}")
    return values, [f"--preset {name}: {', '.join(said)}"]


def find_tuning(typed: Mapping[str, Any]) -> str | None:
    """Return the kind of tuning that a command line implies, None for neither.

    Published command lines have no --tuning: --pre_seq_len implies a prefix, a checkpoint its own
    kind, DeepSpeed without a prefix length the whole model (ds_train_finetune.sh).

    >>> find_tuning({"do_train": True, "deepspeed": "deepspeed.json"})
    'full'
    """
    if typed.get("tuning") is not None:
        return str(typed["tuning"])
    _, checkpoint = named_checkpoint(typed, None)
    if checkpoint is not None:  # one that does not exist is reported when it is read
        return kind_of(checkpoint) if Path(checkpoint).exists() else PTUNING
    if typed.get("pre_seq_len") is not None:
        return PTUNING
    if typed.get("do_train"):
        return FULL if typed.get("deepspeed") else None
    return FULL if is_tuned_model(typed.get("model_name_or_path")) else None


def is_tuned_model(name_or_path: str | None) -> bool:
    """Return whether a directory was written by full fine-tuning."""
    return name_or_path is not None and (Path(name_or_path) / INFO_NAME).is_file()


def named_checkpoint(values: Mapping[str, Any], tuning: str | None) -> tuple[str, str | None]:
    """Return the flag that names the checkpoint, and its value; None for a fresh start."""
    if values.get("init_from"):
        return "--init_from", values["init_from"]
    given, base = values.get("ptuning_checkpoint"), values.get("model_name_or_path")
    if not given and tuning == FULL and is_tuned_model(base):
        return "--model_name_or_path", base
    return "--ptuning_checkpoint", given


def remembered_settings(typed: Mapping[str, Any], tuning: str | None) -> dict[str, Any]:
    """Return the row settings that the checkpoint of a command line was trained with."""
    flag, checkpoint = named_checkpoint(typed, tuning)
    if checkpoint is None or not Path(checkpoint).exists():
        return {}
    try:
        info = read_info(checkpoint)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"{flag}: {error}") from error
    settings = {} if info is None else info.settings
    known = {name: settings[name] for name in ROW_FLAGS if settings.get(name) is not None}
    if typed.get("format") is not None:  # it determines the columns
        return {name: value for name, value in known.items() if not name.endswith("_column")}
    if any(name.endswith("_column") for name in typed):
        known.pop("format", None)
    return known


def _notices_of(typed: Mapping[str, Any]) -> list[str]:
    """Return a line for each typed flag with less effect than expected."""
    notices = []
    if "num_train_epochs" in typed and typed.get("max_steps", -1) > 0:
        notices.append(
            f"--num_train_epochs {typed['num_train_epochs']:g} has no effect: --max_steps "
            f"{typed['max_steps']} overrides it."
        )
    if typed.get("label_smoothing_factor"):
        notices.append(
            f"--label_smoothing_factor {typed['label_smoothing_factor']:g} smooths the training "
            "loss; the validation loss is not smoothed."
        )
    return notices


def _check_task(config: RunConfig) -> None:
    """Check that there is something to do, and what it needs."""
    if not (config.do_train or config.do_eval or config.do_predict):
        raise UsageError(
            "nothing to do: add --do_train, --do_eval or --do_predict and their files, or type "
            "bash train.sh; python main.py --help lists all flags."
        )
    if not config.model_name_or_path:
        raise UsageError(
            "--model_name_or_path is missing; give a directory or hub id, such as THUDM/chatglm-6b "
            "or ptuning/nano/weights."
        )
    if not config.output_dir:
        raise UsageError("--output_dir is missing; give a directory for the results.")
    answered = config.test_file or config.validation_file
    for needed, is_wanted, file in (
        ("--train_file", config.do_train, config.train_file),
        ("--validation_file", config.do_eval, config.validation_file),
        ("--test_file or --validation_file", config.do_predict, answered),
    ):
        if is_wanted and not file:
            raise UsageError(f"{needed} is missing; give a file of rows, such as train.json.")
    if config.validates and not config.validation_file:
        raise UsageError(
            f"--eval_strategy is {config.eval_strategy} without --validation_file; give its rows, "
            "or leave --eval_strategy out."
        )
    if config.init_from and config.ptuning_checkpoint:
        raise UsageError(
            f"--init_from is {config.init_from} and --ptuning_checkpoint is "
            f"{config.ptuning_checkpoint}; training starts from one of them: leave one out."
        )
    if config.init_from and not config.do_train:
        raise UsageError(
            f"--init_from is {config.init_from} without --do_train; to score it, name it with "
            "--ptuning_checkpoint."
        )


def _check_values(config: RunConfig) -> None:
    """Check that each value is one of those allowed; None is unset."""
    config.row_format  # noqa: B018  # checks --format, --turns and --recipe
    config.checkpointing_options  # noqa: B018  # checks that they are a JSON object
    if config.checkpointing not in ("auto", "true", "false"):
        raise UsageError(
            f"--gradient_checkpointing is {config.checkpointing}; use auto, true or false."
        )
    for lowest, names in AT_LEAST.items():
        for name in names:
            value = getattr(config, name)
            if value is not None and value < lowest:
                raise UsageError(f"--{name} is {value}; use {lowest} or more.")
    for name in ("num_train_epochs", "lora_alpha", "prefix_init_std", "gpu_memory"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} is {value:g}; use a number above 0.")
    if config.max_steps != -1 and config.max_steps < 1:
        raise UsageError(
            f"--max_steps is {config.max_steps}; use 1 or more, or leave it out and give "
            "--num_train_epochs."
        )
    for name in ("layer_dropout", "lora_dropout", "label_smoothing_factor"):
        value = getattr(config, name, config.trainer_flags.get(name))
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"--{name} is {value}; use 0 to less than 1.")
    if config.quantization_bit not in (None, 0, *SUPPORTED_BITS):
        raise UsageError(
            f"--quantization_bit is {config.quantization_bit}; use 4 or 8, or leave it out."
        )
    if config.bf16 and config.fp16:
        raise UsageError("--bf16 and --fp16 are both given; the base has one dtype, so keep one.")
    if config.early_stopping_patience is not None and not config.load_best_model_at_end:
        raise UsageError(
            "--early_stopping_patience needs --load_best_model_at_end and --eval_strategy steps."
        )


def _check_tuning(config: RunConfig) -> None:
    """Check the kind of tuning, and that no flag contradicts it."""
    tuning, checkpoint = config.tuning, config.checkpoint
    if tuning is None:
        needed = "--ptuning_checkpoint DIR to score what was trained, or --tuning full the model"
        if config.do_train:
            needed = (
                "--pre_seq_len 128 to train a new prefix, --tuning lora for a LoRA adapter, or "
                "--tuning full for the whole model"
            )
        raise UsageError(f"no prefix, and no other kind of tuning: give {needed}.")
    if tuning not in TUNINGS:
        raise UsageError(f"--tuning is {tuning}; use {', '.join(TUNINGS)}.")
    if checkpoint is not None and Path(checkpoint).exists():
        found = kind_of(checkpoint)
        if found != tuning:
            raise UsageError(
                f"--tuning is {tuning}, but {config.checkpoint_flag} {checkpoint} is a {found} "
                f"checkpoint; leave --tuning out, or give another checkpoint."
            )
    if tuning == PTUNING and config.pre_seq_len is None and checkpoint is None:
        raise UsageError("--tuning is ptuning without a prefix; give --pre_seq_len 128.")
    if tuning == LORA and checkpoint is None and not config.do_train:
        raise UsageError("--tuning is lora without an adapter; give --ptuning_checkpoint DIR.")
    for owner, names in ((PTUNING, ("pre_seq_len", "prefix_projection")), (LORA, LORA_FLAGS)):
        given = [f"--{name}" for name in names if getattr(config, name) is not None]
        if given and tuning != owner:
            raise UsageError(
                f"{', '.join(given)} belong to --tuning {owner}, and --tuning is {tuning}; leave "
                "one or the other out."
            )
    if tuning == FULL and (config.quantization_bit or config.quantize_embeddings):
        raise UsageError(
            "--tuning is full with a quantized base, whose weights cannot be trained; leave "
            "--quantization_bit and --quantize_embeddings out, or use --tuning lora."
        )
    if config.lora_target_modules is not None:
        check_targets(config.lora_target_modules.split(","))
    given = [name for name in LORA_FLAGS if getattr(config, name) is not None]
    if checkpoint is not None and given:
        raise UsageError(
            f"--{given[0]} is given with {config.checkpoint_flag} {checkpoint}, whose adapter has "
            "its own; leave it out."
        )


def _check_forgetting(config: RunConfig) -> None:
    """Check --mix, --general_prompts, --preset and --prefix_init_std."""
    if config.mix is not None:
        source = parse_mix(config.mix)
        if config.do_train and not source.path.is_file():
            raise UsageError(
                f"--mix is {config.mix}, and there is no file {source.path}, seen from "
                f"{Path.cwd()}; give a file of general rows, such as general.jsonl."
            )
    prompts = config.general_prompts
    if config.do_predict and prompts and not Path(prompts).is_file():
        raise UsageError(
            f"--general_prompts is {prompts}, which is not a file; give rows such as "
            '{"prompt": "..."}, or leave it out.'
        )
    if config.preset is not None and config.tuning != PTUNING:
        raise UsageError(
            f"--preset is {config.preset} and --tuning is {config.tuning}; the presets are for a "
            "prefix: leave --preset out and give --learning_rate."
        )
    is_new = config.tuning == PTUNING and config.checkpoint is None
    if config.prefix_init_std is not None and not is_new:
        raise UsageError(
            f"--prefix_init_std is {config.prefix_init_std}, but no new prefix is made here; leave "
            "it out."
        )
