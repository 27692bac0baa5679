"""What was counted in data files, put in words: each finding with where it is and what to do.

A problem makes training refuse, drop or mislearn rows, or makes scores untrue; a notice does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ptuning.data.check_counts import MOST_EXAMPLES, FileCounts, Tally
from ptuning.data.check_lengths import (
    ANSWER_RESERVE,
    PROMPT_RESERVE,
    cut_share,
    sufficient_limit,
)
from ptuning.data.encoding import GBK, UTF_8, conversion_command
from ptuning.data.reading import PROMPT_NAMES, RESPONSE_NAMES, guess_column

PROBLEMS = {  # kind of finding -> what it is
    "unreadable": "a file that cannot be opened, or has no row that can be read (exit status 2)",
    "encoding": "another encoding than UTF-8, or bytes that fit none",
    "broken_row": "a row that is no JSON object or CSV line, or has a field that is no text",
    "missing_column": "a column that no row has",
    "empty_field": "rows without a prompt or an answer, which training drops",
    "no_tokens": "a prompt or answer of invisible characters, which yields no token",
    "lost_character": "U+FFFD, where a character was lost in an earlier conversion",
    "control_text": "control tokens written out in the text",
    "unknown_mark": "<UNK> in answers",
    "unknown_token": "characters that the tokenizer turns into its unknown token",
    "duplicate_row": "the same prompt and answer more than once in a file",
    "shared_row": "the same prompt and answer in two files",
}
NOTICES = {
    "byte_order_mark": "a byte order mark",
    "unknown_mark_prompt": "<UNK> in prompts",
    "spelled_character": "characters without a token of their own, which take one for each byte",
    "several_answers": "prompts with different answers in a file",
    "shared_prompt": "the same prompt in two files, with different answers",
    "cut_prompt": "prompts longer than --max_source_length leaves",
    "cut_answer": "answers longer than --max_target_length leaves",
}


@dataclass(frozen=True)
class Finding:
    """One thing found in a file or a pair of files.

    count: rows, lines or prompts, as message says. places: the first few lines (rows, in a file of
    one line), in the file that `report` names it under. examples: the same in words, where places
    do not say all. remedy: what to do.
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


def find_in_file(
    counts: FileCounts, *, max_source_length: int, max_target_length: int
) -> list[Finding]:
    """Return what was found in one file, problems first."""
    if counts.unreadable is not None:
        remedy = "mend or leave out this file"
        return [Finding("unreadable", 1, counts.unreadable, remedy)]
    found = [
        *_about_encoding(counts),
        *_about_rows(counts),
        *_about_text(counts),
        *_about_repeats(counts),
        *_about_lengths(counts, max_source_length, max_target_length),
    ]
    return sorted(found, key=lambda finding: not finding.is_problem)


