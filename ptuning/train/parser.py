"""From argv to typed values by flag name: argparse over every flag, or a JSON file of flags.

transformers' own flags are read from its source, since importing it takes seconds.
"""

import argparse
import ast
import difflib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ptuning.train.flags import GROUPS, UsageError

# Old name -> today's name; the value stays the same.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a share of all steps
}
# Old switch -> today's flag and value.
REPLACED = {
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "adafactor": ("optim", "adafactor"),
}
# Old flag -> why it has no effect.
IGNORED = {
    "forced_bos_token": "ChatGLM's answers begin with <sop>",
    "dataset_config_name": "hub datasets are not read",
    "fp16_backend": "the frozen base needs no autocast",
    "fp16_opt_level": "the frozen base needs no autocast",
    "fsdp_min_num_params": "use --fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "use --fsdp_config",
    "half_precision_backend": "the frozen base needs no autocast",
    "ignore_pad_token_for_loss": "padding never counts in the loss",
    "include_inputs_for_metrics": "scores are computed from the predictions",
    "jit_mode_eval": "use --torch_compile",
    "lang": "it had no effect in the published code either",
    "logging_dir": "set the variable TENSORBOARD_LOGGING_DIR instead",
    "mp_parameters": "SageMaker's model parallelism is not supported",
    "past_index": "ChatGLM has no such output",
    "preprocessing_num_workers": "tokenization uses all cores by itself",
    "push_to_hub_organization": "use --hub_model_id",
    "ray_scope": "there is no hyperparameter search here",
    "remove_unused_columns": "rows are token ids when the trainer gets them",
    "resize_position_embeddings": "rotary positions need no resizing",
    "sharded_ddp": "fairscale is gone; a prefix is small enough for plain DDP",
    "torchdynamo": "use --torch_compile",
    "tpu_metrics_debug": "TPUs are not supported",
    "tpu_num_cores": "TPUs are not supported",
    "use_fast_tokenizer": "there is only one tokenizer",
    "use_ipex": "PyTorch includes these kernels",
    "use_legacy_prediction_loop": "there is only one prediction loop",
    "use_mps_device": "Apple's GPU is found by itself",
    "xpu_backend": "PyTorch finds it by itself",
}
# Old flag -> what to do instead.
REFUSED = {
    "config_name": "the shape is read from config.json in --model_name_or_path; leave it out",
    "dataset_name": "hub datasets are not read; save the rows as a file and give --train_file",
}
FALSE_WORDS = ("false", "no", "n", "f", "0")
TRUE_WORDS = ("true", "yes", "y", "t", "1")


class Today(NamedTuple):
    """What an old flag means today; flag None: nothing. `notice` is printed at the start."""

    flag: str | None
    value: Any
    notice: str


def translate(name: str, value: Any) -> Today:
    """Translate a flag of RENAMED, REPLACED or IGNORED with its value as typed.

    >>> translate("no_cuda", True)
    Today(flag='use_cpu', value=True, notice='--no_cuda is called --use_cpu now.')
    >>> translate("tpu_num_cores", 8).notice
    '--tpu_num_cores is ignored: TPUs are not supported.'
    """
    if name in RENAMED:
        return Today(RENAMED[name], value, f"--{name} is called --{RENAMED[name]} now.")
    if name in REPLACED:
        flag, new_value = REPLACED[name]
        is_on = str(value).lower() not in FALSE_WORDS
        notice = f"--{name} is written --{flag} {new_value} now."
        return Today(flag if is_on else None, new_value, notice)
    return Today(None, None, f"--{name} is ignored: {IGNORED[name]}.")


METAVARS = {"bool": "BOOL", "int": "N", "float": "X"}


