"""What `data check` can find in a file or a pair of files: one table, and the findings."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptuning.data.encoding import GBK, UTF_8, conversion_command
from ptuning.data.reading import PROMPT_NAMES, RESPONSE_NAMES, guess_column

if TYPE_CHECKING:  # check.py imports the tokenizer, which --help does not need
    from ptuning.data.check import FileCounts

MOST_EXAMPLES = 5  # places and examples listed for one finding
TABLE_LENGTHS = (64, 128, 256, 512, 1024)
PROMPT_RESERVE = 1  # of --max_source_length: [gMASK]
ANSWER_RESERVE = 2  # of --max_target_length: <sop> and <eop>; see tokenization.to_training_batch


class Kind(NamedTuple):
    """A row of the table. sentence and remedy are templates: `_finding` fills in the braces."""

    meaning: str  # as --help lists it
    sentence: str
    remedy: str


# Problems cause rows to be rejected, dropped or learned wrongly, or bias the scores.
_PROBLEMS = {
    "unreadable": Kind(
        "a file that cannot be opened, or has no row that can be read (exit status 2)",
        "{fault}",
        "mend or leave out this file",
    ),
    "encoding": Kind("another encoding than UTF-8, or bytes that fit none", "{fault}", "{cure}"),
    "broken_row": Kind(
        "a row that is no JSON object or CSV line, or has a field that is no text",
        "broken, and training stops at the first: {rows}",
        "mend or delete them",
    ),
    "missing_column": Kind(
        "a column that no row has",
        "no column {missing}; here are: {present}",
        "name {them}: {flags}",
    ),
    "empty_field": Kind(
        "rows without a prompt or an answer, which training drops",
        'empty "{column}", dropped by training: {rows} ({share})',
        "fill the field or delete the rows",
    ),
    "no_tokens": Kind(
        "a prompt or answer of invisible characters, which yields no token",
        "a prompt or an answer of invisible characters only: {rows} ({share})",
        "delete them",
    ),
    "lost_character": Kind(
        "U+FFFD, where a character was lost in an earlier conversion",
        "U+FFFD in the text, where a character was lost: {rows} ({share})",
        "convert the original file again, from the encoding it is really in",
    ),
    "control_text": Kind(
        "control tokens written out in the text",
        "a control token written out, plain text here but not in the published code: {rows} "
        "({share})",
        "delete these words from the text",
    ),
    "unknown_mark": Kind(
        "<UNK> in answers",
        "<UNK> in the answer: {rows} ({share})",
        "replace it by the word it stands for, or delete the rows: it is learnt as text",
    ),
    "unknown_token": Kind(
        "characters that the tokenizer turns into its unknown token",
        "characters that the tokenizer cannot write: {rows} ({share})",
        "replace these characters, or use the vocabulary of ChatGLM-6B",
    ),
    "duplicate_row": Kind(
        "the same prompt and answer more than once in a file",
        "the prompt and answer of an earlier row: {rows} ({share})",
        "delete the copies: they count twice in training and in scores",
    ),
    "shared_row": Kind(
        "the same prompt and answer in two files",
        "in both: {rows}",
        "delete them from one of the two; scores on rows that were trained on are untrue",
    ),
}
# Notices are informational.
_NOTICES = {
    "byte_order_mark": Kind(
        "a byte order mark",
        "begins with a byte order mark (BOM)",
        "nothing to do here; other programs may take it for text",
    ),
    "unknown_mark_prompt": Kind(
        "<UNK> in prompts",
        "<UNK> in the prompt: {rows} ({share})",
        "nothing to do if prompts will look so in use",
    ),
    "spelled_character": Kind(
        "characters without a token of their own, which take one for each byte",
        "characters without a token, which take one for each byte: {rows} ({share})",
        "nothing to do if few; if many, check that this is your base's tokenizer",
    ),
    "several_answers": Kind(
        "prompts with different answers in a file",
        "different answers to one prompt: {prompts}, {rows}",
        "nothing to do if all are right",
    ),
    "shared_prompt": Kind(
        "the same prompt in two files, with different answers",
        "in both, with different answers: {prompts}",
        "delete them from one of the two if scores should be on prompts never seen",
    ),
    "cut_prompt": Kind(
        "prompts longer than --max_source_length leaves",
        "longer than the {room} tokens of --max_source_length {limit}: {prompts} ({share})",
        "--max_source_length {longer} cuts {left}",
    ),
    "cut_answer": Kind(
        "answers longer than --max_target_length leaves",
        "longer than the {room} tokens of --max_target_length {limit}: {answers} ({share})",
        "--max_target_length {longer} cuts {left}",
    ),
}
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

    @property
    def is_problem(self) -> bool:
        """Whether --strict fails on it."""
        return self.kind in PROBLEMS


def _finding(
    kind: str,
    count: int,
    places: Iterable[int] = (),
    examples: Iterable[str] = (),
    **words: object,
) -> Finding:
    """Make a finding of the table's sentence and remedy."""
    nouns = {f"{noun}s": _number(count, noun) for noun in ("row", "prompt", "answer")}
    words = nouns | words
    sentence, remedy = KINDS[kind].sentence.format(**words), KINDS[kind].remedy.format(**words)
    return Finding(kind, count, sentence, remedy, tuple(places), tuple(examples))


