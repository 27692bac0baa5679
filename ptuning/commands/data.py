"""`python -m ptuning data check` and `data convert`: what is in data files, and one format of all.

Light until it runs: a wrong command line is rejected before the tokenizer is loaded.
"""

import argparse
import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ptuning.commands.registry import DEFAULT_PICTURE, NO_PICTURE
from ptuning.data.checking.findings import (
    Report,
    as_text,
    as_values,
    find_between,
    find_in_file,
)
from ptuning.data.checking.lengths import (
    as_percent,
    length_values,
    sides_of,
    table_lines,
)
from ptuning.data.formats import NoAnswers
from ptuning.data.mixing import MixSource, largest_total, mix_files, parse_shares, share_out
from ptuning.data.parsing import write_json
from ptuning.data.prompts import COLUMN_FIELDS, RowFormat, TextRow, to_example
from ptuning.data.raw_file import as_places, number_of
from ptuning.data.reading import find_files
from ptuning.scoring.pictures import check_picture_name, draw_length_histogram
from ptuning.storage import write_atomically
from ptuning.tunings.loading import NANO_DIR, find_base, load_tokenizer

if TYPE_CHECKING:
    from ptuning.data.conversion import ContractRow, Conversion
    from ptuning.data.tokenizer import ChatGLMTokenizer

logger = logging.getLogger(__name__)

OUT_SUFFIXES = (".jsonl", ".json")


def run(arguments: argparse.Namespace) -> int:
    """Check or convert; return the exit status as --help says."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal may lack characters of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    given = vars(arguments)
    row_format = RowFormat(
        **{item.name: given[item.name] for item in fields(RowFormat) if item.name in given}
    )
    return (_convert if arguments.action == "convert" else _check)(arguments, row_format)


def _named_models(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the models that were named, by flag; the first one's tokenizer counts."""
    return {
        flag: find_base(getattr(arguments, flag), flag=f"--{flag}")
        for flag in ("tokenizer_name", "model_name_or_path")
        if getattr(arguments, flag) is not None
    }


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


# Checking


def _check(arguments: argparse.Namespace, row_format: RowFormat) -> int:
    if arguments.picture not in (None, NO_PICTURE):
        check_picture_name(Path(arguments.picture))
    tokenizer, context = _find_model(arguments)
    paths = [path for name in arguments.files for path in find_files(name)]
    reports = _check_all(paths, row_format, tokenizer or str(NANO_DIR), context)
    _draw_lengths(arguments.picture, reports)
    if arguments.json is not None:
        values = as_values(reports, row_format, tokenizer or "nano")
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        # A lone surrogate in a column's name becomes its escape, which JSON has too.
        write_atomically(arguments.json, text.encode("utf-8", "backslashreplace"))
        _say(f"findings: {arguments.json}")
    findings = [finding for report in reports for finding in report.findings]
    num_problems = sum(finding.is_problem for finding in findings)
    num_useless = sum(not report.counts.num_used for report in reports if report.counts)
    useless = f" ({num_useless} without a row that can be used)" if num_useless else ""
    _say(
        f"{number_of(len(paths), 'file')}{useless}, {number_of(num_problems, 'problem')}, "
        f"{number_of(len(findings) - num_problems, 'notice')}"
    )
    return 2 if num_useless else int(arguments.strict and num_problems > 0)


def _find_model(arguments: argparse.Namespace) -> tuple[str | None, int]:
    """Return the tokenizer that was named, and the context length of the base model in tokens."""
    from ptuning.data.tokenizer import MAX_LENGTH
    from ptuning.model.checkpoint.layout import read_config

    named = _named_models(arguments)
    tokenizer = next(iter(named.values()), None)
    base = named.get("model_name_or_path", None if named else str(NANO_DIR))
    if not named:
        _say(
            "Tokens are those of the embedded nano model; name your base for its own: "
            "--model_name_or_path MODEL\n"
        )
    if base is not None and (Path(base) / "config.json").is_file():
        return tokenizer, read_config(Path(base)).max_sequence_length
    _say(
        f"The base model is taken to read {MAX_LENGTH:,} tokens, as ChatGLM-6B does: without a "
        "directory in --model_name_or_path there is no config.json to read it from.\n"
    )
    return tokenizer, MAX_LENGTH


def _check_all(
    paths: list[Path], row_format: RowFormat, tokenizer_name: str, context: int
) -> list[Report]:
    """Check each file and each pair of files, and print each part as soon as it is known."""
    from ptuning.data.checking.check import check_file

    tokenizer = load_tokenizer(tokenizer_name)
    reports = []
    for path in paths:
        counts = check_file(path, tokenizer, row_format)
        if tokenizer_name == str(NANO_DIR):  # whose vocabulary has few characters
            counts.places.pop("spelled_character", None)
        reports.append(Report((str(path),), find_in_file(counts, context), counts))
        _say(as_text(reports[-1]))
    usable = [report.counts for report in reports if report.counts and report.counts.num_used]
    for first, second in combinations(usable, 2):
        names = (str(first.path), str(second.path))
        reports.append(Report(names, find_between(first, second)))
        _say(as_text(reports[-1]))
    return reports


