"""Every flag once: name, type, default, help with unit, and the checks that need no file.

Flag names are the published ones and every old command line is accepted: a renamed flag is
translated, a flag that has lost its meaning is accepted and named once
(`ptuning.train.legacy_flags`). None means "not given"; the help says what stands in its place.
"""

import difflib
import json
import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers import HfArgumentParser

from ptuning.model.tuned import FULL
from ptuning.train.answering_flags import AnsweringArguments
from ptuning.train.compiling import take_compiling
from ptuning.train.forgetting_flags import GeneralArguments, StartArguments, check_forgetting
from ptuning.train.legacy_flags import translate_flags, translate_keys
from ptuning.train.presets import preset_values, with_preset
from ptuning.train.processes.launch import keep_to_one_device, launch_notices, prepare_processes
from ptuning.train.recomputing_flags import take_recomputing
from ptuning.train.tuning_flags import check_tuning, find_tuning, with_tuning

RECIPES = ("corrected", "published")


def flag(default: Any, help_text: str) -> Any:
    """Declare one flag with its help."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class ModelArguments(StartArguments):
    """Which base, and what is tuned in it."""

    model_name_or_path: str | None = flag(None, "Directory of the base model, or its hub id.")
    ptuning_checkpoint: str | None = flag(
        None,
        "What to start from or to score: a directory of any way of tuning, or a prefix's "
        "pytorch_model.bin or .safetensors.",
    )
    init_from: str | None = flag(
        None,
        "Start a new training from what an old one learned, with a fresh optimiser and schedule: "
        "what --ptuning_checkpoint takes.",
    )
    pre_seq_len: int | None = flag(
        None,
        "Prefix length in prefix tokens, not in text; unset with a checkpoint reads it from there.",
    )
    prefix_projection: bool | None = flag(
        None,
        "Train the prefix through a two-layer projection; unset with a checkpoint reads it from "
        "there.",
    )
    lora_rank: int | None = flag(None, "Rank of a new LoRA adapter; unset is 8.")
    lora_alpha: float | None = flag(
        None, "LoRA's scale: B A is weighed with alpha / rank; unset is 16."
    )
    lora_dropout: float | None = flag(
        None, "Dropout on LoRA's input in training, 0 to 1; unset is 0.1."
    )
    lora_target_modules: str | None = flag(
        None,
        "Linears that get LoRA, separated by commas: query_key_value, dense, dense_h_to_4h, "
        "dense_4h_to_h; unset is query_key_value.",
    )
    quantization_bit: int | None = flag(
        None, "Weight bits of the frozen base, 4 or 8; unset keeps the checkpoint's."
    )
    quantization_backend: str = flag(
        "auto",
        "What runs quantised weights: auto, torch, triton or cpm_kernels; auto says which it took.",
    )
    quantize_embeddings: bool = flag(
        False, "Hold the word embedding, and an output head equal to it, in int8 too."
    )
    config_name: str | None = flag(None, "Configuration to use in place of the base's own.")
    tokenizer_name: str | None = flag(None, "Tokenizer to use in place of the base's own.")
    cache_dir: str | None = flag(
        None, "Folder for files fetched from a hub; unset is transformers' own."
    )
    model_revision: str = flag("main", "Branch, tag or commit of a hub model.")
    use_auth_token: bool = flag(False, "Use the token of `hf auth login` for a private hub model.")
    use_fast_tokenizer: bool = flag(
        True, "Accepted from old command lines; there is one tokenizer."
    )
    resize_position_embeddings: bool | None = flag(
        None, "Accepted from old command lines; rotary positions need no resizing."
    )

    @property
    def start_flag(self) -> str:
        """The flag that named what training starts from, or what is scored."""
        return "--ptuning_checkpoint" if self.init_from is None else "--init_from"


@dataclass
class DataArguments(GeneralArguments):
    """Which rows, which columns, how long."""

    train_file: str | None = flag(
        None, "Training rows: .json (array or one object a line), .jsonl or .csv."
    )
    validation_file: str | None = flag(
        None, "Rows for the validation loss, and to score without --test_file."
    )
    test_file: str | None = flag(None, "Rows to answer and score with --do_predict.")
    prompt_column: str | None = flag(
        None, "Column of the prompt; unset is the prefix's own, else content."
    )
    response_column: str | None = flag(
        None, "Column of the answer; unset is the prefix's own, else summary."
    )
    history_column: str | None = flag(
        None, "Column of earlier [question, answer] turns; unset for none."
    )
    source_prefix: str | None = flag(None, "Text put before every prompt.")
    max_source_length: int | None = flag(
        None,
        "Longest prompt in tokens, [gMASK] <sop> included; unset is the prefix's own, else 1024.",
    )
    max_target_length: int | None = flag(
        None, "Longest answer in tokens; unset is the prefix's own, else 128."
    )
    val_max_target_length: int | None = flag(
        None, "Longest generated answer in tokens; unset is max_target_length."
    )
    recipe: str = flag(
        "corrected",
        "'corrected', or 'published' for the old treatment of empty histories, long prompts, cut "
        "answers and sampled scores.",
    )
    max_train_samples: int | None = flag(
        None, "Use the first so many training rows; unset for all."
    )
    max_eval_samples: int | None = flag(
        None, "Use the first so many validation rows; unset for all."
    )
    max_predict_samples: int | None = flag(None, "Answer the first so many rows; unset for all.")
    num_beams: int | None = flag(None, "Beams while predicting; unset is 1, greedy.")
    compare_base: bool = flag(True, "Also answer with the prefix off and score both.")
    overwrite_cache: bool = flag(False, "Tokenise again even if the same rows are in the cache.")
    token_cache_dir: str | None = flag(
        None, "Folder of the token cache; unset is $PTUNING_CACHE, else ~/.cache/ptuning/tokens."
    )
    pad_to_max_length: bool = flag(
        False,
        "Pad every batch to max_source_length + max_target_length; for comparisons, it only costs "
        "time.",
    )
    ignore_pad_token_for_loss: bool = flag(
        True, "Accepted from old command lines; padding never has a loss."
    )
    preprocessing_num_workers: int | None = flag(
        None, "Accepted from old command lines; tokenising uses every core by itself."
    )
    lang: str | None = flag(None, "Accepted from old command lines; it never had an effect.")
    dataset_name: str | None = flag(None, "Not supported: give the rows as --train_file.")
    dataset_config_name: str | None = flag(None, "Not supported: give the rows as --train_file.")
    forced_bos_token: str | None = flag(
        None, "Accepted from old command lines; ChatGLM answers begin with <sop>."
    )


@dataclass
class TrainingArguments(AnsweringArguments):
    """transformers' own flags, with the defaults of this toolkit and some flags more."""

    tuning: str | None = flag(
        None,
        "What is trained: ptuning (a prefix), lora (an adapter) or full (the whole model); unset: "
        "what --ptuning_checkpoint holds, a prefix with --pre_seq_len, the model with --deepspeed.",
    )
    output_dir: str = flag("", "Folder for checkpoints, predictions and the report.")
    overwrite_output_dir: bool = flag(
        False, "Replace the checkpoints of an earlier run in output_dir."
    )
    early_stopping_patience: int | None = flag(
        None, "Stop after so many validations without a better loss; unset never does."
    )
    max_bad_steps: int = flag(
        5,
        "Stop after so many steps in a row whose loss or gradient is not finite or exactly 0; each "
        "is skipped. 0 never stops.",
    )
    gradient_checkpointing: str = field(  # type: ignore[assignment]  # a switch in transformers
        default="auto",
        metadata={
            "help": "Compute layers again in the backward pass, to save memory: auto (as many as "
            "the free memory asks for), true or false.",
            "nargs": "?",
            "const": "true",
        },
    )
    checkpoint_layers: int | None = flag(
        None, "Compute so many layers again; unset is auto's choice, or all with true."
    )
    gpu_memory: float | None = flag(
        None,
        "GPU memory to stay within, in GB of 10**9 bytes: checkpointed layers, the loss's chunk "
        "and the rows answered at a time are chosen to fit; unset uses what is free. python -m "
        "ptuning plan takes it without such a GPU.",
    )
    torch_compile: bool | None = field(  # type: ignore[assignment]  # a switch in transformers
        default=None,
        metadata={
            "help": "Compile the model's layers; unset does so on CUDA in bfloat16 where a run is "
            "long enough to gain by it.",
            "nargs": "?",
            "const": True,
        },
    )
    report_to: str = flag("none", "Where to log besides the screen: none, tensorboard, ...")
    save_total_limit: int | None = flag(None, "Keep at most so many checkpoints; unset for all.")
    remove_unused_columns: bool = flag(False, "Kept false: rows are already token ids.")

    def __post_init__(self) -> None:
        """Take --bf16 and --fp16 as the frozen base's dtype: no autocast is needed around it.

        The whole model is trained in float32, so there they are accelerate's or DeepSpeed's mixed
        precision, and the dtype of the answers.
        """
        if self.bf16 and self.fp16:
            raise ValueError(
                "--bf16 and --fp16 are both given; the frozen base has one dtype, so keep one."
            )
        self.recomputing, self.recomputing_options = take_recomputing(self)
        self.compiling = take_compiling(self)
        self.base_dtype: str | None = "bfloat16" if self.bf16 else "float16" if self.fp16 else None
        if self.tuning != FULL:
            self.bf16 = self.fp16 = False
        prepare_processes(self)
        super().__post_init__()
        self.visible_devices = keep_to_one_device(self)
        if self.device.type != "cuda":
            self.dataloader_pin_memory = False  # it only helps copies to a CUDA device

    @property
    def memory_target(self) -> int | None:
        """--gpu_memory in bytes."""
        return None if self.gpu_memory is None else int(self.gpu_memory * 10**9)

    @property
    def on_cpu(self) -> bool:
        """Tell whether memory is counted for a CPU; --gpu_memory means a GPU, here or not."""
        return self.device.type == "cpu" and self.gpu_memory is None


