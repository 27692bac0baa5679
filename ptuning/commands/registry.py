"""The commands and their flags; without torch, so that --help and argument errors return at once.

A new command is an entry in COMMANDS, a function that adds its flags, and a function in this
package that takes the parsed arguments and returns the exit status. Its module is imported only
when the command runs.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ptuning.commands import asking_flags
from ptuning.storage import SUPPORTED_BITS
from ptuning.tunings.artefact import EXPORT_FORMATS

DEFAULT_PICTURE = Path("output/data-check.png")
NO_PICTURE = "none"
KEY_VARIABLE = "PTUNING_API_KEY"
PASSWORD_VARIABLE = "PTUNING_WEB_PASSWORD"


class Command(NamedTuple):
    """A command's name, one line of help, its flags, and what runs it.

    function is "module:function" in this package. takes_main_flags: the command's flags are those
    of main.py, and the function gets them as `arguments.config`.
    """

    name: str
    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    function: str
    takes_main_flags: bool = False

    def load(self) -> Callable[[argparse.Namespace], int]:
        """Import the command's module and return its function."""
        module, _, name = self.function.partition(":")
        function: Callable[[argparse.Namespace], int] = getattr(
            importlib.import_module(f"ptuning.commands.{module}"), name
        )
        return function


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="directory or hub id of a ChatGLM-6B checkpoint, or nano"
    )
    parser.add_argument("destination", metavar="DST", help="directory to write; new or empty")
    parser.add_argument(
        "--quantization_bit",
        type=int,
        choices=SUPPORTED_BITS,
        help="bits of the layers' weights; unset keeps them as they are stored",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", metavar="PREFIX", help="directory or file of a trained prefix")
    parser.add_argument("destination", metavar="DST", help="directory to write into")
    parser.add_argument(
        "--format",
        dest="form",
        required=True,
        choices=EXPORT_FORMATS,
        help="published: pytorch_model.bin; peft: an adapter; kv: keys and values per layer",
    )
    parser.add_argument(
        "--model_name_or_path",
        metavar="DIRECTORY",
        help="the base; needed only for a published prefix of another size than ChatGLM-6B's",
    )


def _data(parser: argparse.ArgumentParser) -> None:
    from ptuning.data.checking.findings import NOTICES, PROBLEMS  # needs numpy

    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="report rows, encodings, repeats, overlaps, odd text and lengths of files",
        description="Report what is in data files, what is wrong with it and what to do.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            [
                "problems, on which --strict exits with 1:",
                *(f"  {kind:<20}{row.meaning}" for kind, row in PROBLEMS.items()),
                "",
                "notices, on which it does not:",
                *(f"  {kind:<20}{row.meaning}" for kind, row in NOTICES.items()),
                "",
                "exit status: 2 when a file has no row that can be used, with --strict 1 when",
                "there is a problem, else 0.",
            ]
        ),
    )
    check.add_argument(
        "files", nargs="+", metavar="FILE", help="files of rows, or patterns such as 'data/*.json'"
    )
    check.add_argument("--strict", action="store_true", help="exit with 1 when there is a problem")
    _add_row_flags(check)
    check.add_argument(
        "--picture",
        metavar="FILE",
        help=f"length histograms, .png or .svg; unset is {DEFAULT_PICTURE}, "
        f"{NO_PICTURE} draws nothing",
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="write everything found here")
    _data_convert(actions)


def _data_convert(actions: Any) -> None:
    """Add the flags of `data convert`; actions is what argparse's add_subparsers returns."""
    from ptuning.data.prompts import Template

    convert = actions.add_parser(
        "convert",
        help="write files of any known format as JSON lines of prompt, response and history",
        description="Convert every row of data files of any known format to JSON lines {id, "
        "prompt, response, history, source, meta}, or reject it with its line and the reason.",
        epilog="Exit status: 0 when rows were written, with --strict 1 when a row was rejected "
        "too; 2 when nothing was written.",
    )
    convert.add_argument(
        "files",
        nargs="*",
        metavar="SRC",
        help="files, or patterns such as 'data/*.jsonl': all that main.py --train_file reads",
    )
    convert.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl to write, whole or not at all",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    convert.add_argument(
        "--strict", action="store_true", help="exit with 1 when a row was rejected"
    )
    _add_row_flags(convert)
    convert.add_argument(
        "--template",
        choices=get_args(Template),
        default="plain",
        help="how prompts are written: plain, as read; round, earlier turns written out as "
        "[Round n] and history []; alpaca-en, the published Alpaca prompt; alpaca-zh, the same in "
        "Chinese: plain",
    )
    convert.add_argument(
        "--keep_unanswered",
        action="store_true",
        help='keep rows without an answer, with the response "", to be answered by --do_predict',
    )
    convert.add_argument(
        "--allow_repeated_prompts",
        action="store_true",
        help="convert even if rows have the same prompt only because a column is not used",
    )
    convert.add_argument(
        "--mix",
        metavar="FILE:SHARE,...",
        help="in place of SRC: draw rows of files in these shares, such as a.jsonl:0.7,b.jsonl:0.3",
    )
    convert.add_argument(
        "--total",
        type=int,
        metavar="N",
        help="rows that --mix draws; unset: the most without drawing a row twice",
    )
    convert.add_argument("--seed", type=int, default=42, help="seed of sampling and order: 42")


