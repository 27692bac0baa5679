"""What `data check` can find in a file or a pair of files: one table, and the findings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ptuning.data.checking.lengths import as_percent, cut_share, number_of, sufficient_limit
from ptuning.data.formats import suggest_flags

if TYPE_CHECKING:  # check.py imports the tokenizer, which --help does not need
    from ptuning.data.checking.check import FileCounts

MOST_EXAMPLES = 5  # places and examples listed for one finding


class Kind(NamedTuple):
    """A row of the table. sentence and remedy are templates: `_finding` fills in the braces."""

    meaning: str  # as --help lists it
    remedy: str
    sentence: str = "{meaning}: {rows} ({share})"


# Problems cause rows to be rejected, dropped or learned wrongly, or bias the scores.
_PROBLEMS = {
    "unreadable": Kind(
        "a file that cannot be opened, or has no row that can be read (exit status 2)",
        "mend or leave out this file", "{fault}"),
    "encoding": Kind(
        "another encoding than UTF-8, or bytes that fit none",
        "training refuses the file; here it is read as {encoding}, odd bytes as U+FFFD", "{fault}"),
    "broken_row": Kind(
        "a row that is not a JSON object or CSV line, or has a field that is not text",
        "mend or delete them", "broken, and training stops at the first: {rows}"),
    "missing_column": Kind(
        "a named column that no row has, or none that is known to hold prompts",
        "{advice}", "{fault}"),
    "empty_field": Kind(
        "rows without a prompt or an answer, which training drops",
        "{advice}", "{reason}, dropped by training: {rows} ({share})"),
    "left_out": Kind(
        "a filled column that is not used, though rows with the same prompt differ in it",
        "training stops until it is used, or --allow_repeated_prompts is typed; {advice}",
        'the same prompt, but another "{column}", which is not used: {rows} ({share})'),
    "leak": Kind(
        "a history that already holds its row's own question and answer",
        "delete that turn: the model learns to copy it"),
    "placeholder": Kind(
        "unfilled placeholders, such as {{name}} or <NAME>",
        "put in the names that the model should say",
        "unfilled placeholders: {rows} ({share})"),
    "no_tokens": Kind("a prompt or an answer of invisible characters only", "delete them"),
    "lost_character": Kind(
        "U+FFFD, where a character was lost in an earlier conversion",
        "convert the original file again, from the encoding it is really in"),
    "control_text": Kind(
        "control tokens written out, plain text here but not in the published code",
        "delete these words from the text"),
    "unknown_mark": Kind(
        "<UNK> in the answer",
        "replace it by the word it stands for, or delete the rows: it is learnt as text"),
    "unknown_token": Kind(
        "characters that the tokenizer cannot write",
        "replace these characters, or use the vocabulary of ChatGLM-6B"),
    "duplicate_row": Kind(
        "the prompt and answer of an earlier row",
        "delete the copies: they count twice in training and in scores"),
    "shared_row": Kind(
        "the same prompt and answer in two files",
        "delete them from one of the two; scores on rows that were trained on are untrue",
        "in both: {rows}"),
}  # fmt: skip
# Notices are informational.
_NOTICES = {
    "note": Kind(
        "what the reader left out, or read in another order", "nothing to do if that is right",
        "{note}"),
    "byte_order_mark": Kind(
        "a byte order mark", "nothing to do here; other programs may take it for text",
        "begins with a byte order mark (BOM)"),
    "untrained_turn": Kind(
        "answers with the weight 0: they are history, and not trained on",
        "nothing to do if that is meant", "{reason}, not trained on: {rows} ({share})"),
    "missing_word": Kind(
        "NaN, None, null or N/A in place of a prompt or an answer",
        "empty the field if the word stands for nothing; it is learnt as text"),
    "fake_input": Kind(
        'inputs that say there is none, such as "No input" or "N/A"',
        "empty the field; as it is, it is joined to the prompt"),
    "unknown_mark_prompt": Kind(
        "<UNK> in the prompt", "nothing to do if prompts will look so in use"),
    "no_answers": Kind(
        "a file without any answer: a test set, whose prompts are checked",
        "{advice}", "{reason}: {rows}"),
    "spelled_character": Kind(
        "characters without a token of their own, which take one for each byte",
        "nothing to do if few; if many, check that this is your base's tokenizer"),
    "several_answers": Kind(
        "different answers to one prompt", "{advice}", "{meaning}: {prompts}, {rows}"),
    "shared_prompt": Kind(
        "the same prompt in two files, with different answers",
        "delete them from one of the two if scores should be on prompts never seen",
        "in both, with different answers: {prompts}"),
    "cut_prompt": Kind(
        "prompts longer than --max_source_length leaves", "{advice}",
        "longer than the {room} tokens of --max_source_length {limit}: {prompts} ({share})"),
    "cut_answer": Kind(
        "answers longer than --max_target_length leaves", "{advice}",
        "longer than the {room} tokens of --max_target_length {limit}: {answers} ({share})"),
    "beyond_context": Kind(
        "rows longer than the base model was trained with (max_sequence_length)",
        "shorten or split them, or have them cut by the --max_..._length flags",
        "longer than the {context:,} tokens of the base model: {rows} ({share})"),
}  # fmt: skip
KINDS = _PROBLEMS | _NOTICES  # in the order in which a report lists them
PROBLEMS = {kind: row.meaning for kind, row in _PROBLEMS.items()}
NOTICES = {kind: row.meaning for kind, row in _NOTICES.items()}


@dataclass(frozen=True)
class Finding:
    """One thing found in a file or a pair of files.

    count: rows, lines or prompts, as message says. places: the first few lines (row numbers, in a
    file of one line), of the first file in a pair. examples: the same in words, where places do not
    say all. remedy: what to do.
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
    """Make a finding of the table's sentence and remedy; its share is of a number of rows."""
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