class Arguments(NamedTuple):
    """Everything a run was asked for, and what is to be said about old flags."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    notices: tuple[str, ...]


class UsageError(ValueError):
    """A run that cannot start as asked: what was given, what is needed and what to type."""


def parse_arguments(argv: list[str]) -> Arguments:
    """Read flags, or one JSON file of them, and check what needs no file; UsageError otherwise.

    `--help` leaves through argparse, with status 0.
    """
    parser = make_parser()
    try:
        if len(argv) == 1 and argv[0].endswith(".json"):
            values, notices = translate_keys(_read_json(Path(argv[0])))
            unknown = sorted(set(values) - _flag_names())
            if unknown:
                raise UsageError(f"{argv[0]} has {_unknown(unknown)}")
            added, presets = preset_values(values)
            values |= {**added, "tuning": find_tuning(values)}
            model, data, training = parser.parse_dict(values)
        else:
            given, notices = translate_flags(argv)
            given, presets = with_preset(given)
            *parsed, unknown = parser.parse_args_into_dataclasses(
                with_tuning(given), return_remaining_strings=True
            )
            if unknown:
                raise UsageError(_unknown(unknown))
            model, data, training = parsed
        _check(model, data, training)
        _check_start(model, training)
        check_tuning(model, training)
        check_forgetting(model, data, training)
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    launch = launch_notices(training, argv)
    return Arguments(model, data, training, (*notices, *presets, *launch))


class FlagParser(HfArgumentParser):
    """The parser of every flag; its complaints are UsageErrors without the usage's 200 lines."""

    def error(self, message: str) -> NoReturn:
        """Refuse in one line."""
        raise UsageError(f"{message}; python main.py --help lists all flags.")


