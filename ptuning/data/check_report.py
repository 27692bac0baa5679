"""The report of `python -m ptuning data check`, as text and as plain values for JSON.

Bars are `#` and headings ASCII, to line up where block characters are two columns wide.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from ptuning.data.check import FileCounts
from ptuning.data.check_findings import (
    ANSWER_RESERVE,
    MOST_EXAMPLES,
    PROMPT_RESERVE,
    TABLE_LENGTHS,
    Finding,
    as_percent,
    cut_share,
    shown_name,
)
from ptuning.data.formatting import RowFormat

BAR_WIDTH = 24
MOST_BINS = 10
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


# Lengths


def length_values(counts: FileCounts) -> dict[str, dict[str, Any]]:
    """Return mean, quantiles, shares cut at each limit and histogram of prompts and of answers."""
    edges = shared_edges([counts.prompt_lengths, counts.answer_lengths])
    row_format = counts.row_format
    limits = {*TABLE_LENGTHS, row_format.max_source_length, row_format.max_target_length}
    values = {}
    for noun, lengths, reserve in (
        ("prompts", counts.prompt_lengths, PROMPT_RESERVE),
        ("answers", counts.answer_lengths, ANSWER_RESERVE),
    ):
        median, high = np.percentile(lengths, [50, 95], method="higher")
        values[noun] = {
            "mean": float(lengths.mean()),
            "median": int(median),
            "percentile_95": int(high),
            "longest": int(lengths.max()),
            "cut_share": {str(n): cut_share(lengths, n, reserve) for n in sorted(limits)},
            "histogram": {"edges": edges, "counts": count_bins(lengths, edges)},
        }
    return values


def shared_edges(lengths: Sequence[np.ndarray]) -> list[int]:
    """Return the lower edges of at most 10 bins for all; a width is 1, 2 or 5 times 10**n.

    The longest 1 % of each may lie beyond: they go into the last bin.

    >>> shared_edges([np.array([3, 45])])
    [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    """
    high = max(int(np.percentile(one, 99, method="higher")) for one in lengths)
    widths = (step * 10**power for power in range(9) for step in (1, 2, 5))
    return list(range(0, high + 1, next(width for width in widths if high // width < MOST_BINS)))


def count_bins(lengths: np.ndarray, edges: list[int]) -> list[int]:
    """Count the lengths between the edges, and from the last edge on.

    >>> count_bins(np.array([1, 6, 7, 99]), [0, 5, 10])
    [1, 2, 1]
    """
    return np.histogram(lengths, bins=[*edges, np.inf])[0].tolist()


# Text


def file_as_text(report: FileReport) -> str:
    """Return the part of one file."""
    counts = report.counts
    lines = [str(counts.path)]
    if counts.unreadable is None:
        broken = f", {counts.num_broken:,} broken" if counts.num_broken else ""
        mark = " with a byte order mark" if counts.has_mark else ""
        lines += [
            f"  rows      {counts.num_read:,} read, {counts.num_used:,} used{broken}",
            f"  encoding  {counts.encoding}{mark}",
            f"  columns   {_column_roles(counts)}",
        ]
        if counts.num_used:
            values = length_values(counts)
            lines += ["", *_length_table(values), "", *_histogram_lines(values, counts.num_used)]
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
        where = [_where(finding, place_name)]
        if finding.kind == "broken_row":  # whole messages, each with its file and line
            rest = finding.count - len(finding.examples)
            where = [*finding.examples, f"... and {rest:,} more" if rest > 0 else ""]
        lines += [f"           {line}" for line in (*where, f"-> {finding.remedy}") if line]
    return lines


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


def _column_roles(counts: FileCounts) -> str:
    """Return the columns that are there, with what each is used for."""
    columns = counts.row_format
    roles = {columns.prompt_column: "prompt", columns.response_column: "answer"}
    if columns.history_column is not None:
        roles[columns.history_column] = "history"
    names = sorted(counts.column_rows, key=lambda name: name not in roles)
    words = []
    for name in names[:MOST_COLUMNS]:
        num_rows = counts.column_rows[name]
        partly = "" if num_rows == counts.num_read else f", in {num_rows:,} rows"
        words.append(f"{shown_name(name)} ({roles.get(name, 'not used')}{partly})")
    more = f" and {len(names) - MOST_COLUMNS} more" if len(names) > MOST_COLUMNS else ""
    return ", ".join(words) + more


def _length_table(values: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table of lengths and cuts, a line for prompts and one for answers."""
    limits = "".join(f"{limit:>8}" for limit in values["prompts"]["cut_share"])
    heading = f"  {'tokens':<8}{'mean':>8}{'median':>8}{'95 %':>8}{'longest':>9}   cut at{limits}"
    return [heading] + [
        f"  {noun:<8}{one['mean']:>8,.1f}{one['median']:>8,}{one['percentile_95']:>8,}"
        f"{one['longest']:>9,}{'':9}"
        + "".join(f"{as_percent(share):>8}" for share in one["cut_share"].values())
        for noun, one in values.items()
    ]


def _histogram_lines(values: dict[str, dict[str, Any]], num_rows: int) -> list[str]:
    """Return both histograms side by side, shares of all rows."""
    edges = values["prompts"]["histogram"]["edges"]
    bins = [one["histogram"]["counts"] for one in values.values()]
    highest = max(map(max, bins))
    lines = [f"  {'tokens':<12}{'prompts':<{BAR_WIDTH + 10}}answers"]
    for index, pair in enumerate(zip(*bins, strict=True)):
        bars = [
            f"{as_percent(count / num_rows):>6} "
            f"{'#' * round(BAR_WIDTH * count / highest):<{BAR_WIDTH + 3}}"
            for count in pair
        ]
        lines.append(f"  {_bin_label(edges, index):<11}{''.join(bars)}".rstrip())
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


# JSON


def as_values(
    files: Sequence[FileReport],
    pairs: Sequence[PairReport],
    row_format: RowFormat,
    tokenizer: str,
) -> dict[str, Any]:
    """Return everything as plain values for JSON."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer,
        "max_source_length": row_format.max_source_length,
        "max_target_length": row_format.max_target_length,
        "files": [_file_as_values(report) for report in files],
        "pairs": [
            {"files": [pair.first, pair.second], "findings": _findings_as_values(pair.findings)}
            for pair in pairs
        ],
    }


def _file_as_values(report: FileReport) -> dict[str, Any]:
    counts, columns = report.counts, report.counts.row_format
    values: dict[str, Any] = {
        "path": str(counts.path),
        "readable": counts.unreadable is None,
        "encoding": counts.encoding or None,
        "byte_order_mark": counts.has_mark,
        "places_are": f"{counts.place_name}s",
        "rows_read": counts.num_read,
        "rows_used": counts.num_used,
        "rows_broken": counts.num_broken,
        "columns": dict(counts.column_rows),
        "columns_used": {
            "prompt": columns.prompt_column,
            "response": columns.response_column,
            "history": columns.history_column,
        },
        "findings": _findings_as_values(report.findings),
    }
    if counts.num_used:
        values["lengths"] = length_values(counts)
    return values


def _findings_as_values(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [
        {**asdict(finding), "severity": "problem" if finding.is_problem else "notice"}
        for finding in findings
    ]
