"""The report of `python -m ptuning data check`, as text and as plain values.

Bars are `#` and headings ASCII: they line up where block characters are two columns wide.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from ptuning.data.check_counts import MOST_EXAMPLES, FileCounts
from ptuning.data.check_findings import Finding, as_percent, shown_name
from ptuning.data.check_lengths import (
    ANSWER_RESERVE,
    PROMPT_RESERVE,
    TABLE_LENGTHS,
    Histogram,
    count_bins,
    cut_share,
    shared_edges,
    summarise_lengths,
)

BAR_WIDTH = 24
MOST_COLUMNS = 8  # of the data that are named
FORMAT_VERSION = 1  # of the JSON


class FileReport(NamedTuple):
    """One file: what was counted, and what that means."""

    counts: FileCounts
    findings: list[Finding]


class PairReport(NamedTuple):
    """Two files and what they share."""

    first: str
    second: str
    findings: list[Finding]


class Limits(NamedTuple):
    """The text lengths of a run, in tokens."""

    max_source_length: int
    max_target_length: int

    @property
    def table(self) -> list[int]:
        """The lengths of the table of cuts: the usual ones and these two."""
        return sorted({*TABLE_LENGTHS, *self})


def file_as_text(report: FileReport, limits: Limits) -> str:
    """Return the part of one file."""
    counts = report.counts
    lines = [str(counts.path)]
    if counts.unreadable is None:
        mark = " with a byte order mark" if counts.has_mark else ""
        lines += [
            f"  rows      {_number_of_rows(counts)}",
            f"  encoding  {counts.encoding}{mark}",
            f"  columns   {_column_roles(counts)}",
        ]
        if counts.num_used:
            lines += ["", *_length_table(counts, limits), "", *_histogram_lines(counts)]
        lines.append("")
    lines += finding_lines(report.findings, counts.place_name)
    return "\n".join(lines) + "\n"


def pair_as_text(report: PairReport) -> str:
    """Return the part of two files."""
    lines = finding_lines(report.findings, "") if report.findings else ["  nothing in common"]
    return "\n".join([f"{report.first} and {report.second}", *lines]) + "\n"


def finding_lines(findings: Sequence[Finding], place_name: str) -> list[str]:
    """Return each finding with its places and its remedy."""
    if not findings:
        return ["  nothing found"]
    lines = []
    for finding in findings:
        lines.append(f"  {'problem' if finding.is_problem else 'notice '}  {finding.message}")
        if finding.kind == "broken_row":  # whole messages, each with its file and line
            lines += [f"           {example}" for example in finding.examples]
            lines += _rest(finding)
        else:
            where = _where(finding, place_name)
            lines += [f"           {where}"] if where else []
        lines.append(f"           -> {finding.remedy}")
    return lines


def _rest(finding: Finding) -> list[str]:
    rest = finding.count - len(finding.examples)
    return [f"           ... and {rest:,} more"] if rest > 0 else []


def _where(finding: Finding, place_name: str) -> str:
    """Return the first few places or examples in one line."""
    more = ", ..." if finding.count > MOST_EXAMPLES else ""
    noun = place_name if len(finding.places) == 1 else f"{place_name}s"
    places = f"{noun} {', '.join(map(str, finding.places))}{more}" if finding.places else ""
    if finding.kind in ("control_text", "spelled_character"):
        return f"{', '.join(finding.examples)}; {places}"
    if finding.examples:
        start = f"{place_name}s " if finding.kind == "several_answers" else ""
        return start + "; ".join(finding.examples) + more.replace(",", ";")
    return places


def _number_of_rows(counts: FileCounts) -> str:
    broken = f", {counts.broken.count:,} broken" if counts.broken.count else ""
    return f"{counts.num_read:,} read, {counts.num_used:,} used{broken}"


def _column_roles(counts: FileCounts) -> str:
    """Return the columns that are there, with what each is used for."""
    roles = {counts.columns.prompt: "prompt", counts.columns.response: "answer"}
    if counts.columns.history is not None:
        roles[counts.columns.history] = "history"
    names = sorted(counts.column_rows, key=lambda name: name not in roles)
    words = []
    for name in names[:MOST_COLUMNS]:
        num_rows = counts.column_rows[name]
        partly = "" if num_rows == counts.num_read else f", in {num_rows:,} rows"
        words.append(f"{shown_name(name)} ({roles.get(name, 'not used')}{partly})")
    more = f" and {len(names) - MOST_COLUMNS} more" if len(names) > MOST_COLUMNS else ""
    return ", ".join(words) + more


def _length_table(counts: FileCounts, limits: Limits) -> list[str]:
    """Return the table of lengths and cuts, a line for prompts and one for answers."""
    heading = f"  {'tokens':<8}{'mean':>8}{'median':>8}{'95 %':>8}{'longest':>9}   cut at"
    lines = [heading + "".join(f"{limit:>8}" for limit in limits.table)]
    for noun, lengths, reserve in _sides(counts):
        summary = summarise_lengths(lengths)
        cells = (
            f"{summary.mean:>8,.1f}{summary.median:>8,}{summary.percentile_95:>8,}"
            f"{summary.longest:>9,}{'':9}"
        )
        cuts = "".join(
            f"{as_percent(cut_share(lengths, limit, reserve)):>8}" for limit in limits.table
        )
        lines.append(f"  {noun:<8}{cells}{cuts}")
    return lines


def _sides(counts: FileCounts) -> list[tuple[str, np.ndarray, int]]:
    return [
        ("prompts", counts.prompt_lengths, PROMPT_RESERVE),
        ("answers", counts.answer_lengths, ANSWER_RESERVE),
    ]


def _histograms(counts: FileCounts) -> tuple[Histogram, Histogram]:
    edges = shared_edges([counts.prompt_lengths, counts.answer_lengths])
    return count_bins(counts.prompt_lengths, edges), count_bins(counts.answer_lengths, edges)


def _histogram_lines(counts: FileCounts) -> list[str]:
    """Return both histograms side by side, shares of all rows."""
    prompts, answers = _histograms(counts)
    highest = max(*prompts.counts, *answers.counts)
    lines = [f"  {'tokens':<12}{'prompts':<{BAR_WIDTH + 10}}answers"]
    for index in range(len(prompts.edges)):
        label = _bin_label(prompts.edges, index)
        bars = [
            f"{as_percent(one.counts[index] / counts.num_used):>6} "
            f"{'#' * round(BAR_WIDTH * one.counts[index] / highest):<{BAR_WIDTH + 3}}"
            for one in (prompts, answers)
        ]
        lines.append(f"  {label:<11}{''.join(bars)}".rstrip())
    return lines


def _bin_label(edges: list[int], index: int) -> str:
    """Name a bin.

    >>> _bin_label([0, 20, 40], 1), _bin_label([0, 20, 40], 2), _bin_label([0, 1], 0)
    ('20-39', '40+', '0')
    """
    low = edges[index]
    if index + 1 == len(edges):
        return f"{low}+"
    last = edges[index + 1] - 1
    return f"{low}-{last}" if last > low else str(low)


def as_values(
    files: Sequence[FileReport], pairs: Sequence[PairReport], limits: Limits, tokenizer: str
) -> dict[str, Any]:
    """Return everything as plain values for JSON."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer,
        **limits._asdict(),
        "files": [_file_as_values(report, limits) for report in files],
        "pairs": [
            {"files": [pair.first, pair.second], "findings": _findings_as_values(pair.findings)}
            for pair in pairs
        ],
    }


def _file_as_values(report: FileReport, limits: Limits) -> dict[str, Any]:
    counts = report.counts
    values: dict[str, Any] = {
        "path": str(counts.path),
        "readable": counts.unreadable is None,
        "encoding": counts.encoding or None,
        "byte_order_mark": counts.has_mark,
        "places_are": f"{counts.place_name}s",
        "rows_read": counts.num_read,
        "rows_used": counts.num_used,
        "rows_broken": counts.broken.count,
        "columns": dict(counts.column_rows),
        "columns_used": asdict(counts.columns),
        "findings": _findings_as_values(report.findings),
    }
    if counts.num_used:
        sides = zip(_sides(counts), _histograms(counts), strict=True)
        values["lengths"] = {
            noun: {
                **summarise_lengths(lengths)._asdict(),
                "cut_share": {str(n): cut_share(lengths, n, reserve) for n in limits.table},
                "histogram": histogram._asdict(),
            }
            for (noun, lengths, reserve), histogram in sides
        }
    return values


def _findings_as_values(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [
        {**asdict(finding), "severity": "problem" if finding.is_problem else "notice"}
        for finding in findings
    ]