def find_between(first: FileCounts, second: FileCounts) -> list[Finding]:
    """Return which rows and prompts two files share."""
    found = []
    rows = first.rows.keys() & second.rows.keys()
    row_prompts = {row[: len(row) // 2] for row in rows}
    prompts = (first.prompts.keys() & second.prompts.keys()) - row_prompts
    if rows:
        found.append(
            Finding(
                "shared_row",
                len(rows),
                f"in both: {_number(len(rows), 'row')}",
                "delete them from one of the two; scores on rows that were trained on are untrue",
                *_pairs(first, second, first.rows, second.rows, rows),
            )
        )
    if prompts:
        found.append(
            Finding(
                "shared_prompt",
                len(prompts),
                f"in both, with different answers: {_number(len(prompts), 'prompt')}",
                "delete them from one of the two if scores should be on prompts never seen",
                *_pairs(first, second, first.prompts, second.prompts, prompts),
            )
        )
    return found


def _pairs(
    first: FileCounts,
    second: FileCounts,
    first_places: dict[bytes, int],
    second_places: dict[bytes, int],
    keys: set[bytes],
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the first few places in the first file, and each beside its place in the second."""
    earliest = sorted(keys, key=lambda key: first_places[key])[:MOST_EXAMPLES]
    words = tuple(
        f"{first.place_name} {first_places[key]} = {second.place_name} {second_places[key]}"
        for key in earliest
    )
    return tuple(first_places[key] for key in earliest), words


def _about_encoding(counts: FileCounts) -> list[Finding]:
    found = []
    if counts.encoding != UTF_8:
        name = "GBK (read as GB18030)" if counts.encoding == GBK else counts.encoding
        command = conversion_command(counts.path, counts.encoding)
        found.append(
            Finding(
                "encoding",
                1,
                f"written in {name}, which training refuses",
                f"convert it: {command}",
            )
        )
    if counts.damaged_lines:
        found.append(
            Finding(
                "encoding",
                len(counts.damaged_lines),
                f"bytes that are not {counts.encoding}, here read as U+FFFD; training refuses them",
                f"mend these lines and save the file as {UTF_8}",
                counts.damaged_lines,
            )
        )
    if counts.encoding == UTF_8 and counts.has_mark:
        found.append(
            Finding(
                "byte_order_mark",
                1,
                "begins with a byte order mark (BOM)",
                "nothing to do here; other programs may take it for text",
                (1,),
            )
        )
    return found


def _about_rows(counts: FileCounts) -> list[Finding]:
    found = []
    if counts.broken.count:
        found.append(
            Finding(
                "broken_row",
                counts.broken.count,
                f"broken, and training stops at the first: {_number(counts.broken.count, 'row')}",
                "mend or delete them",
                tuple(counts.broken.places),
                tuple(counts.broken_messages),
            )
        )
    missing = counts.missing_columns()
    if missing:
        found.append(_missing_columns(counts, missing))
    gone = {column for _, column in missing}
    for column, tally in counts.empty.items():
        if column not in gone and not gone & {counts.columns.prompt, counts.columns.response}:
            found.append(
                _tallied(
                    counts,
                    "empty_field",
                    tally,
                    f'empty "{shown_name(column)}", dropped by training',
                    "fill the field or delete the rows",
                )
            )
    return found


def _missing_columns(counts: FileCounts, missing: list[tuple[str, str]]) -> Finding:
    """Say which columns are there, and what to type if one of them is similar or usual."""
    there = list(counts.column_rows)
    taken = [c for c in (counts.columns.prompt, counts.columns.response) if c in there]
    usual = {"--prompt_column": PROMPT_NAMES, "--response_column": RESPONSE_NAMES}
    flags = []
    for flag, column in missing:
        free = [name for name in there if name not in taken]
        guess = guess_column(column, free, usual.get(flag, ()))
        flags.append(f"{flag} {guess if guess is not None else 'NAME'}")
        taken += [] if guess is None else [guess]
    names = " and ".join(f'"{column}"' for _, column in missing)
    return Finding(
        "missing_column",
        len(missing),
        f"no column {names}; here are: {', '.join(map(shown_name, there)) or 'none'}",
        f"name {'it' if len(missing) == 1 else 'them'}: {' '.join(flags)}",
    )


def _about_text(counts: FileCounts) -> list[Finding]:
    mistaught = "replace it by the word it stands for, or delete the rows: it is learnt as text"
    tallies = [
        (
            "no_tokens",
            counts.invisible,
            "a prompt or an answer of invisible characters only",
            "delete them",
        ),
        (
            "lost_character",
            counts.lost_characters,
            "U+FFFD in the text, where a character was lost",
            "convert the original file again, from the encoding it is really in",
        ),
        (
            "control_text",
            counts.control_rows,
            "a control token written out, plain text here but not in the published code",
            "delete these words from the text",
        ),
        ("unknown_mark", counts.unknown_answers, "<UNK> in the answer", mistaught),
        (
            "unknown_token",
            counts.unknown_ids,
            "characters that the tokenizer cannot write",
            "replace these characters, or use the vocabulary of ChatGLM-6B",
        ),
        (
            "unknown_mark_prompt",
            counts.unknown_prompts,
            "<UNK> in the prompt",
            "nothing to do if prompts will look so in use",
        ),
        (
            "spelled_character",
            counts.spelled_rows,
            "characters without a token, which take one for each byte",
            "nothing to do if few; if many, check that this is your base's tokenizer",
        ),
    ]
    extra = {"control_text": _most_written(counts), "spelled_character": _most_spelled(counts)}
    return [
        _tallied(counts, kind, tally, words, remedy, examples=extra.get(kind, ()))
        for kind, tally, words, remedy in tallies
        if tally.count
    ]


def _most_written(counts: FileCounts) -> tuple[str, ...]:
    names = sorted(counts.control_names.items(), key=lambda item: -item[1].count)
    return tuple(
        f"{name} in {_number(tally.count, 'row')}" for name, tally in names[:MOST_EXAMPLES]
    )


def _most_spelled(counts: FileCounts) -> tuple[str, ...]:
    most = counts.spelled_characters.most_common(MOST_EXAMPLES)
    return tuple(f"{shown_name(character)} x {count:,}" for character, count in most)


def _about_repeats(counts: FileCounts) -> list[Finding]:
    found = []
    if counts.duplicates.count:
        place = counts.place_name
        found.append(
            _tallied(
                counts,
                "duplicate_row",
                counts.duplicates,
                "the prompt and answer of an earlier row",
                "delete the copies: they count twice in training and in scores",
                examples=tuple(
                    f"{place} {later} = {place} {earlier}"
                    for later, earlier in counts.duplicate_pairs
                ),
            )
        )
    if counts.contested:
        groups = list(counts.contested.values())
        num_rows = sum(map(len, groups))
        found.append(
            Finding(
                "several_answers",
                len(groups),
                f"different answers to one prompt: {_number(len(groups), 'prompt')}, "
                f"{_number(num_rows, 'row')}",
                "nothing to do if all are right",
                tuple(group[0] for group in groups[:MOST_EXAMPLES]),
                tuple(
                    ", ".join(map(str, group[:MOST_EXAMPLES])) for group in groups[:MOST_EXAMPLES]
                ),
            )
        )
    return found


def _about_lengths(counts: FileCounts, max_source: int, max_target: int) -> list[Finding]:
    found = []
    for kind, noun, lengths, flag, limit, reserve in (
        ("cut_prompt", "prompt", counts.prompt_lengths, "--max_source_length", max_source,
         PROMPT_RESERVE),
        ("cut_answer", "answer", counts.answer_lengths, "--max_target_length", max_target,
         ANSWER_RESERVE),
    ):  # fmt: skip
        num_cut = int((lengths > limit - reserve).sum())
        if num_cut:
            longer = sufficient_limit(lengths, limit, reserve)
            left = cut_share(lengths, longer, reserve)
            found.append(
                Finding(
                    kind,
                    num_cut,
                    f"longer than the {limit - reserve} tokens of {flag} {limit}: "
                    f"{_number(num_cut, noun)} ({as_percent(num_cut / len(lengths))})",
                    f"{flag} {longer} cuts {as_percent(left) if left else 'none'}",
                )
            )
    return found


def _tallied(
    counts: FileCounts,
    kind: str,
    tally: Tally,
    words: str,
    remedy: str,
    *,
    examples: tuple[str, ...] = (),
) -> Finding:
    share = as_percent(tally.count / counts.num_read)
    message = f"{words}: {_number(tally.count, 'row')} ({share})"
    return Finding(kind, tally.count, message, remedy, tuple(tally.places), examples)


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def as_percent(share: float) -> str:
    """Return a share, 0 to 1, in per cent; only what is nothing reads 0.0%.

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


def count_problems(findings: Sequence[Finding]) -> int:
    """Return how many of the findings are problems."""
    return sum(finding.is_problem for finding in findings)
