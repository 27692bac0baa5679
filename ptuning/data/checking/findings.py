"""What `data check` counts in a file, what is wrong with it, and the report as text and as JSON.

`KINDS` is the one table of what can be found. This module is light: --help prints the table.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ptuning.data.checking.lengths import (
    Side,
    as_percent,
    histogram_lines,
    length_values,
    sides_of,
    table_lines,
)
from ptuning.data.formats import Layout, suggest_flags
from ptuning.data.prompts import RowFormat
from ptuning.data.raw_file import DecodedText, as_places, number_of
from ptuning.data.reading import LeftOut

MOST_EXAMPLES = 5  # places and examples listed for one finding
MOST_COLUMNS = 8  # columns that are named
FORMAT_VERSION = 2  # of the JSON


class FindingKind(NamedTuple):
    """A row of the table. sentence and remedy are templates: `_finding` fills in the braces."""

    meaning: str  # as --help lists it
    remedy: str
    sentence: str = "{meaning}: {rows} ({share})"


# Problems cause rows to be rejected, dropped or learned wrongly, or bias the scores.
PROBLEMS = {
    "unreadable": FindingKind(
        "a file that cannot be opened, or has no row that can be read (exit status 2)",
        "fix or leave out this file", "{fault}"),
    "encoding": FindingKind(
        "another encoding than UTF-8, or bytes that fit none",
        "training refuses the file; here it is read as {encoding}, odd bytes as U+FFFD", "{fault}"),
    "broken_row": FindingKind(
        "a row that is not a JSON object or CSV line, or has a field that is not text",
        "fix or delete them", "broken, and training stops at the first: {rows}"),
    "missing_column": FindingKind(
        "a named column that no row has, or none that is known to hold prompts",
        "{advice}", "{fault}"),
    "empty_field": FindingKind(
        "rows without a prompt or an answer, which training drops",
        "fill the field or delete the rows", "{reason}, dropped by training: {rows} ({share})"),
    "left_out": FindingKind(
        "a filled column that is not used, though rows with the same prompt differ in it",
        "training stops until it is used, or --allow_repeated_prompts is typed; {advice}",
        'the same prompt, but another "{column}", which is not used: {rows} ({share})'),
    "leak": FindingKind(
        "a history that already holds its row's own question and answer",
        "delete that turn: the model learns to copy it"),
    "placeholder": FindingKind(
        "unfilled placeholders, such as {{name}} or <NAME>",
        "put in the names that the model should say",
        "unfilled placeholders: {rows} ({share})"),
    "no_tokens": FindingKind("a prompt or an answer of invisible characters only", "delete them"),
    "lost_character": FindingKind(
        "U+FFFD, where a character was lost in an earlier conversion",
        "convert the original file again, from the encoding it is really in"),
    "control_text": FindingKind(
        "control tokens written out, plain text here but not in the published code",
        "delete these words from the text"),
    "unknown_mark": FindingKind(
        "<UNK> in the answer",
        "replace it by the word it stands for, or delete the rows: it is learned as text"),
    "unknown_token": FindingKind(
        "characters that the tokenizer cannot write",
        "replace these characters, or use the vocabulary of ChatGLM-6B"),
    "duplicate_row": FindingKind(
        "the prompt and answer of an earlier row",
        "delete the copies: they count twice in training and in scores"),
    "shared_row": FindingKind(
        "the same prompt and answer in two files",
        "delete them from one of the two; scores on training rows are inflated",
        "in both: {rows}"),
}  # fmt: skip
# Notices are informational.
NOTICES = {
    "note": FindingKind(
        "what the reader left out, or read in another order", "nothing to do if that is right",
        "{note}"),
    "byte_order_mark": FindingKind(
        "a byte order mark", "nothing to do here; other programs may take it for text",
        "begins with a byte order mark (BOM)"),
    "untrained_turn": FindingKind(
        "answers with the weight 0: they are history, and not trained on",
        "nothing to do if that is meant", "{reason}, not trained on: {rows} ({share})"),
    "missing_word": FindingKind(
        "NaN, None, null or N/A in place of a prompt or an answer",
        "empty the field if the word stands for nothing; it is learned as text"),
    "fake_input": FindingKind(
        'inputs that say there is none, such as "No input" or "N/A"',
        "empty the field; as it is, it is joined to the prompt"),
    "unknown_mark_prompt": FindingKind(
        "<UNK> in the prompt", "nothing to do if real prompts contain it"),
    "no_answers": FindingKind(
        "a file without any answer: a test set, whose prompts are checked",
        "{advice}", "no answer in the whole file: {rows}"),
    "spelled_character": FindingKind(
        "characters without a token of their own, which take one for each byte",
        "nothing to do if few; if many, check that this is your base's tokenizer"),
    "several_answers": FindingKind(
        "different answers to one prompt", "{advice}", "{meaning}: {prompts}, {rows}"),
    "shared_prompt": FindingKind(
        "the same prompt in two files, with different answers",
        "delete them from one of the two if scores should be on prompts never seen",
        "in both, with different answers: {prompts}"),
    "cut_prompt": FindingKind(
        "prompts longer than --max_source_length leaves", "{advice}",
        "longer than the {room} tokens of --max_source_length {limit}: {prompts} ({share})"),
    "cut_answer": FindingKind(
        "answers longer than --max_target_length leaves", "{advice}",
        "longer than the {room} tokens of --max_target_length {limit}: {answers} ({share})"),
    "beyond_context": FindingKind(
        "rows longer than the base model was trained with (max_sequence_length)",
        "shorten or split them, or have them cut by the --max_..._length flags",
        "longer than the {context:,} tokens of the base model: {rows} ({share})"),
}  # fmt: skip
KINDS = PROBLEMS | NOTICES  # in the order in which a report lists them


@dataclass
class FileCounts:
    """Everything counted in one file.

    A place is a line or, where rows have none, the number of a row: `unit` says which. Rows are
    those of training: a conversation is one for each answer. Keys of rows and prompts are digests:
    16 bytes of the prompt, then 16 of the answer for a row. lengths: tokens of prompt and answer of
    each row used, without control tokens, (rows, 2).
    """

    path: Path
    row_format: RowFormat
    unreadable: str | None = None  # why nothing of the file could be read
    unit: str = "line"
    decoded: DecodedText | None = None  # without the text; None: unreadable
    encoding_fault: str | None = None
    notes: list[str] = field(default_factory=list)
    layout: Layout | None = None  # None: the meaning of the columns is not known, see columns_fault
    columns_fault: str = ""
    has_answers: bool = True  # False: nothing to train on, only prompts to answer
    num_read: int = 0  # objects found, usable or not
    num_made: int = 0  # rows that they became
    columns: dict[str, int] = field(default_factory=dict)  # and the objects that fill them
    left_out: LeftOut | None = None
    # Places of rows left out, by kind of finding and reason
    lacking: dict[tuple[str, str], list[int]] = field(default_factory=partial(defaultdict, list))
    # By kind of finding
    places: dict[str, list[int]] = field(default_factory=partial(defaultdict, list))
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=partial(defaultdict, list))
    words: dict[str, Counter[str]] = field(default_factory=partial(defaultdict, Counter))
    rows: dict[bytes, int] = field(default_factory=dict)  # key -> first place
    prompts: dict[bytes, int] = field(default_factory=dict)  # key -> first place
    contested: dict[bytes, list[int]] = field(default_factory=dict)  # prompt -> places
    lengths: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))

    @property
    def num_used(self) -> int:
        """Rows that training would use or, in a file without answers, that would be answered."""
        return len(self.lengths)

    @property
    def sides(self) -> list[Side]:
        """Prompts and answers; in a file without answers, those have no tokens."""
        return sides_of(self.row_format, self.lengths)

    def add(self, kind: str, place: int, example: str | None = None) -> None:
        """Count one more of a kind."""
        self.places[kind].append(place)
        if example is not None:
            self.examples[kind].append((place, example))


@dataclass(frozen=True)
class Finding:
    """One thing found in a file or a pair of files.

    count: of rows, lines or prompts, as the message says. places: the first few lines or row
    numbers, in a pair those of the first file. examples: the same in words, where places do not say
    everything. remedy: what to do.
    """

    kind: str
    count: int
    message: str
    remedy: str
    places: tuple[int, ...] = ()
    examples: tuple[str, ...] = ()
    has_more: bool = False  # places than these

    @property
    def is_problem(self) -> bool:
        """Whether --strict fails on it."""
        return self.kind in PROBLEMS


def _finding(
    kind: str,
    count: int,
    places: Sequence[int] = (),
    examples: Iterable[str] = (),
    *,
    of: int = 1,
    **words: object,
) -> Finding:
    """Fill in the table's sentence and remedy; the share is count of a number of rows."""
    meaning, remedy, sentence = KINDS[kind]
    nouns = {f"{noun}s": number_of(count, noun) for noun in ("row", "prompt", "answer")}
    words = {"meaning": meaning, "share": as_percent(count / of)} | nouns | words
    distinct = dict.fromkeys(sorted(places))  # answers of one conversation share a line
    return Finding(
        kind,
        count,
        sentence.format(**words),
        remedy.format(**words),
        tuple(islice(distinct, MOST_EXAMPLES)),
        tuple(islice(examples, MOST_EXAMPLES)),
        len(distinct) > MOST_EXAMPLES,
    )