def find_in_file(counts: "FileCounts", context: int) -> list[Finding]:
    """Return what was found in one file, problems first; context: tokens that the base reads."""
    if counts.unreadable is not None:
        return [_finding("unreadable", 1, fault=counts.unreadable)]
    found = [*_about_reading(counts), *_about_columns(counts), *_about_lengths(counts, context)]
    for kind, places in counts.places.items():
        examples = [example for _, example in counts.examples[kind]]
        most = counts.words[kind].most_common(MOST_EXAMPLES)
        if kind == "spelled_character":
            examples = [f"{shown_name(character)} x {count:,}" for character, count in most]
        elif most:
            examples = [f"{shown_name(name)} in {number_of(count, 'row')}" for name, count in most]
        found.append(_finding(kind, len(places), places, examples, of=max(1, counts.num_made)))
    if counts.contested:
        groups = sorted(counts.contested.values())
        firsts = [group[0] for group in groups]
        examples = [", ".join(map(str, group[:MOST_EXAMPLES])) for group in groups]
        num_rows = number_of(sum(map(len, groups)), "row")
        advice = "nothing to do if all are right"
        if counts.left_out is not None:
            advice = f"use the column that tells them apart: {shown_name(counts.left_out.column)}"
        found.append(
            _finding("several_answers", len(groups), firsts, examples, rows=num_rows, advice=advice)
        )
    return sorted(found, key=lambda finding: list(KINDS).index(finding.kind))


def find_between(first: "FileCounts", second: "FileCounts") -> list[Finding]:
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


def _about_reading(counts: "FileCounts") -> list[Finding]:
    """Return encoding, byte order mark, and what the reader did not take as written."""
    decoded, found = counts.decoded, [_finding("note", 1, note=note) for note in counts.notes]
    assert decoded is not None, "the file could be read"
    if counts.encoding_fault is not None:
        lines = decoded.damaged_lines or (decoded.first_foreign_line or 1,)
        fault, encoding = counts.encoding_fault.rstrip("."), decoded.encoding
        found.append(_finding("encoding", len(lines), lines, fault=fault, encoding=encoding))
    elif decoded.has_mark:
        found.append(_finding("byte_order_mark", 1, (1,)))
    return found


def _about_columns(counts: "FileCounts") -> list[Finding]:
    """Return columns that are missing or left out, with what to type, and fields left empty."""
    layout, form = counts.layout, counts.row_format.format
    found = []
    if layout is None or (counts.row_format.response_column and layout.response is None):
        words = "type" if form == "auto" else f"leave --format {form} out, or type in its place"
        advice = f"{words}: {suggest_flags(list(counts.columns), counts.row_format)}"
        found.append(_finding("missing_column", 1, fault=counts.columns_fault, advice=advice))
    if layout is None:
        return found
    if counts.left_out is not None:
        column, num, _ = counts.left_out
        advice = counts.left_out.remedy
        name = shown_name(column)
        found.append(_finding("left_out", num, of=counts.num_used, column=name, advice=advice))
    advice = "fill the field or delete the rows"
    lacking = [
        ("untrained_turn" if is_asked_for else "empty_field", len(places), places, reason, advice)
        for (reason, is_asked_for), places in counts.lacking.items()
    ]
    if not counts.has_answers and counts.num_used:
        reason = "no answer in the whole file"
        advice = "nothing to do for --do_predict, which answers them; training needs answers"
        if layout.response is None and layout.conversation is None:
            advice += f": {suggest_flags(list(counts.columns), counts.row_format)}"
        lacking.append(("no_answers", counts.num_used, [], reason, advice))
    for kind, count, places, reason, advice in lacking:
        found.append(
            _finding(kind, count, places, of=counts.num_made, reason=reason, advice=advice)
        )
    return found


def _about_lengths(counts: "FileCounts", context: int) -> list[Finding]:
    """Return what is cut, with limits that the base model reads, and rows that it does not."""
    found = []
    wanted = [sufficient_limit(side.lengths, side.limit, side.reserve) for side in counts.sides]
    for (noun, flag, limit, reserve, lengths), longer, other in zip(
        counts.sides, wanted, reversed(wanted), strict=True
    ):
        num_cut = int((lengths > limit - reserve).sum())
        if num_cut:
            room = max(context // 2, context - other)  # both limits together fit the base model
            best = max(limit, min(longer, room))
            left = cut_share(lengths, best, reserve)
            advice = f"{flag} {best} cuts {as_percent(left) if left else 'none'}"
            if best < longer:
                advice += f"; more does not fit the {context:,} tokens of the base model"
            found.append(
                _finding(
                    f"cut_{noun}",
                    num_cut,
                    of=len(lengths),
                    room=limit - reserve,
                    limit=limit,
                    advice=advice,
                )
            )
    prompts, answers = counts.sides
    room = context - prompts.reserve - answers.reserve
    num_beyond = int((prompts.lengths + answers.lengths > room).sum())
    if num_beyond:
        found.append(_finding("beyond_context", num_beyond, of=counts.num_used, context=context))
    return found


def shown_name(name: str) -> str:
    r"""Return a name as it can be shown on one line of any terminal, 40 characters at most.

    >>> shown_name("summary"), shown_name("a\nb")
    ('summary', "'a\\nb'")
    """
    short = name if len(name) <= 40 else f"{name[:37]}..."
    return short if short.isprintable() and short.strip() else repr(short)
