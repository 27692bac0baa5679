"""Rows of several files mixed by shares: --mix of main.py, and --mix of `data convert`.

main.py mixes general rows into the rows of a task: `FILE:RATIO`, one data set in a fixed order.
RATIO is the share of general rows among all rows of an epoch: 0.2 adds one general row for every
four of the task. Every epoch has all rows of the task and the same general rows, drawn by the seed,
so a resumed run continues exactly. `data convert` draws each file's share of one new file:
`FILE:SHARE,FILE:SHARE`.
"""

import re
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

FORM = "FILE:RATIO or FILE:RATIO:PROMPT,RESPONSE, such as general.jsonl:0.2"
SHARES_FORM = "FILE:SHARE,FILE:SHARE, such as a.jsonl:0.7,b.jsonl:0.3"
_SHARE = re.compile(r"\s*(.+?):\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?:,|$)")

Row = TypeVar("Row")


class MixSource(NamedTuple):
    """A file of general rows, their share of all rows, and their columns.

    columns holds the names for prompt, response and, as a third, history; () has them found.
    """

    path: Path
    share: float
    columns: tuple[str, ...] = ()


def parse_mix(text: str) -> MixSource:
    r"""Read `FILE:RATIO` or `FILE:RATIO:PROMPT,RESPONSE[,HISTORY]`; FILE may hold colons.

    ValueError for another form, or a ratio that is not between 0 and 1.

    >>> parse_mix(r"C:\data\general.jsonl:0.2:prompt,response").columns
    ('prompt', 'response')
    """
    rest, separator, last = text.rpartition(":")
    columns: tuple[str, ...] = ()
    if separator and _to_number(last) is None:
        columns = tuple(name.strip() for name in last.split(","))
        rest, separator, last = rest.rpartition(":")
        if len(columns) not in (2, 3) or not all(columns):
            separator = ""
    share = _to_number(last)
    if not (separator and rest) or share is None:
        raise ValueError(f"--mix is {text}; give {FORM}.")
    if not 0 < share < 1:
        raise ValueError(
            f"--mix is {text}, whose ratio is {last}; use a share of all rows between 0 and 1, "
            "such as 0.2 for one row in five."
        )
    return MixSource(Path(rest), share, columns)


def _to_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def draw_rows(size: int, wanted: int, keys: Random) -> tuple[int, list[int]]:
    """Return how often all of size rows are taken to make up wanted, and the rest that is drawn.

    >>> draw_rows(3, 7, Random(1))
    (2, [0])
    """
    rounds, missing = divmod(wanted, size)
    order = [keys.random() for _ in range(size)]  # random() alone: Python promises to keep it
    return rounds, sorted(range(size), key=order.__getitem__)[:missing]


# Shares of one new file


def parse_shares(given: str) -> list[MixSource]:
    """Read `FILE:SHARE,FILE:SHARE`; FILE may contain colons and commas. The shares must sum to 1.

    >>> [(str(source.path), source.share) for source in parse_shares("a,b.json:0.7,c.csv:0.3")]
    [('a,b.json', 0.7), ('c.csv', 0.3)]
    """
    sources: list[MixSource] = []
    end = 0
    while end < len(given) and (match := _SHARE.match(given, end)):
        sources.append(parse_mix(f"{match[1]}:{match[2]}"))
        end = match.end()
    if end < len(given) or not sources:
        raise ValueError(f"--mix is {given}; give {SHARES_FORM}.")
    total = sum(source.share for source in sources)
    if abs(total - 1) > 1e-6:
        shares = " + ".join(f"{source.share:g}" for source in sources)
        raise ValueError(f"--mix: the shares are {shares} = {total:g}; make them sum to 1.")
    return sources


def share_out(total: int, shares: Sequence[float]) -> list[int]:
    """Divide total rows by shares, rounding by largest remainder so that they sum to total.

    >>> share_out(10, [0.55, 0.45]), share_out(3, [0.5, 0.5])
    ([6, 4], [2, 1])
    """
    exact = [total * share for share in shares]
    counts = [int(value + 1e-9) for value in exact]  # 0.29 * 100 is 28.999999999999996
    by_rest = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_rest[: total - sum(counts)]:
        counts[index] += 1
    return counts


def largest_total(sizes: Sequence[int], shares: Sequence[float]) -> int:
    """Return the most rows that files of these sizes give in these shares without repeats.

    >>> largest_total([700, 1000], [0.7, 0.3]), largest_total([10, 10], [0.7, 0.3])
    (1000, 14)
    """
    total = min(int((size + 1) / share) for size, share in zip(sizes, shares, strict=True))
    while any(wanted > size for wanted, size in zip(share_out(total, shares), sizes, strict=True)):
        total -= 1
    return total


def mix_files(files: Sequence[Sequence[Row]], counts: Sequence[int], seed: int) -> list[Row]:
    """Draw that many rows of each file, all of them copies, in a random order."""
    keys = Random(seed)
    drawn: list[Row] = []
    for rows, wanted in zip(files, counts, strict=True):
        rounds, rest = draw_rows(len(rows), wanted, keys)
        drawn += [copy(row) for _ in range(rounds) for row in rows]
        drawn += [copy(rows[index]) for index in rest]
    order = [keys.random() for _ in drawn]
    return [drawn[index] for index in sorted(range(len(drawn)), key=order.__getitem__)]