def _draw_lengths(given: str | None, reports: list[Report]) -> None:
    """Draw the lengths; warn if the default file cannot be written."""
    files = [report.counts for report in reports if report.counts and report.counts.num_used]
    if given == NO_PICTURE or not files:
        return
    names = Counter(counts.path.name for counts in files)
    drawn = [
        (counts.path.name if names[counts.path.name] == 1 else str(counts.path), counts.sides)
        for counts in files
    ]
    path = DEFAULT_PICTURE if given is None else Path(given)
    try:
        draw_length_histogram(drawn, path)
    except OSError as error:
        if given is not None:
            raise
        logger.warning("no picture: %s (%s); name one with --picture FILE", path, error.strerror)
        return
    _say(f"picture:  {path}")


# Converting


def _convert(arguments: argparse.Namespace, row_format: RowFormat) -> int:
    """Convert, report and write; nothing is written before everything is known."""
    from ptuning.data.conversion import convert_file, number_repeats

    mixed = _mixed(arguments)
    paths = [source.path for source in mixed]
    if not mixed:
        paths = list(dict.fromkeys(path for name in arguments.files for path in find_files(name)))
    check_new_file(arguments.out, paths, overwrite=arguments.overwrite)
    name = next(iter(_named_models(arguments).values()), None)
    files = []
    for path in paths:
        try:
            file = convert_file(
                path,
                row_format,
                template=arguments.template,
                keep_unanswered=arguments.keep_unanswered,
            )
        except NoAnswers as error:
            raise ValueError(f"{error} --keep_unanswered converts them as they are.") from error
        _say(*_file_lines(file))
        files.append(file)
    if not arguments.allow_repeated_prompts:
        _require_whole_prompts(files, mixed=bool(mixed))
    if mixed:
        shares = [source.share for source in mixed]
        rows = _mix(files, shares, total=arguments.total, seed=arguments.seed)
    else:
        rows = [row for file in files for row in file.rows]
    if not rows:
        raise ValueError(_no_rows(files, keep_unanswered=arguments.keep_unanswered))
    repeats = number_repeats(rows)
    if repeats:
        _say(
            f"{number_of(len(repeats), 'id')} of several rows: the later ones end in +1, +2 and so "
            f"on ({', '.join(repeats[:5])}{', ...' if len(repeats) > 5 else ''})"
        )
    lengths = _count_tokens(load_tokenizer(name or str(NANO_DIR)), rows)
    _say("", f"tokens are those of {name or 'the embedded nano model'}")
    _say(*_length_lines(lengths, rows, row_format))
    lines = "".join(write_json(row) + "\n" for row in rows)
    # A lone surrogate, which meta may hold, becomes its escape, which JSON has too.
    write_atomically(arguments.out, lines.encode("utf-8", "backslashreplace"))
    num_rejected = sum(file.num_rejected for file in files)
    _say(f"wrote {number_of(len(rows), 'row')} to {arguments.out}, {num_rejected:,} rejected")
    if any(row["response"].strip() for row in rows):
        others = " (convert the validation file too)" if row_format.named_columns else ""
        _say(f"train on it: --train_file {arguments.out}{others}")
    else:
        _say(f"answer it: --do_predict --test_file {arguments.out}")
    return int(arguments.strict and num_rejected > 0)


def _mixed(arguments: argparse.Namespace) -> list[MixSource]:
    """Return the sources of --mix, [] without it; reject flags that do not go with it."""
    total = arguments.total
    if arguments.mix is None:
        if not arguments.files:
            raise ValueError("no file is given; give files, or --mix FILE:SHARE,FILE:SHARE.")
        if total is not None:
            raise ValueError(
                f"--total is {total}, and only --mix draws rows; add --mix, or leave it out."
            )
        return []
    if arguments.files:
        raise ValueError(
            f"--mix names the files itself, and {arguments.files[0]} is given too; leave it out."
        )
    if total is not None and total < 1:
        raise ValueError(f"--total is {total}; use 1 or more, or leave it out.")
    for flag in COLUMN_FIELDS:
        if getattr(arguments, flag) is not None:
            raise ValueError(
                f"--mix finds the columns of each of its files, and --{flag} is "
                f"{getattr(arguments, flag)}; convert that file first, then mix what you get."
            )
    return parse_shares(arguments.mix)


def check_new_file(
    out: Path, reads: Sequence[Path], *, overwrite: bool, flag: str = "--out"
) -> None:
    """Reject an output file that is one of those to read, or exists (ValueError)."""
    if out.suffix.lower() not in OUT_SUFFIXES:
        raise ValueError(f"{flag} is {out}; give a name that ends in .jsonl: rows are JSON lines.")
    if out.is_dir():
        raise ValueError(f"{flag} is {out}, a directory; give the name of a file.")
    if out.parent.exists() and not out.parent.is_dir():
        raise ValueError(f"{flag} is {out}, and {out.parent} is a file; use another directory.")
    if not out.exists():
        return
    if any(path.exists() and path.samefile(out) for path in reads):
        raise ValueError(f"{flag} is {out}, which is read as well; give another name.")
    if not overwrite:
        raise ValueError(
            f"{flag} is {out}, which exists already; give another name, or add --overwrite."
        )


