"""Flags of the commands that ask a model: generate, select, api, choose-checkpoint, answer."""

import argparse
from pathlib import Path
from typing import Any

from ptuning.storage import SUPPORTED_BITS

OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"
CHECKPOINT_METRICS = ("rougeL", "bleu", "judge")  # of ptuning.scoring.ranking
TASK_TEMPLATES = ("zh", "en", "adgen", "magpie")  # of ptuning.instruct.templates
API_FAMILIES = ("torchhub", "huggingface", "tensorflow", "generic")  # of ptuning.apicalls.cards


def add_answer(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `answer`."""
    parser.add_argument("prompts", metavar="FILE", type=Path, help="rows with a column `prompt`")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help=".jsonl to make")
    parser.add_argument(
        "--model", default="nano", help="the base: a directory or hub id; unset: nano"
    )
    parser.add_argument(
        "--quantization_bit", type=int, choices=SUPPORTED_BITS, help="quantise it first"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer in tokens")
    parser.add_argument("--batch_size", type=int, default=16, help="rows answered at a time")


def add_choose_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `choose-checkpoint`."""
    parser.description = (
        f"{parser.description} Every checkpoint of RUN answers the dev prompts greedily; they are "
        "ranked by their answers, next to the validation loss. The same command again continues."
    )
    parser.epilog = "Exit status: 1 when a checkpoint is damaged and was skipped, else 0."
    parser.add_argument("run", metavar="RUN", type=Path, help="--output_dir of a main.py run")
    parser.add_argument(
        "--dev",
        metavar="FILE",
        type=Path,
        required=True,
        help="rows with reference answers, in any format of data files; about 50",
    )
    parser.add_argument(
        "--metric",
        choices=CHECKPOINT_METRICS,
        default="rougeL",
        help="what decides; judge: grades from 1 to 6 by --endpoint, without references: rougeL",
    )
    parser.add_argument(
        "--copy", action="store_true", help="make RUN itself hold the best prefix or adapter"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="rows answered at a time: 16")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="longest answer in tokens; unset: the run's --max_target_length",
    )
    parser.add_argument(
        "--model_name_or_path", metavar="MODEL", help="the base; unset: the run's own"
    )
    parser.add_argument(
        "--quantization_bit",
        type=int,
        choices=SUPPORTED_BITS,
        help="quantise the base as it is read; unset: as in the run",
    )
    add_endpoint_flags(parser, "the judge of --metric judge")


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `generate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        f"{parser.description}\n\nA task is kept if it is complete, in the right language and "
        "unlike all others.\nJSON answers are read too; one without an Input label is dropped.\n"
        "The same command again continues a run."
    )
    parser.epilog = (
        "Exit status: 0 when --num rows are there, 1 when fewer could be made.\n"
        "Examples:\n"
        "  python -m ptuning generate --template adgen --out new.jsonl --num 20\n"
        "  python -m ptuning generate --out new.jsonl --endpoint http://localhost:8000 --model base"
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help=".jsonl of rows to write")
    add("--num", type=int, default=200, metavar="N", help="rows to keep: 200")
    add(
        "--template",
        choices=TASK_TEMPLATES,
        default="zh",
        help="what is asked for: tasks in Chinese (zh) or English (en), products with copy "
        "(adgen), or questions that the model makes up by itself (magpie, at an endpoint by --api "
        "completions): zh",
    )
    add(
        "--seeds",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="tasks to show as examples, in any format of data files or Self-Instruct's; unset: "
        "those of the template",
    )
    add("--alpaca_json", type=Path, metavar="FILE", help="also write instruction, input and output")
    _add_source_flags(parser)
    more = parser.add_argument_group("prompts and sampling")
    more.add_argument("--examples", type=int, default=3, metavar="N", help="seeds in a prompt: 3")
    _add_both(
        more,
        "--machine_examples",
        type=int,
        default=1,
        metavar="N",
        help="earlier new tasks in a prompt, in addition: 1",
    )
    _add_both(
        more,
        "--tasks_per_request",
        type=int,
        metavar="N",
        help="new tasks that a prompt asks for; unset: by --max_new_tokens, at most 20",
    )
    more.add_argument(
        "--topics", type=Path, metavar="FILE", help="topics, one on each line; a prompt names one"
    )
    _add_sampling_flags(more)
    more.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling threshold: 1")
    more.add_argument("--max_requests", type=int, metavar="N", help="end after so many requests")
    more.add_argument(
        "--rouge_threshold",
        type=float,
        default=0.7,
        metavar="F",
        help="ROUGE-L above which a task is a duplicate of a seed or a row: 0.7",
    )
    more.add_argument(
        "--blocklist",
        type=Path,
        metavar="FILE",
        help="words that an instruction may not contain, one on each line; unset: words for what "
        "text cannot do",
    )


def add_select(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `select`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        f"{parser.description}\n\nSteps: clean, drop duplicates, drop what is in --against, score, "
        "pick the best within\nquotas. The same command again continues scoring. Next to --out are "
        "a report, every row's\nverdict, and as many rows by chance and by length, to compare with."
    )
    parser.epilog = (
        "Exit status: 0 when rows were selected, 1 when none were left.\n"
        "Examples:\n"
        "  python -m ptuning select new.jsonl --out best.jsonl --budget 200 --against dev.json\n"
        "  python -m ptuning select --out best.jsonl --explain new:17"
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="files of rows in any format, or patterns")
    add("--out", type=Path, required=True, metavar="FILE", help=".jsonl of rows to write")
    add("--budget", type=int, default=1000, metavar="N", help="rows to select: 1000")
    add("--skip", nargs="+", choices=("clean", "duplicates"), default=[], help="steps to leave out")
    add(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="rows to evaluate on: left out",
    )
    add("--seed", type=int, default=42, help="of --score none and the rows by chance: 42")
    add("--explain", metavar="ID", help="only say what became of a row of the last run")
    score = parser.add_argument_group("scores")
    score.add_argument(
        "--score",
        choices=("ifd", "target", "length", "judge", "none"),
        default="ifd",
        help="ifd: how hard the answer still is with its prompt, by the base's loss; target: "
        "likeness to the rows of --like; length: long answers; judge: a grade by --endpoint; none: "
        "by chance: ifd",
    )
    score.add_argument(
        "--like", nargs="+", default=[], metavar="FILE", help="rows that --score target looks for"
    )
    score.add_argument(
        "--model_name_or_path",
        metavar="MODEL",
        help="base that scores, directory or hub id; unset: what --prefix was trained on, else the "
        "nano model",
    )
    score.add_argument(
        "--prefix",
        type=Path,
        metavar="DIRECTORY",
        help="score with a briefly trained prefix: to a base that knows nothing of a task, none of "
        "its prompts is a help",
    )
    score.add_argument(
        "--quantization_bit", type=int, choices=SUPPORTED_BITS, help="quantise it as it is read"
    )
    choice = parser.add_argument_group("the choice")
    choice.add_argument(
        "--quota",
        choices=("source", "none"),
        default="source",
        help="share the budget among sources (the column `source`, else the file) by the "
        "temperature-th root of their sizes, or not: source",
    )
    choice.add_argument(
        "--quota_temperature", type=float, metavar="F", help="1 is proportional, more is flatter: 3"
    )
    choice.add_argument(
        "--embed",
        choices=("base", "minhash", "none"),
        help="how rows are compared with the picked ones: by the base's states, by words or not at "
        "all; unset: base with --score ifd and target, else none",
    )
    choice.add_argument(
        "--max_similarity",
        type=float,
        metavar="F",
        help="skip rows that are more similar to a picked one: with base a cosine above F (0.9), "
        "with minhash a ROUGE-L of F or more, 0.7 at least (0.7)",
    )
    add_endpoint_flags(parser, "the judge of --score judge")


def add_api(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `api` with their flags."""
    parser.epilog = "Example: python -m ptuning api prepare --cards api.jsonl --out rows.jsonl"
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text, use, add_flags in (
        (
            "prepare",
            "Make rows to train on from questions and their calls",
            "prompts show them as documents",
            _api_prepare,
        ),
        (
            "write",
            "Have a model write questions for each card, with their calls",
            "a request shows one of them",
            _api_write,
        ),
        (
            "ask",
            "Answer a question with an API call, which is checked and never executed",
            "the best ones are shown, and the call is checked against all",
            _api_ask,
        ),
        ("eval", "Judge answers by references", "every call is checked against them", _api_eval),
    ):
        action = actions.add_parser(name, help=text[0].lower() + text[1:], description=f"{text}.")
        add_cards_flag(action, use, required=True)
        add_flags(action)


def _api_prepare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="questions with their calls: rows of `api write`, Gorilla's, or any format of data "
        'files; unset: the field "questions" of the cards',
    )
    add("--out", type=Path, required=True, metavar="FILE", help=".jsonl of rows to write")
    add("--overwrite", action="store_true", help="replace --out if it is there")
    add(
        "--mode",
        choices=("zero-shot", "retrieval"),
        default="retrieval",
        help="prompts of the question alone, or with documents: retrieval",
    )
    add(
        "--retriever",
        choices=("bm25", "oracle"),
        help="where wrong documents come from: the likeliest ones, or any: bm25",
    )
    add("--p", type=float, metavar="F", help="share of rows that show the right document: 0.8")
    add("--distractors", type=int, metavar="N", help="wrong documents in a prompt: 2")
    add(
        "--vary",
        type=float,
        metavar="F",
        help="share of them in which the names that identify the API are replaced by invented "
        "ones, so that calls are copied from the document: 0.5",
    )
    add(
        "--copies",
        type=int,
        metavar="N",
        help="rows of each question, each with documents and invented names of its own: 1",
    )
    add("--seed", type=int, default=42, help="of all of these: 42")
    add(
        "--compat",
        action="store_true",
        help="prompts with the bytes of Gorilla's, which show one document: the right one "
        "(--retriever oracle) or BM25's",
    )


def _api_write(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help=".jsonl of rows to write")
    _add_both(parser, "--per_card", type=int, default=10, metavar="N", help="questions a card: 10")
    add("--language", choices=("zh", "en"), default="zh", help="of the questions: zh")
    _add_sampling_flags(parser)
    _add_source_flags(parser)


def _api_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", metavar="QUESTION", help="what the API is to do")
    parser.add_argument(
        "--top_k", type=int, default=1, metavar="N", help="documents that BM25 finds, 0 for none: 1"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, metavar="N", help="longest answer: 256"
    )
    _add_source_flags(parser)


def _api_eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--reference",
        type=Path,
        required=True,
        metavar="FILE",
        help="{question_id, api_call, domain}, Gorilla's or BFCL's rows, or those of `prepare`",
    )
    add(
        "--responses",
        type=Path,
        required=True,
        metavar="FILE",
        help="{question_id, text}, or generated_predictions.txt of main.py",
    )
    add(
        "--family",
        choices=("auto", *API_FAMILIES),
        default="auto",
        help="what identifies a card's call: auto tells by the cards: auto",
    )
    add("--details", type=Path, metavar="FILE", help=".jsonl of rows to write, with a page (.html)")
    add("--overwrite", action="store_true", help="replace --details if it is there")


def _add_sampling_flags(group: Any) -> None:
    """Add the flags of generate and api write that say how completions are sampled."""
    group.add_argument("--temperature", type=float, default=1.0, help="of sampling: 1")
    group.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="longest completion; unset: half the context, at most 3072",
    )
    group.add_argument("--seed", type=int, default=42, help="of prompts and sampling: 42")


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of serve and web for API calls."""
    add_cards_flag(parser, "an API call in an answer is checked against them, never executed")
    parser.add_argument(
        "--top_k",
        type=int,
        default=0,
        metavar="N",
        help="documents of --cards that BM25 finds for a question and its prompt shows, for a "
        "prefix trained with them: 0",
    )


def add_cards_flag(parser: argparse.ArgumentParser, use: str, **options: Any) -> None:
    """Add --cards; use says what for."""
    parser.add_argument(
        "--cards",
        type=Path,
        metavar="FILE",
        help=f"API cards, a JSON object per line: {use}",
        **options,
    )


def _add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `ptuning.commands.asking.open_source` takes."""
    model = parser.add_argument_group("the model, in this process")
    model.add_argument(
        "--model_name_or_path",
        metavar="MODEL",
        help="directory or hub id; unset: what --prefix was trained on, else the nano model",
    )
    model.add_argument("--prefix", type=Path, metavar="DIRECTORY", help="a trained prefix")
    model.add_argument(
        "--quantization_bit", type=int, choices=SUPPORTED_BITS, help="quantise it as it is read"
    )
    add_endpoint_flags(parser, "or an OpenAI-compatible endpoint")


def add_endpoint_flags(parser: argparse.ArgumentParser, title: str) -> None:
    """Add the group of flags that `ptuning.commands.asking.open_endpoint` takes."""
    add = parser.add_argument_group(f"{title} (needs the openai package)").add_argument
    add(
        "--endpoint", metavar="URL", help="such as http://localhost:8000; /v1 is added without path"
    )
    add("--model", metavar="NAME", help="model that the endpoint is asked for")
    add(
        "--api",
        choices=("chat", "completions"),
        help="kind of request; base models need completions: chat",
    )
    add(
        "--api_key_env",
        metavar="NAME",
        help=f"environment variable with the key; unset: {OPENAI_KEY_VARIABLE}, if it is there",
    )
    add("--timeout", type=float, metavar="S", help="seconds to wait for a reply: 120")
    add("--concurrency", type=int, metavar="N", help="prompts in work at once: 5")


def _add_both(group: Any, name: str, **options: Any) -> None:
    """Add a flag that may be written with hyphens too."""
    group.add_argument(name, f"--{name[2:].replace('_', '-')}", **options)
