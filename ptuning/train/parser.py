"""From argv to typed values by flag name: argparse over every flag, or a JSON file of flags.

transformers' own flags are read from its source, since importing it takes seconds. Flags of the
published scripts and of transformers 4.27, for which they were written, are renamed, replaced,
ignored with a notice, or refused.
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
    "preprocessing_num_workers": "tokenization already uses all cores",
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
    "use_mps_device": "Apple's GPU is detected automatically",
    "xpu_backend": "PyTorch detects it automatically",
}
# Old flag -> what to do instead.
REFUSED = {
    "config_name": "the shape is read from config.json in --model_name_or_path; leave it out",
    "dataset_name": "hub datasets are not read; save the rows as a file and give --train_file",
}
FALSE_WORDS = ("false", "no", "n", "f", "0")
TRUE_WORDS = ("true", "yes", "y", "t", "1")
SEE_HELP = "python main.py --help lists all flags."
METAVARS = {"bool": "BOOL", "int": "N", "float": "X"}


def parse(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what was typed, by flag name, and the notices on old flags.

    argv holds flags, or the path of a JSON file and flags that override it. UsageError for any
    mistake; `--help` prints and raises SystemExit.
    """
    parser, words, given = make_parser(), [*argv], argparse.Namespace(notices=[])
    if argv and argv[0].endswith(".json"):
        path = Path(words.pop(0))
        try:
            parser.read_file(path, given)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    parser.read(words, given)
    typed = vars(given)
    notices = typed.pop("notices")
    for name, reason in REFUSED.items():
        value = typed.pop(name, None)
        if value and value != typed.get("model_name_or_path"):
            raise UsageError(f"--{name} is {value}, which is not supported: {reason}.")
    return typed, notices


class FlagParser(argparse.ArgumentParser):
    """argparse that returns only what was typed and reports a mistake as a one-line UsageError."""

    def read(self, words: Sequence[str], given: argparse.Namespace) -> None:
        """Set the values of the words by flag name, and add the notices on old flags."""
        _, unknown = self.parse_known_args(words, given)
        if unknown:
            raise UsageError(self._explain_unknown(unknown))

    def read_file(self, path: Path, given: argparse.Namespace) -> None:
        """Do as `read` for a JSON file of values by flag name; null leaves a flag out."""
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UsageError(f"{error.strerror}; give a JSON file of flags, or flags.") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"not a JSON file of flags ({error}).") from error
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise UsageError(f'it holds a {kind}; it must hold {{"flag": value, ...}}.')
        actions = self._option_string_actions
        if unknown := sorted(f"--{name}" for name in content if f"--{name}" not in actions):
            raise UsageError(self._explain_unknown(unknown))
        words: list[str] = []
        for name, value in content.items():
            option = f"--{name}"
            action = actions[option]
            if isinstance(value, list | dict):  # no word of a command line can say it
                if isinstance(action, _OldFlag):
                    action(self, given, value)
                elif action.type is not None or action.nargs == 0:
                    kind = getattr(action.type, "__name__", "")
                    raise UsageError(f"--{name} is {json.dumps(value)}; give {needed_for(kind)}.")
                else:
                    setattr(given, action.dest, value)
            elif action.nargs == 0:  # --no_compare_base
                words += [option] * (_to_word(value).lower() in TRUE_WORDS)
            elif value is not None:
                words.append(f"{option}={_to_word(value)}")
        self.read(words, given)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError in place of printing 200 lines of usage."""
        message = re.sub(r"^argument (--\S+?)(/\S+)?: expected .*", r"\1 has no value", message)
        wrong = re.match(r"argument (--[\w-]+).*: invalid (\w+) value: '(.*)'$", message)
        if wrong:
            message = f"{wrong[1]} is {wrong[3]}; give {needed_for(wrong[2])}"
        raise UsageError(f"{message.removeprefix('argument ')}; {SEE_HELP}")

    def _explain_unknown(self, given: Sequence[str]) -> str:
        """Say which words are no flags, and which flags were probably meant."""
        words = [text.split("=")[0] for text in given if text.startswith("--")]
        if not words:
            where = "; a JSON file of flags goes first" if given[0].endswith(".json") else ""
            return f"{given[0]} is not a flag{where}; {SEE_HELP}"
        hints, options = [], self._option_string_actions
        for word in words:
            close = [option for option in options if option.startswith(word)]
            close = close or difflib.get_close_matches(word, options, n=1)
            hints.append(word + (f" (did you mean {close[0]}?)" if close else ""))
        return f"unknown flags: {', '.join(hints)}; {SEE_HELP}"


def needed_for(kind: str) -> str:
    """Say what to give for a flag of a type, by the type's name."""
    return {"int": "a whole number", "float": "a number"}.get(kind, "true or false")