def make_parser() -> FlagParser:
    """Return the parser of every flag."""
    parts: Any = (ModelArguments, DataArguments, TrainingArguments)
    return FlagParser(
        parts,
        prog="main.py",
        description="Tune ChatGLM-6B (P-Tuning v2, LoRA or whole), validate it, score its answers.",
        allow_abbrev=False,
    )


def check_gpu_is_here(training: TrainingArguments) -> None:
    """Refuse --gpu_memory for a run without a CUDA device; a plan takes it (UsageError)."""
    if training.gpu_memory is not None and training.device.type != "cuda":
        raise UsageError(
            f"--gpu_memory is {training.gpu_memory:g} and this run computes on {training.device}, "
            "which is not a CUDA device; leave it out, or plan for a GPU with python -m ptuning "
            "plan and the same flags."
        )


def _flag_names() -> set[str]:
    return {
        f.name for part in (ModelArguments, DataArguments, TrainingArguments) for f in fields(part)
    }


def _read_json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; give a JSON file of flags, or flags."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a JSON file of flags ({error}).") from error
    if not isinstance(values, dict):
        raise UsageError(
            f'{path}: holds a {type(values).__name__}; needed is {{"flag": value, ...}}.'
        )
    return values


def _unknown(given: list[str]) -> str:
    names = [text.lstrip("-").split("=")[0] for text in given if text.startswith("--")] or given
    hints = []
    for name in names:
        close = difflib.get_close_matches(name, _flag_names(), n=1)
        hints.append(f"--{name}" + (f" (did you mean --{close[0]}?)" if close else ""))
    return f"unknown flags: {', '.join(hints)}; python main.py --help lists all."