def find_in_file(counts: "FileCounts") -> list[Finding]:
    """Return what was found in one file, problems first."""
    if counts.unreadable is not None:
        return [_finding("unreadable", 1, fault=counts.unreadable)]
    found = [*_about_encoding(counts), *_about_columns(counts), *_about_lengths(counts)]
    for kind, tally in counts.tallies.items():
        share = as_percent(tally.count / counts.num_read)
        examples = tally.examples
        if kind == "control_text":
            most = counts.control_names.most_common(MOST_EXAMPLES)
            examples = [f"{name} in {_number(count, 'row')}" for name, count in most]
        if kind == "spelled_character":
            most = counts.spelled_characters.most_common(MOST_EXAMPLES)
            examples = [f"{shown_name(character)} x {count:,}" for character, count in most]
        found.append(_finding(kind, tally.count, tally.places, examples, share=share))
    if counts.contested:
        groups = list(counts.contested.values())
        first = groups[:MOST_EXAMPLES]
        found.append(
            _finding(
                "several_answers",
                len(groups),
                [group[0] for group in first],
                [", ".join(map(str, group[:MOST_EXAMPLES])) for group in first],
                rows=_number(sum(map(len, groups)), "row"),
            )
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
            earliest = sorted(keys, key=places.__getitem__)[:MOST_EXAMPLES]
            pairs = [
                f"{first.place_name} {places[key]} = {second.place_name} {others[key]}"
                for key in earliest
            ]
            found.append(_finding(kind, len(keys), [places[key] for key in earliest], pairs))
    return found


def _about_encoding(counts: "FileCounts") -> list[Finding]:
    found = []
    if counts.encoding != UTF_8:
        name = "GBK (read as GB18030)" if counts.encoding == GBK else counts.encoding
        fault = f"written in {name}, which training refuses"
        cure = f"convert it: {conversion_command(counts.path, counts.encoding)}"
        found.append(_finding("encoding", 1, fault=fault, cure=cure))
    if counts.damaged_lines:
        lines = counts.damaged_lines
        fault = f"bytes that are not {counts.encoding}, here read as U+FFFD; training refuses them"
        cure = f"mend these lines and save the file as {UTF_8}"
        found.append(_finding("encoding", len(lines), lines, fault=fault, cure=cure))
    if counts.encoding == UTF_8 and counts.has_mark:
        found.append(_finding("byte_order_mark", 1, (1,)))
    return found


def _about_columns(counts: "FileCounts") -> list[Finding]:
    """Name missing columns, with what to type if a similar or usual one is there; empty fields."""
    found = []
    missing = counts.missing_columns()
    if missing:
        present = list(counts.column_rows)
        taken = {counts.row_format.prompt_column, counts.row_format.response_column}
        free = [column for column in present if column not in taken]
        usual = {"--prompt_column": PROMPT_NAMES, "--response_column": RESPONSE_NAMES}
        flags = []
        for flag, column in missing.items():
            guess = guess_column(column, free, usual.get(flag, ()))
            flags.append(f"{flag} {guess if guess is not None else 'NAME'}")
            free = [column for column in free if column != guess]
        found.append(
            _finding(
                "missing_column",
                len(missing),
                missing=" and ".join(f'"{column}"' for column in missing.values()),
                present=", ".join(map(shown_name, present)) or "none",
                them="it" if len(missing) == 1 else "them",
                flags=" ".join(flags),
            )
        )
    if not missing.keys() & {"--prompt_column", "--response_column"}:
        for column, tally in counts.empty.items():
            share = as_percent(tally.count / counts.num_read)
            name = shown_name(column)
            found.append(
                _finding("empty_field", tally.count, tally.places, column=name, share=share)
            )
    return found


def _about_lengths(counts: "FileCounts") -> list[Finding]:
    found = []
    for kind, lengths, limit, reserve in (
        ("cut_prompt", counts.prompt_lengths, counts.row_format.max_source_length, PROMPT_RESERVE),
        ("cut_answer", counts.answer_lengths, counts.row_format.max_target_length, ANSWER_RESERVE),
    ):
        num_cut = int((lengths > limit - reserve).sum())
        if num_cut:
            longer = sufficient_limit(lengths, limit, reserve)
            left = cut_share(lengths, longer, reserve)
            found.append(
                _finding(
                    kind,
                    num_cut,
                    room=limit - reserve,
                    limit=limit,
                    share=as_percent(num_cut / len(lengths)),
                    longer=longer,
                    left=as_percent(left) if left else "none",
                )
            )
    return found


def cut_share(lengths: np.ndarray, limit: int, reserve: int) -> float:
    """Return the share of lengths that do not fit in limit - reserve tokens, 0 to 1.

    >>> cut_share(np.array([62, 63, 64, 65]), 64, PROMPT_RESERVE)
    0.5
    """
    return float((lengths > limit - reserve).mean()) if len(lengths) else 0.0


def sufficient_limit(lengths: np.ndarray, limit: int, reserve: int) -> int:
    """Return the next round limit that cuts at most 1 % of the lengths, or what fits them all.

    >>> sufficient_limit(np.array([10, 100]), 64, 2), sufficient_limit(np.array([3000]), 64, 2)
    (128, 3002)
    """
    for longer in TABLE_LENGTHS:
        if longer > limit and cut_share(lengths, longer, reserve) <= 0.01:
            return longer
    return int(lengths.max()) + reserve


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def as_percent(share: float) -> str:
    """Return a share, 0 to 1, as a percentage; only zero reads 0.0%.

    >>> as_percent(0.5434), as_percent(0.0002), as_percent(0)
    ('54.3%', '<0.1%', '0.0%')
    """
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def shown_name(name: str) -> str:
    r"""Return a name as it can be shown on one line of any terminal, 40 characters at most.

    >>> shown_name("summary"), shown_name("a\nb")
    ('summary', "'a\\nb'")
    """
    short = name if len(name) <= 40 else f"{name[:37]}..."
    return short if short.isprintable() and short.strip() else repr(short)
