"""`python -m ptuning data ACTION ...`: what is in data files, what is wrong, what to do.

Light until it runs: a wrong command line is refused before the tokenizer is loaded.
"""

import argparse
import io
import json
import logging
import sys
from collections import Counter
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.commands.registry import DEFAULT_PICTURE, NO_PICTURE
from ptuning.data.checking.lengths import number_of
from ptuning.data.prompts import RowFormat
from ptuning.data.reading import find_files
from ptuning.scoring.pictures import (
    Lengths,
    Limit,
    check_picture_name,
    draw_length_histogram,
)
from ptuning.storage import write_atomically
from ptuning.tunings.loading import NANO_DIR, find_base, load_tokenizer

if TYPE_CHECKING:
    from ptuning.data.checking.check_report import Report

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Check, write the report and return 0, 1 or 2 as --help says."""
    if arguments.action == "convert":
        from ptuning.commands.data_convert import run as convert

        return convert(arguments)
    from ptuning.data.checking.check_report import as_values

    row_format = row_format_of(arguments)
    if arguments.picture not in (None, NO_PICTURE):
        check_picture_name(Path(arguments.picture))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name in a file may not fit the terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    tokenizer, context = _find_model(arguments)
    paths = [path for name in arguments.files for path in find_files(name)]
    reports = _check_all(paths, row_format, tokenizer or str(NANO_DIR), context)
    _write_picture(arguments.picture, reports)
    if arguments.json is not None:
        values = as_values(reports, row_format, tokenizer or "nano")
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        # half of a surrogate pair in a column's name becomes its escape, which JSON has too
        write_atomically(arguments.json, text.encode("utf-8", "backslashreplace"))
        sys.stdout.write(f"findings: {arguments.json}\n")
    return _conclude(reports, is_strict=arguments.strict)


def row_format_of(arguments: argparse.Namespace) -> RowFormat:
    """Return what the flags say of rows."""
    given = vars(arguments)
    return RowFormat(
        **{item.name: given[item.name] for item in fields(RowFormat) if item.name in given}
    )


def named_models(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the models that were named, by flag; the first is the one whose tokens count."""
    return {
        flag: find_base(getattr(arguments, flag), flag=f"--{flag}")
        for flag in ("tokenizer_name", "model_name_or_path")
        if getattr(arguments, flag) is not None
    }


def _find_model(arguments: argparse.Namespace) -> tuple[str | None, int]:
    """Return the tokenizer that was named, and how many tokens the base model reads."""
    from ptuning.data.tokenizer import MAX_LENGTH
    from ptuning.model.checkpoint.layout import read_config

    named = named_models(arguments)
    base = named.get("model_name_or_path", None if named else str(NANO_DIR))
    if not named:
        sys.stdout.write(
            "Tokens are those of the embedded nano model; name your base for its own: "
            "--model_name_or_path MODEL\n\n"
        )
    if base is not None and (Path(base) / "config.json").is_file():
        return next(iter(named.values()), None), read_config(Path(base)).max_sequence_length
    sys.stdout.write(
        f"The base model is taken to read {MAX_LENGTH:,} tokens, as ChatGLM-6B does: without a "
        "folder in --model_name_or_path there is no config.json to read it from.\n\n"
    )
    return next(iter(named.values()), None), MAX_LENGTH


def _check_all(
    paths: list[Path], row_format: RowFormat, tokenizer: str, context: int
) -> list["Report"]:
    """Check each file and each pair of files, and print each part when it is known."""
    from ptuning.data.checking.check import Encoder, check_file
    from ptuning.data.checking.check_report import Report, as_text
    from ptuning.data.checking.findings import find_between, find_in_file

    encoder = Encoder.of(load_tokenizer(tokenizer))
    reports = []
    for path in paths:
        counts = check_file(path, encoder, row_format)
        if tokenizer == str(NANO_DIR):  # whose vocabulary has few characters
            counts.places.pop("spelled_character", None)
        reports.append(Report((str(path),), find_in_file(counts, context), counts))
        sys.stdout.write(as_text(reports[-1]) + "\n")
        sys.stdout.flush()
    usable = [report.counts for report in reports if report.counts and report.counts.num_used]
    for first, second in combinations(usable, 2):
        names = (str(first.path), str(second.path))
        reports.append(Report(names, find_between(first, second)))
        sys.stdout.write(as_text(reports[-1]) + "\n")
    return reports


def _write_picture(given: str | None, reports: list["Report"]) -> None:
    """Draw the lengths; a default place that cannot be written is announced and done without."""
    files = [report.counts for report in reports if report.counts and report.counts.num_used]
    if given == NO_PICTURE or not files:
        return
    names = Counter(counts.path.name for counts in files)
    lengths = [
        Lengths(
            counts.path.name if names[counts.path.name] == 1 else str(counts.path),
            counts.prompt_lengths.tolist(),
            counts.answer_lengths.tolist(),
        )
        for counts in files
    ]
    path = DEFAULT_PICTURE if given is None else Path(given)
    limits = [Limit(side.flag, side.limit, side.limit - side.reserve) for side in files[0].sides]
    try:
        draw_length_histogram(lengths, path, prompt_limit=limits[0], answer_limit=limits[1])
    except OSError as error:
        if given is not None:
            raise
        logger.warning("no picture: %s (%s); name one with --picture FILE", path, error.strerror)
        return
    sys.stdout.write(f"picture:  {path}\n")


def _conclude(reports: list["Report"], *, is_strict: bool) -> int:
    """Print the totals; return the exit status."""
    findings = [finding for report in reports for finding in report.findings]
    num_problems = sum(finding.is_problem for finding in findings)
    checked = [report.counts for report in reports if report.counts is not None]
    num_useless = sum(not counts.num_used for counts in checked)
    status = 2 if num_useless else int(is_strict and num_problems > 0)
    useless = f" ({num_useless} without a row that can be used)" if num_useless else ""
    sys.stdout.write(
        f"{number_of(len(checked), 'file')}{useless}, {number_of(num_problems, 'problem')}, "
        f"{number_of(len(findings) - num_problems, 'notice')}\n"
    )
    return status