def _check_start(model: ModelArguments, training: TrainingArguments) -> None:
    """Make --init_from what training starts from; with --do_train both flags do the same."""
    if model.init_from is None:
        return
    if model.ptuning_checkpoint is not None:
        raise UsageError(
            f"--init_from is {model.init_from} and --ptuning_checkpoint is "
            f"{model.ptuning_checkpoint}; training starts from one of them, so leave one out."
        )
    if not training.do_train:
        raise UsageError(
            f"--init_from is {model.init_from} without --do_train; to score it, name it with "
            "--ptuning_checkpoint."
        )
    model.ptuning_checkpoint = model.init_from


def _check(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Check flags against each other."""
    if not (training.do_train or training.do_eval or training.do_predict):
        raise UsageError(
            "nothing to do: add --do_train, --do_eval or --do_predict and their files, or type "
            "bash train.sh; python main.py --help lists all flags."
        )
    if not model.model_name_or_path:
        raise UsageError(
            "--model_name_or_path is missing; give a directory or hub id, such as THUDM/chatglm-6b "
            "or ptuning/nano/weights."
        )
    if not training.output_dir:
        raise UsageError("--output_dir is missing; give a folder for the results.")
    if data.recipe not in RECIPES:
        raise UsageError(f"--recipe is {data.recipe}; use {' or '.join(RECIPES)}.")
    if data.dataset_name:
        raise UsageError(
            f"--dataset_name is {data.dataset_name}; hub data sets are not read: save the rows as "
            "a file and give it as --train_file."
        )
    if model.quantization_bit not in (None, 0, 4, 8):
        raise UsageError(
            f"--quantization_bit is {model.quantization_bit}; use 4 or 8, or leave it out."
        )
    if training.early_stopping_patience is not None and not training.load_best_model_at_end:
        raise UsageError(
            "--early_stopping_patience needs --load_best_model_at_end and --eval_strategy steps."
        )
    if training.gpu_memory is not None and not 0 < training.gpu_memory < math.inf:
        raise UsageError(
            f"--gpu_memory is {training.gpu_memory:g}; give GB above 0, such as 8, or leave it out."
        )
    for name, value, lowest in (
        ("pre_seq_len", model.pre_seq_len, 1),
        ("checkpoint_layers", training.checkpoint_layers, 0),
        ("max_source_length", data.max_source_length, 3),
        ("max_target_length", data.max_target_length, 3),
        ("max_train_samples", data.max_train_samples, 1),
        ("max_eval_samples", data.max_eval_samples, 1),
        ("max_predict_samples", data.max_predict_samples, 1),
        ("max_bad_steps", training.max_bad_steps, 0),
    ):
        if value is not None and value < lowest:
            raise UsageError(f"--{name} is {value}; use {lowest} or more.")
    for needed, wanted, file in (
        ("--train_file", training.do_train, data.train_file),
        ("--validation_file", training.do_eval, data.validation_file),
        (
            "--test_file or --validation_file",
            training.do_predict,
            data.test_file or data.validation_file,
        ),
    ):
        if wanted and not file:
            raise UsageError(f"{needed} is missing; give a .json, .jsonl or .csv file of rows.")


if __name__ == "__main__":
    sys.exit("arguments.py holds the flags of main.py; run: python main.py --help")
