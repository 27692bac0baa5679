"""The report of `python -m ptuning data check`, as text and as plain values for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ptuning.data.checking.check import FileCounts
from ptuning.data.checking.findings import Finding, shown_name
from ptuning.data.checking.lengths import (
    histogram_lines,
    length_values,
    number_of,
    table_lines,
)
from ptuning.data.prompts import RowFormat
from ptuning.data.reading import as_places

MOST_COLUMNS = 8  # of the data that are named
FORMAT_VERSION = 2  # of the JSON


class Report(NamedTuple):
    """What was found in one file or, without counts, what two files share."""

    paths: tuple[str, ...]
    findings: list[Finding]
    counts: FileCounts | None = None


# Text


def as_text(report: Report) -> str:
    """Return the part of one file, or of two."""
    counts = report.counts
    lines = [" and ".join(report.paths)]
    if counts is not None and counts.unreadable is None:
        lines += [*_head(counts), ""]
    if not report.findings:
        lines.append("  nothing in common" if counts is None else "  nothing found")
    for finding in report.findings:
        lines.append(f"  {'problem' if finding.is_problem else 'notice '}  {finding.message}")
        where = _where(finding, None if counts is None else counts.unit)
        lines += [f"           {line}" for line in (*where, f"-> {finding.remedy}") if line]
    return "\n".join(lines) + "\n"


def _head(counts: FileCounts) -> list[str]:
    """Return what a file is made of, and the lengths of its rows."""
    assert counts.decoded is not None, "the file was read"
    num_broken = len(counts.places["broken_row"])
    made = f", {counts.num_made:,} answers in them" if counts.num_made > counts.num_read else ""
    used = "used" if counts.has_answers else "to answer"
    broken = f", {num_broken:,} broken" if num_broken else ""
    mark = " with a byte order mark" if counts.decoded.has_mark else ""
    lines = [
        f"  rows      {counts.num_read:,} read{made}, {counts.num_used:,} {used}{broken}",
        f"  encoding  {counts.decoded.encoding}{mark}",
        f"  format    {counts.layout or 'not known'}",
        f"  columns   {_column_roles(counts)}",
    ]
    if counts.num_used:
        values = length_values(counts.sides)
        lines += ["", *table_lines(values), "", *histogram_lines(values, counts.num_used)]
    return lines


def _where(finding: Finding, unit: str | None) -> list[str]:
    """Return the first few places and examples; unit None: of two files, the examples say all."""
    rest = finding.count - len(finding.examples)
    if finding.kind == "broken_row":  # whole messages, each with its file and line
        return [*finding.examples, f"... and {rest:,} more" if rest > 0 else ""]
    if unit is None or finding.kind in ("duplicate_row", "several_answers"):
        start = f"{unit}s " if finding.kind == "several_answers" else ""
        return [start + "; ".join(finding.examples) + ("; ..." if rest > 0 else "")]
    places = as_places(finding.places, unit, None) if finding.places else ""
    examples = ", ".join(finding.examples)
    return ["; ".join(filter(None, [examples, places])) + (", ..." if finding.has_more else "")]


def _column_roles(counts: FileCounts) -> str:
    """Return the columns that are there, the used ones first, with what each is used for."""
    used = {} if counts.layout is None else counts.layout.columns
    roles = {name: role for role, name in used.items()}
    words = [f"{shown_name(name)} ({role})" for name, role in roles.items()]
    words += [
        f"{shown_name(name)} (not used, filled in {number_of(num_rows, 'row')})"
        for name, num_rows in counts.columns.items()
        if name not in roles
    ]
    more = f" and {len(words) - MOST_COLUMNS} more" if len(words) > MOST_COLUMNS else ""
    return ", ".join(words[:MOST_COLUMNS]) + more


# JSON


def as_values(reports: Sequence[Report], row_format: RowFormat, tokenizer: str) -> dict[str, Any]:
    """Return everything as plain values for JSON."""
    files, pairs = [], []
    for report in reports:
        findings = [
            {**asdict(finding), "severity": "problem" if finding.is_problem else "notice"}
            for finding in report.findings
        ]
        if report.counts is None:
            pairs.append({"files": list(report.paths), "findings": findings})
        else:
            files.append({**_file_values(report.counts), "findings": findings})
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer,
        "max_source_length": row_format.max_source_length,
        "max_target_length": row_format.max_target_length,
        "files": files,
        "pairs": pairs,
    }


def _file_values(counts: FileCounts) -> dict[str, Any]:
    decoded, layout = counts.decoded, counts.layout
    return {
        "path": str(counts.path),
        "readable": counts.unreadable is None,
        "encoding": decoded and decoded.encoding,
        "byte_order_mark": decoded is not None and decoded.has_mark,
        "places_are": f"{counts.unit}s",
        "rows_read": counts.num_read,
        "rows_made": counts.num_made,
        "rows_used": counts.num_used,
        "rows_broken": len(counts.places["broken_row"]),
        "has_answers": counts.has_answers,
        "format": layout and layout.name,
        "columns": counts.columns,
        "columns_used": layout.columns if layout is not None else {},
        "lengths": length_values(counts.sides) if counts.num_used else None,
    }
