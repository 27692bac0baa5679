"""`python -m ptuning data check FILE ...`: what is in data files, what is wrong, what to do.

Light until it runs: a wrong command line is refused before the tokenizer is loaded.
"""

import argparse
import io
import json
import logging
import sys
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.atomic_file import write_atomically
from ptuning.commands.registry import DEFAULT_PICTURE, NO_PICTURE
from ptuning.data.formatting import RowFormat
from ptuning.evaluate.pictures import (
    Lengths,
    Limit,
    check_picture_name,
    draw_length_histogram,
)
from ptuning.nano.paths import NANO_DIR
from ptuning.train.base_model import find_base, load_tokenizer

if TYPE_CHECKING:
    from ptuning.data.check_report import FileReport, PairReport

logger = logging.getLogger(__name__)

SHORTEST = 3  # tokens of a limit: one of text beside two control tokens


def run(arguments: argparse.Namespace) -> int:
    """Check, write the report and return 0, 1 or 2 as --help says."""
    if arguments.action == "convert":
        from ptuning.commands.data_convert import run as convert

        return convert(arguments)
    from ptuning.data.check_report import as_values

    for flag in ("max_source_length", "max_target_length"):
        if getattr(arguments, flag) < SHORTEST:
            raise ValueError(f"--{flag} is {getattr(arguments, flag)}; use {SHORTEST} or more.")
    if arguments.picture not in (None, NO_PICTURE):
        check_picture_name(Path(arguments.picture))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name in a file may not fit the terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    row_format = RowFormat(
        prompt_column=arguments.prompt_column,
        response_column=arguments.response_column,
        history_column=arguments.history_column,
        max_source_length=arguments.max_source_length,
        max_target_length=arguments.max_target_length,
    )
    tokenizer_name = None
    for flag in ("tokenizer_name", "model_name_or_path"):  # the first that is given
        if getattr(arguments, flag) is not None:
            tokenizer_name = find_base(getattr(arguments, flag), flag=f"--{flag}")
            break
    if tokenizer_name is None:
        sys.stdout.write(
            "Tokens are those of the embedded nano model; name your base for its own: "
            "--model_name_or_path MODEL\n\n"
        )
    files, pairs = _check_all(arguments.files, row_format, tokenizer_name or str(NANO_DIR))
    _write_picture(arguments.picture, files, row_format)
    if arguments.json is not None:
        values = as_values(files, pairs, row_format, tokenizer_name or "nano")
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        # half of a surrogate pair in a column's name becomes its escape, which JSON has too
        write_atomically(arguments.json, text.encode("utf-8", "backslashreplace"))
        sys.stdout.write(f"findings: {arguments.json}\n")
    return _conclude(files, pairs, is_strict=arguments.strict)


def _check_all(
    paths: list[Path], row_format: RowFormat, tokenizer_name: str
) -> tuple[list["FileReport"], list["PairReport"]]:
    """Check each file and each pair of files, and print each part when it is known."""
    from ptuning.data.check import Encoder, check_file
    from ptuning.data.check_findings import find_between, find_in_file
    from ptuning.data.check_report import FileReport, PairReport, file_as_text, pair_as_text

    encoder = Encoder.of(load_tokenizer(tokenizer_name))
    files = []
    for path in paths:
        counts = check_file(path, encoder, row_format)
        report = FileReport(counts, find_in_file(counts))
        files.append(report)
        sys.stdout.write(file_as_text(report) + "\n")
        sys.stdout.flush()
    pairs = []
    usable = [report.counts for report in files if report.counts.num_used]
    for first, second in combinations(usable, 2):
        findings = find_between(first, second)
        pairs.append(PairReport(str(first.path), str(second.path), findings))
        sys.stdout.write(pair_as_text(pairs[-1]) + "\n")
    return files, pairs


def _write_picture(given: str | None, files: list["FileReport"], row_format: RowFormat) -> None:
    """Draw the lengths; a default place that cannot be written is announced and done without."""
    from ptuning.data.check_findings import ANSWER_RESERVE, PROMPT_RESERVE

    lengths = [
        Lengths(name, report.counts.prompt_lengths.tolist(), report.counts.answer_lengths.tolist())
        for name, report in zip(_short_names(files), files, strict=True)
        if report.counts.num_used
    ]
    if given == NO_PICTURE or not lengths:
        return
    path = DEFAULT_PICTURE if given is None else Path(given)
    source, target = row_format.max_source_length, row_format.max_target_length
    try:
        draw_length_histogram(
            lengths,
            path,
            prompt_limit=Limit("--max_source_length", source, source - PROMPT_RESERVE),
            answer_limit=Limit("--max_target_length", target, target - ANSWER_RESERVE),
        )
    except OSError as error:
        if given is not None:
            raise
        logger.warning("no picture: %s (%s); name one with --picture FILE", path, error.strerror)
        return
    sys.stdout.write(f"picture:  {path}\n")


def _short_names(files: list["FileReport"]) -> list[str]:
    """Return the files' names, or whole paths where two have the same name."""
    names = [report.counts.path.name for report in files]
    if len(set(names)) < len(names):
        names = [str(report.counts.path) for report in files]
    return names


def _conclude(files: list["FileReport"], pairs: list["PairReport"], *, is_strict: bool) -> int:
    """Print the totals; return the exit status."""
    findings = [finding for report in files for finding in report.findings]
    findings += [finding for pair in pairs for finding in pair.findings]
    num_problems = sum(finding.is_problem for finding in findings)
    num_unreadable = sum(report.counts.unreadable is not None for report in files)
    status = 2 if num_unreadable else int(is_strict and num_problems > 0)
    unreadable = f" ({num_unreadable} cannot be read)" if num_unreadable else ""
    sys.stdout.write(
        f"{_plural(len(files), 'file')}{unreadable}, {_plural(num_problems, 'problem')}, "
        f"{_plural(len(findings) - num_problems, 'notice')}\n"
    )
    return status


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