def _require_whole_prompts(files: Sequence["Conversion"], *, mixed: bool) -> None:
    """Reject rows whose prompts are the same only because a filled column is not used."""
    for file in files:
        found = file.read.left_out
        if found is not None:
            remedy = found.remedy
            if mixed and found.flags:
                remedy = f"convert that file first: {file.path} --out NAME.jsonl {found.flags}"
            raise ValueError(
                f"{file.path}: {found}; {remedy}, or convert all the same with "
                "--allow_repeated_prompts."
            )


def _mix(
    files: Sequence["Conversion"], shares: Sequence[float], *, total: int | None, seed: int
) -> list["ContractRow"]:
    """Draw the mixture and say how many rows each file gave."""
    for file in files:
        if not file.rows:
            raise ValueError(f"--mix: {file.path}: no row of it can be used; leave it out.")
    sizes = [len(file.rows) for file in files]
    most = largest_total(sizes, shares)
    total = most if total is None else total
    counts = share_out(total, shares)
    _say(f"mixture of {number_of(total, 'row')}, seed {seed}; without repeats at most {most:,}")
    for file, size, count in zip(files, sizes, counts, strict=True):
        rounds, more = divmod(count, size)
        how = ""
        if count > size:
            how = ": each once" if rounds == 1 else f": each {rounds} times"
            how += f", {more:,} of them once more" if more else ""
        _say(f"  {count:,} ({as_percent(count / total)}) of the {size:,} of {file.path}{how}")
    return mix_files([file.rows for file in files], counts, seed)


def _no_rows(files: Sequence["Conversion"], *, keep_unanswered: bool) -> str:
    """Say that nothing is left, and what would keep rows."""
    dropped = [item for file in files for item in file.read.dropped.items()]
    reasons = ", ".join(f"{len(places)} x {reason.rstrip('.')}" for reason, places in dropped)
    more = "" if keep_unanswered else "; --keep_unanswered keeps rows without an answer"
    return f"nothing is written: no row could be converted: {reasons}{more}."


def _count_tokens(tokenizer: "ChatGLMTokenizer", rows: list["ContractRow"]) -> np.ndarray:
    """Return the tokens of prompt and answer of each row, (rows, 2); the prompt has the history."""
    from ptuning.data.dataset import in_chunks

    lengths: list[int] = []
    for chunk in in_chunks(rows, "counting tokens"):
        texts = []
        for row in chunk:
            history = tuple((question, answer) for question, answer in row["history"])
            example = to_example(TextRow(1, row["prompt"], row["response"], history), RowFormat())
            texts += [example.prompt, example.response]
        lengths += map(len, tokenizer.encode_batch(texts))
    return np.array(lengths, dtype=np.int32).reshape(-1, 2)  # (rows, 2)


def _file_lines(file: "Conversion") -> list[str]:
    """Say what became of a file, in the words of training."""
    read = file.read
    lines = [f"{file.path}: {read.heading(len(file.rows), 'converted')}"]
    lines += [f"  {line}" for line in read.lines(left_out="rejected", most=None)]
    if read.unused:
        lines.append("  the values of columns that are not used are kept in meta")
    if file.placeholders:
        found = [
            f"{name} in {number_of(len(places), 'row')} ({as_places(places, read.unit)})"
            for name, places in file.placeholders.items()
        ]
        lines.append(f"  placeholders that were not filled in? {', '.join(found)}")
    return lines


def _length_lines(
    lengths: np.ndarray, rows: Sequence["ContractRow"], row_format: RowFormat
) -> list[str]:
    """Return a table of lengths and cuts, and what the given limits would truncate."""
    prompts, answers = sides_of(row_format, lengths)
    is_answered = np.array([bool(row["response"].strip()) for row in rows])
    answered = answers._replace(lengths=answers.lengths[is_answered])
    sides = [side for side in (prompts, answered) if len(side.lengths)]
    prompt_cut, answer_cut = prompts.are_cut(prompts.limit), answers.are_cut(answers.limit)
    cuts = [
        f"{number_of(int(cut.sum()), noun)} ({as_percent(int(cut.sum()) / max(1, total))})"
        for cut, total, noun in (
            (prompt_cut, len(rows), "prompt"),
            (answer_cut, len(answered.lengths), "answer"),
            (prompt_cut | answer_cut, len(rows), "row"),
        )
    ]
    lines = [
        *table_lines(length_values(sides)),
        f"  {prompts.flag} {prompts.limit} {answers.flag} {answers.limit} would truncate "
        f"{cuts[0]}, {cuts[1]}; {cuts[2]} with either",
    ]
    num_silent = int((answered.lengths == 0).sum())
    if num_silent:
        lines.append(
            f"  {number_of(num_silent, 'row')} with an answer of no token: training leaves them out"
        )
    return lines