def _add_row_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of main.py that say what rows look like and how they become tokens."""
    from ptuning.data.prompts import FormatName, Turns

    parser.add_argument(
        "--format",
        choices=get_args(FormatName),
        default="auto",
        help="what rows look like; auto tells by the columns and prints what it found: auto",
    )
    parser.add_argument(
        "--turns",
        choices=get_args(Turns),
        default="all",
        help="answers to take from a conversation: all, a row each, or last: all",
    )
    for role, meaning in (
        ("prompt", "column of the prompt"),
        ("input", "column put after the prompt, on a new line"),
        ("response", "column of the answer"),
        ("history", "column of earlier [question, answer] turns"),
    ):
        parser.add_argument(
            f"--{role}_column", metavar="NAME", help=f"{meaning}; unset: found by --format"
        )
    parser.add_argument(
        "--max_source_length", type=int, default=64, help="longest prompt in tokens: 64"
    )
    parser.add_argument(
        "--max_target_length", type=int, default=64, help="longest answer in tokens: 64"
    )
    parser.add_argument(
        "--model_name_or_path",
        metavar="MODEL",
        help="base whose tokenizer counts, directory or hub id; unset is the embedded nano model",
    )
    parser.add_argument(
        "--tokenizer_name", metavar="MODEL", help="tokenizer in place of the base's"
    )


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="the flags of the run"
    )
    parser.usage = "%(prog)s [-h] FLAGS"
    parser.epilog = (
        "FLAGS are those of main.py, all of them: python main.py --help lists them, and README.md "
        "has a table. Example: python -m ptuning plan --do_train --train_file train.json "
        "--model_name_or_path THUDM/chatglm-6b --pre_seq_len 128 --output_dir output --gpu_memory 8"
    )


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 when something needed is missing"
    )


def _chat(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy decoding")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling threshold")
    parser.add_argument("--seed", type=int, help="random seed; unset: a new one each time")


def _serve(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    _add_address_flags(parser, port=8000)
    asking_flags.add_serving_flags(parser)
    parser.add_argument(
        "--api_key",
        metavar="SECRET",
        help="key that clients must send; needed for any address but this machine's own. Unset: "
        f"the variable {KEY_VARIABLE}",
    )
    parser.add_argument("--max_rows", type=int, default=32, help="answers decoded together")
    parser.add_argument("--max_queue", type=int, default=128, help="requests that may wait")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds a request may take, waiting included"
    )
    parser.add_argument(
        "--max_body_kib", type=int, default=256, help="largest request body, in KiB"
    )


def _web(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    _add_address_flags(parser, port=7860)
    asking_flags.add_serving_flags(parser)
    parser.add_argument(
        "--password",
        metavar="SECRET",
        help="asked of every visitor; needed for any address but this machine's own. Unset: the "
        f"variable {PASSWORD_VARIABLE}",
    )


def _add_address_flags(parser: argparse.ArgumentParser, *, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=port, help="port to listen on")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of chat, serve and web: the base, its prefixes, and how the base is loaded."""
    parser.add_argument(
        "--prefix",
        action="append",
        default=[],
        metavar="[NAME=]DIRECTORY",
        help="a trained prefix and the name it is asked for by, unset: its directory's; may be "
        "given many times. Unset, with --model unset too: what was tuned last under output/, else "
        "the nano model alone",
    )
    parser.add_argument(
        "--model",
        metavar="DIRECTORY",
        help="base model, a directory, hub id or nano, or the directory of a LoRA adapter or of a "
        "model that was tuned whole; unset: what the first prefix was trained on",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; unset: a CUDA device if any")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the base; unset: float32 on the CPU, half precision elsewhere",
    )
    parser.add_argument(
        "--quantization_bit",
        type=int,
        choices=SUPPORTED_BITS,
        help="quantise the base as it is read; unset: as it is stored",
    )


COMMANDS = (
    Command(
        "convert",
        "Write a checkpoint as safetensors, quantised if asked",
        _convert,
        "export:convert",
    ),
    Command(
        "export",
        "Write a trained prefix in a format that other programs read",
        _export,
        "export:export",
    ),
    Command(
        "data",
        "Check data files before training, or convert any format to JSON lines",
        _data,
        "data:run",
    ),
    Command(
        "answer",
        "Have a base model answer a file of prompts: general rows for --mix",
        asking_flags.add_answer,
        "answer:run",
    ),
    Command(
        "choose-checkpoint",
        "Find the checkpoint of a run that answers dev prompts best",
        asking_flags.add_choose_checkpoint,
        "choose_checkpoint:run",
    ),
    Command(
        "generate",
        "Have a model write new instruction data, in Chinese or English",
        asking_flags.add_generate,
        "generate:run",
    ),
    Command(
        "select",
        "Select the rows worth training on: clean, unlike each other, scored",
        asking_flags.add_select,
        "select:run",
    ),
    Command(
        "api",
        "Turn questions into API calls: rows to train on, new questions, answers, scores",
        asking_flags.add_api,
        "api_calls:run",
    ),
    Command(
        "plan",
        "Estimate memory and time of a main.py run before any weight is loaded",
        _plan,
        "plan:run",
        takes_main_flags=True,
    ),
    Command(
        "doctor",
        "Show versions, devices and back ends, and what each command would pick",
        _doctor,
        "doctor:run",
    ),
    Command(
        "chat",
        "Chat with a trained prefix, or with the base, in the terminal or over a pipe",
        _chat,
        "serving:chat",
    ),
    Command(
        "serve",
        "Serve any number of prefixes on one base over OpenAI's HTTP API",
        _serve,
        "serving:serve",
    ),
    Command(
        "web",
        "Open a page to chat with a prefix and the base, side by side",
        _web,
        "serving:web",
    ),
)