def _to_word(value: Any) -> str:
    """Return a JSON value as it is typed on a command line.

    >>> _to_word(True), _to_word(3.0), _to_word("a b")
    ('true', '3', 'a b')
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


class _OldFlag(argparse.Action):
    """Sets the flag that replaces an old one, and adds the notice that says so."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        old = self.dest
        if old in RENAMED:
            notice = f"--{old} is called --{RENAMED[old]} now."
            setattr(namespace, RENAMED[old], values)
        elif old in REPLACED:
            flag, value = REPLACED[old]
            notice = f"--{old} is written --{flag} {value} now."
            if values:
                setattr(namespace, flag, value)
        else:
            notice = f"--{old} is ignored: {IGNORED[old]}."
        namespace.notices.append(notice)


class Flag(NamedTuple):
    """A flag as a parser needs it; `kind` is its annotation, as text."""

    name: str
    kind: str
    default: Any = None  # None where transformers computes it
    help: str = argparse.SUPPRESS
    options: Mapping[str, Any] = {}  # argparse's nargs and const


def make_parser() -> FlagParser:
    """Return the parser of every flag."""
    parser = FlagParser(
        prog="main.py",
        usage="python main.py FLAGS    or    python main.py FLAGS.json [FLAGS]",
        description="Tune ChatGLM-6B (P-Tuning v2, LoRA or the whole model), validate it, score "
        "its answers. bash train.sh calls it with everything set.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    flags: dict[str, Flag] = {}
    for group in GROUPS:
        section = parser.add_argument_group(str(group.__doc__).strip().rstrip("."))
        for flag in declared_flags(group):
            flags[flag.name] = flag
            _add(section, flag)
    section = parser.add_argument_group("transformers' other training flags")
    for flag in transformers_flags():
        # older transformers releases still declare some old flags
        if flag.name not in {*flags, *IGNORED, *RENAMED, *REPLACED}:
            flags[flag.name] = flag
            _add(section, flag)
    for old, new in RENAMED.items():
        _add(parser, flags[new]._replace(name=old, help=argparse.SUPPRESS), action=_OldFlag)
    for name in REPLACED:
        _add(parser, Flag(name, "bool"), action=_OldFlag)
    for name in IGNORED:
        _add(parser, Flag(name, "str", options={"nargs": "*"}), action=_OldFlag)
    for name in REFUSED:
        _add(parser, Flag(name, "str"))
    return parser


def declared_flags(group: type) -> list[Flag]:
    """Return the flags that a class of `ptuning.train.flags` declares."""
    flags = []
    for each in fields(group):
        options = {name: value for name, value in each.metadata.items() if name != "help"}
        kind = each.type.__name__ if isinstance(each.type, type) else str(each.type)
        flags.append(Flag(each.name, kind, each.default, each.metadata["help"], options))
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
        yield Flag(node.target.id, kind, default, text)


def _add(section: Any, flag: Flag, **more: Any) -> None:
    """Add a flag and its hyphenated spelling, which the help leaves out, to a parser."""
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
    hyphenated = flag.name.replace("_", "-")
    if hyphenated != flag.name:
        section.add_argument(f"--{hyphenated}", help=argparse.SUPPRESS, **options)
    if flag.default is True:
        for off in {f"--no_{flag.name}", f"--no-{hyphenated}"}:
            section.add_argument(
                off, dest=flag.name, action="store_const", const=False, help=argparse.SUPPRESS
            )


def _bool(text: str) -> bool:
    """Read a switch's value; ValueError for another word."""
    if text.lower() not in (*TRUE_WORDS, *FALSE_WORDS):
        raise ValueError(text)
    return text.lower() in TRUE_WORDS