def parse(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what was typed, by flag name, and the lines to print about old flags.

    argv holds flags, or the path of a JSON file and flags that override it. UsageError for any
    mistake; `--help` prints and raises SystemExit.
    """
    parser = make_parser()
    is_file = bool(argv) and argv[0].endswith(".json")
    empty = argparse.Namespace(notices=())
    given, unknown = parser.parse_known_args(argv[1:] if is_file else argv, empty)
    if unknown:
        raise UsageError(parser.unknown(unknown))
    typed = vars(given)
    notices = list(typed.pop("notices"))
    if is_file:
        from_file, more = _read_json(Path(argv[0]), parser)
        typed, notices = from_file | typed, [*more, *notices]
    for name, reason in REFUSED.items():
        value = typed.pop(name, None)
        if value and value != typed.get("model_name_or_path"):
            raise UsageError(f"--{name} is {value}, which is not supported: {reason}.")
    return typed, notices


class FlagParser(argparse.ArgumentParser):
    """argparse whose complaints are one-line UsageErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError in place of printing 200 lines of usage."""
        message = re.sub(r"^argument (--\S+?)(/\S+)?: expected .*", r"\1 has no value", message)
        wrong = re.match(r"argument (--[\w-]+).*: invalid (\w+) value: '(.*)'$", message)
        if wrong:
            needed = {"int": "a whole number", "float": "a number"}.get(wrong[2], "true or false")
            message = f"{wrong[1]} is {wrong[3]}; give {needed}"
        message = message.removeprefix("argument ")
        raise UsageError(f"{message}; python main.py --help lists all flags.")

    def unknown(self, given: Sequence[str]) -> str:
        """Say which words are no flags, and which flags were probably meant."""
        words = [text.split("=")[0] for text in given if text.startswith("--")]
        if not words:
            where = "; a JSON file of flags goes first" if given[0].endswith(".json") else ""
            return f"{given[0]} is not a flag{where}; python main.py --help lists all flags."
        hints = []
        for word in words:
            options = self._option_string_actions
            close = [option for option in options if option.startswith(word)]
            close = close or difflib.get_close_matches(word, options, n=1)
            hints.append(word + (f" (did you mean {close[0]}?)" if close else ""))
        return f"unknown flags: {', '.join(hints)}; python main.py --help lists all flags."


class _OldFlag(argparse.Action):
    """Takes a flag of an old command line as `translate` says."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        today = translate(self.dest, values)
        namespace.notices = (*namespace.notices, today.notice)
        if today.flag is not None:
            setattr(namespace, today.flag, values if self.dest in RENAMED else today.value)


class Flag(NamedTuple):
    """A flag as a parser needs it; `kind` is its annotation, as text."""

    name: str
    kind: str
    default: Any  # None where transformers computes it
    help: str
    options: Mapping[str, Any]  # argparse's nargs and const


def make_parser() -> FlagParser:
    """Return the parser of every flag; its namespace holds what was typed and nothing else."""
    parser = FlagParser(
        prog="main.py",
        usage="python main.py FLAGS    or    python main.py FLAGS.json [FLAGS]",
        description="Tune ChatGLM-6B (P-Tuning v2, LoRA or whole), validate it, score its answers. "
        "bash train.sh calls it with everything set.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for group in GROUPS:
        section = parser.add_argument_group(str(group.__doc__).strip().rstrip("."))
        for flag in declared_flags(group):
            _add(section, flag)
    known = {f.name for group in GROUPS for f in fields(group)}
    section = parser.add_argument_group("transformers' other training flags")
    others = {flag.name: flag for flag in transformers_flags() if flag.name not in known}
    for flag in others.values():
        # older transformers releases still declare these
        if flag.name not in {*IGNORED, *RENAMED, *REPLACED}:
            _add(section, flag)
    kinds = {flag.name: flag for group in GROUPS for flag in declared_flags(group)} | others
    for old, new in RENAMED.items():
        _add(parser, kinds[new]._replace(name=old, help=argparse.SUPPRESS), action=_OldFlag)
    for name in REPLACED:
        _add(parser, Flag(name, "bool", None, argparse.SUPPRESS, {}), action=_OldFlag)
    for name in IGNORED:
        more = {"nargs": "*"}
        _add(parser, Flag(name, "str", None, argparse.SUPPRESS, more), action=_OldFlag)
    for name in REFUSED:
        _add(parser, Flag(name, "str", None, argparse.SUPPRESS, {}))
    return parser


def declared_flags(group: type) -> list[Flag]:
    """Return the flags that a class of `ptuning.train.flags` declares."""
    flags = []
    for each in fields(group):
        more = {name: value for name, value in each.metadata.items() if name != "help"}
        kind = each.type.__name__ if isinstance(each.type, type) else str(each.type)
        flags.append(Flag(each.name, kind, each.default, each.metadata["help"], more))
    return flags


@cache
def transformers_flags() -> tuple[Flag, ...]:
    """Return the flags of transformers' training arguments, read from its source."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None, "pyproject.toml requires it"
    folder = Path(str(spec.origin)).parent
    flags: list[Flag] = []
    for file, name in (
        ("training_args.py", "TrainingArguments"),
        ("training_args_seq2seq.py", "Seq2SeqTrainingArguments"),
    ):
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
        flags += _fields_in(found)
    return tuple(flags)


def _fields_in(tree: ast.ClassDef) -> Iterator[Flag]:
    """Yield the dataclass fields that a command line can hold."""
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        if not re.search(r"\b(bool|int|float|str|dict|list)\b", kind):
            continue
        default, text = None, ""
        for keyword in getattr(node.value, "keywords", []):
            if keyword.arg == "default" and isinstance(keyword.value, ast.Constant):
                default = keyword.value.value
            elif keyword.arg == "metadata":
                strings = (n.value for n in ast.walk(keyword.value) if isinstance(n, ast.Constant))
                text = max((s for s in strings if isinstance(s, str)), key=len, default="")
        yield Flag(node.target.id, kind, default, text, {})


def _add(section: Any, flag: Flag, **more: Any) -> None:
    """Add a flag to a parser, and its spelling with hyphens, which the help leaves out."""
    kinds = set(re.findall(r"\w+", flag.kind))
    metavar = next((name for kind, name in METAVARS.items() if kind in kinds), "TEXT")
    options: dict[str, Any] = {"dest": flag.name, "metavar": metavar, **flag.options, **more}
    if "bool" in kinds and "nargs" not in options:
        options |= {"nargs": "?", "const": True}
        options |= {} if "str" in kinds else {"type": _bool}
    elif "tuple" in kinds or ("list" in kinds and "str" not in flag.kind.replace("list[str]", "")):
        options |= {"nargs": "+"}
    elif "str" not in kinds and "dict" not in kinds:
        options["type"] = float if "float" in kinds else int
    text = flag.help
    if text is not argparse.SUPPRESS:
        has_default = flag.default not in (None, False, "", -1) and "Default" not in text
        text = text.replace("%", "%%") + (f" Default: {flag.default}." if has_default else "")
    section.add_argument(f"--{flag.name}", help=text, **options)
    if "_" in flag.name:
        section.add_argument(f"--{flag.name.replace('_', '-')}", help=argparse.SUPPRESS, **options)
    if flag.default is True:
        for off in {f"--no_{flag.name}", f"--no-{flag.name.replace('_', '-')}"}:
            section.add_argument(
                off, dest=flag.name, action="store_const", const=False, help=argparse.SUPPRESS
            )


def _bool(text: str) -> bool:
    """Read a switch's value; ValueError for another word."""
    if text.lower() not in (*TRUE_WORDS, *FALSE_WORDS):
        raise ValueError(text)
    return text.lower() in TRUE_WORDS


def _read_json(path: Path, parser: FlagParser) -> tuple[dict[str, Any], list[str]]:
    """Return the flags in a JSON file by name, and the notices on old ones; null leaves one out."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; give a JSON file of flags, or flags."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a JSON file of flags ({error}).") from error
    if not isinstance(content, dict):
        raise UsageError(
            f'{path} holds a {type(content).__name__}; it must hold {{"flag": value, ...}}.'
        )
    actions = parser._option_string_actions
    unknown = sorted(name for name in content if f"--{name}" not in actions)
    if unknown:
        raise UsageError(f"{path} has {parser.unknown([f'--{name}' for name in unknown])}")
    values: dict[str, Any] = {}
    notices = []
    for name, value in content.items():
        if value is None:
            continue
        if name in RENAMED or name in REPLACED or name in IGNORED:
            today = translate(name, value)
            notices.append(today.notice)
            name, value = today.flag or "", today.value
        if name:
            action = actions[f"--{name}"]
            is_off = action.const is False  # --no_compare_base
            values[action.dest] = not value if is_off else _converted(action, value, path)
    return values, notices


def _converted(action: argparse.Action, value: Any, path: Path) -> Any:
    """Return a JSON value with the type of its flag; UsageError for one that has another."""
    kind: Any = action.type
    try:
        if kind is None or isinstance(value, bool):
            if kind in (int, float):
                raise ValueError(value)
            is_word = isinstance(value, bool) and action.const is None  # as --resume... true
            return str(value).lower() if is_word else value
        converted = kind(str(value)) if kind is _bool else kind(value)
    except (ValueError, TypeError) as error:
        needed = {int: "a whole number", float: "a number"}.get(kind, "true or false")
        raise UsageError(f"{path}: {action.dest} is {value!r}; give {needed}.") from error
    if kind is int and converted != float(value):
        raise UsageError(f"{path}: {action.dest} is {value!r}; give a whole number.")
    return converted