def find_in_file(counts: FileCounts, context: int) -> list[Finding]:
    """Return what was found in one file, problems first; context: tokens that the base reads."""
    if counts.unreadable is not None:
        return [_finding("unreadable", 1, fault=counts.unreadable)]
    found = [
        *_about_reading(counts),
        *_about_columns(counts),
        *_about_rows(counts),
        *_about_lengths(counts, context),
    ]
    order = list(KINDS)
    return sorted(found, key=lambda finding: order.index(finding.kind))


def find_between(first: FileCounts, second: FileCounts) -> list[Finding]:
    """Return which rows and prompts two files share."""
    rows = first.rows.keys() & second.rows.keys()
    prompts = first.prompts.keys() & second.prompts.keys()
    prompts -= {row[: len(row) // 2] for row in rows}
    found = []
    for kind, keys, places, others in (
        ("shared_row", rows, first.rows, second.rows),
        ("shared_prompt", prompts, first.prompts, second.prompts),
    ):
        if keys:
            in_order = sorted(keys, key=places.__getitem__)
            pairs = (f"{first.unit} {places[k]} = {second.unit} {others[k]}" for k in in_order)
            found.append(_finding(kind, len(keys), [places[key] for key in in_order], pairs))
    return found


def _about_reading(counts: FileCounts) -> Iterator[Finding]:
    decoded = counts.decoded
    assert decoded is not None, "the file could be read"
    for note in counts.notes:
        yield _finding("note", 1, note=note)
    if counts.encoding_fault is not None:
        lines = decoded.damaged_lines or (decoded.first_foreign_line or 1,)
        fault, encoding = counts.encoding_fault.rstrip("."), decoded.encoding
        yield _finding("encoding", len(lines), lines, fault=fault, encoding=encoding)
    elif decoded.has_mark:
        yield _finding("byte_order_mark", 1, (1,))


def _about_columns(counts: FileCounts) -> Iterator[Finding]:
    layout, form = counts.layout, counts.row_format.format
    flags = suggest_flags(list(counts.columns), counts.row_format)
    if layout is None or (counts.row_format.response_column and layout.response is None):
        words = "type" if form == "auto" else f"leave --format {form} out, or type in its place"
        advice = f"{words}: {flags}"
        yield _finding("missing_column", 1, fault=counts.columns_fault, advice=advice)
    if layout is not None and counts.left_out is not None:
        column, num_rows, _ = counts.left_out
        advice = counts.left_out.remedy
        name = shown_name(column)
        yield _finding("left_out", num_rows, of=counts.num_used, column=name, advice=advice)
    for (kind, reason), places in counts.lacking.items():
        yield _finding(kind, len(places), places, of=counts.num_made, reason=reason)
    if layout is not None and not counts.has_answers and counts.num_used:
        advice = "nothing to do for --do_predict, which answers them; training needs answers"
        if layout.response is None and layout.conversation is None:
            advice += f": {flags}"
        yield _finding("no_answers", counts.num_used, advice=advice)


def _about_rows(counts: FileCounts) -> Iterator[Finding]:
    for kind, places in counts.places.items():
        examples = [example for _, example in sorted(counts.examples[kind])]
        most = counts.words[kind].most_common(MOST_EXAMPLES)
        if kind == "spelled_character":
            examples = [f"{shown_name(character)} x {count:,}" for character, count in most]
        elif most:
            examples = [f"{shown_name(name)} in {number_of(count, 'row')}" for name, count in most]
        yield _finding(kind, len(places), places, examples, of=max(1, counts.num_made))
    if counts.contested:
        groups = sorted(counts.contested.values())
        firsts = [group[0] for group in groups]
        examples = [", ".join(map(str, group[:MOST_EXAMPLES])) for group in groups]
        rows = number_of(sum(map(len, groups)), "row")
        advice = "nothing to do if all are right"
        if counts.left_out is not None:
            advice = f"use the column that tells them apart: {shown_name(counts.left_out.column)}"
        yield _finding("several_answers", len(groups), firsts, examples, rows=rows, advice=advice)


def _about_lengths(counts: FileCounts, context: int) -> Iterator[Finding]:
    """Yield what is cut, with limits that the base model reads, and rows that it does not."""
    for side, other in zip(counts.sides, reversed(counts.sides), strict=True):
        num_cut = int(side.are_cut(side.limit).sum())
        if not num_cut:
            continue
        longer = side.sufficient_limit
        # Both limits together fit the base model.
        longest = max(side.limit, context // 2, context - other.sufficient_limit)
        best = min(longer, longest)
        left = side.cut_share(best)
        advice = f"{side.flag} {best} cuts {as_percent(left) if left else 'none'}"
        if best < longer:
            advice += f"; more does not fit the {context:,} tokens of the base model"
        yield _finding(
            f"cut_{side.noun}",
            num_cut,
            of=len(side.lengths),
            room=side.limit - side.reserve,
            limit=side.limit,
            advice=advice,
        )
    prompts, answers = counts.sides
    room = context - prompts.reserve - answers.reserve
    num_beyond = int((prompts.lengths + answers.lengths > room).sum())
    if num_beyond:
        yield _finding("beyond_context", num_beyond, of=counts.num_used, context=context)


def shown_name(name: str) -> str:
    r"""Return a name as it can be shown on one line of any terminal, 40 characters at most.

    >>> shown_name("summary"), shown_name("a\nb")
    ('summary', "'a\\nb'")
    """
    short = name if len(name) <= 40 else f"{name[:37]}..."
    return short if short.isprintable() and short.strip() else repr(short)


# The report


class Report(NamedTuple):
    """What was found in one file or, without counts, what two files share."""

    paths: tuple[str, ...]
    findings: list[Finding]
    counts: FileCounts | None = None


def as_text(report: Report) -> str:
    """Return the part of the report on one file, or on two."""
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
