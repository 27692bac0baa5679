"""Files of any known format to rows of the row contract, each converted or rejected with a reason.

The contract: {"id", "prompt", "response", "history": [[q, a], ...], "source", "meta": {...}}. What
is rejected is what training would stop at or leave out, so that a converted file trains whole.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypedDict

from ptuning.data.checking.check import find_placeholders
from ptuning.data.formats import Layout, to_text_rows
from ptuning.data.mixing import MixSource, draw_rows, parse_mix
from ptuning.data.prompts import ALPACA, RowFormat, Template, TextRow, build_alpaca, build_rounds
from ptuning.data.raw_file import RawRow
from ptuning.data.reading import ORIGIN, FileRows, is_contract, read_rows
from ptuning.output import Progress

MIX_FORM = "FILE:SHARE,FILE:SHARE, such as a.jsonl:0.7,b.jsonl:0.3"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class ContractRow(TypedDict):
    """A line of a converted file; the names are a file format."""

    id: str
    prompt: str
    response: str
    history: list[list[str]]
    source: str
    meta: dict[str, Any]


@dataclass
class Conversion:
    """A file as it was read, and the rows of the contract that it became.

    What is rejected is in `read.dropped`; placeholders: places by name.
    """

    path: Path
    read: FileRows
    rows: list[ContractRow] = field(default_factory=list)
    placeholders: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @property
    def num_rejected(self) -> int:
        """Rows, or answers of conversations, that were not converted."""
        return sum(map(len, self.read.dropped.values()))


def convert_file(
    path: Path,
    row_format: RowFormat,
    *,
    template: Template = "plain",
    keep_unanswered: bool = False,
) -> Conversion:
    """Convert every row of a file, or reject it under a reason; a fault does not end the reading.

    DataError for a file of which nothing can be read, or whose columns have no known meaning.
    keep_unanswered keeps rows without an answer, with the response "".
    """
    read = read_rows(path, row_format, for_training=not keep_unanswered, strict=False)
    made = Conversion(path, read)
    kept = []
    with Progress(len(read.kept), f"converting {path.name}", leave=False) as progress:
        for row, source in zip(read.kept, read.sources, strict=True):
            if _add(made, source, row, template):
                kept.append(row)
            progress.update()
    read.kept = kept
    return made


def _add(made: Conversion, raw_row: RawRow, row: TextRow, template: Template) -> bool:
    """Add a row of the contract, unless it has no prompt or the template no place for all of it."""
    reason = row.skipped
    if reason is None and not row.prompt.strip():
        reason = made.read.layout.lack(row)
    elif reason is None and template in ALPACA and row.history:
        reason = f"earlier turns, which {template} has no place for: use --template plain or round"
    if reason is not None:
        made.read.dropped[reason].append(row.line)
        return False
    texts = (row.prompt, row.response, *(text for turn in row.history for text in turn))
    for name in dict.fromkeys(name for text in texts for name in find_placeholders(text)):
        made.placeholders[name].append(row.line)
    prompt, history = row.prompt, row.history
    if template in ALPACA:
        prompt = build_alpaca(*split_input(raw_row, made.read.layout, row), template)
    elif template == "round" and history:
        prompt, history = build_rounds(prompt, history), ()
    row_id, source, meta = _origin(made, raw_row, row)
    made.rows.append(
        ContractRow(
            id=row_id,
            prompt=prompt,
            response=row.response,
            history=[list(turn) for turn in history],
            source=source,
            meta=meta,
        )
    )
    return True


def _origin(made: Conversion, raw_row: RawRow, row: TextRow) -> tuple[str, str, dict[str, Any]]:
    """Return id, source and meta: those of a row of the contract, else where the row was found.

    meta holds every filled column that is not used.
    """
    columns = raw_row.columns
    has_origin = is_contract(columns)
    used = {*made.read.layout.columns.values(), *(ORIGIN if has_origin else ())}
    meta = dict(columns["meta"]) if has_origin else {}
    meta |= {
        column: value
        for column, value in columns.items()
        if column not in used and value not in (None, "", [], {})
    }
    if has_origin:
        return str(columns["id"]), str(columns["source"]), meta
    name = made.path.name
    stem = Path(name[:-3] if name.lower().endswith(".gz") else name).stem
    turn = "" if made.read.layout.conversation is None else f".{len(row.history) + 1}"
    return f"{stem}:{row.line}{turn}", name, meta


def number_repeats(rows: Sequence[ContractRow]) -> list[str]:
    """Give rows with the id of an earlier row an id of their own; return the ids that repeat.

    >>> rows = [ContractRow(id="a:1"), ContractRow(id="a:1")]
    >>> number_repeats(rows), rows[1]["id"]
    (['a:1'], 'a:1+1')
    """
    taken = {row["id"] for row in rows}
    seen: dict[str, int] = {}
    for row in rows:
        row_id = row["id"]
        if row_id not in seen:
            seen[row_id] = 0
            continue
        while row["id"] in taken:
            seen[row_id] += 1
            row["id"] = f"{row_id}+{seen[row_id]}"
        taken.add(row["id"])
    return [row_id for row_id, times in seen.items() if times]


# Templates


def split_input(raw_row: RawRow, layout: Layout, row: TextRow) -> tuple[str, str]:
    """Return the instruction and what it is about, which `row.prompt` joins; "" where nothing."""
    if layout.input is None:
        return row.prompt, ""
    alone = to_text_rows(raw_row, replace(layout, input=None))[0].prompt
    text = to_text_rows(raw_row, Layout("columns", prompt=layout.input))[0].prompt
    if not alone.strip() or not text.strip():
        return row.prompt, ""
    return alone, text


# Mixing


def parse_shares(given: str) -> list[MixSource]:
    """Read `FILE:SHARE,FILE:SHARE`; FILE may hold colons and commas. The shares must sum to 1.

    >>> [(str(source.path), source.share) for source in parse_shares("a,b.json:0.7,c.csv:0.3")]
    [('a,b.json', 0.7), ('c.csv', 0.3)]
    """
    sources = []
    part = ""
    for piece in given.split(","):
        part = f"{part},{piece}" if part else piece.strip()
        name, separator, number = part.rpartition(":")
        if separator and name and _NUMBER.fullmatch(number.strip()):
            sources.append(parse_mix(part))
            part = ""
    if part or not sources:
        raise ValueError(f"--mix is {given}; give {MIX_FORM}.")
    total = sum(source.share for source in sources)
    if abs(total - 1) > 1e-6:
        shares = " + ".join(f"{source.share:g}" for source in sources)
        raise ValueError(f"--mix: the shares are {shares} = {total:g}; make them sum to 1.")
    return sources


def share_out(total: int, shares: Sequence[float]) -> list[int]:
    """Return how many of total rows each share is, by largest remainder: they sum to total.

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
    """Return the most rows that files of these sizes give in these shares, no row twice.

    >>> largest_total([700, 1000], [0.7, 0.3]), largest_total([10, 10], [0.7, 0.3])
    (1000, 14)
    """
    total = min(int((size + 1) / share) for size, share in zip(sizes, shares, strict=True))
    while any(wanted > size for wanted, size in zip(share_out(total, shares), sizes, strict=True)):
        total -= 1
    return total


class Drawn(NamedTuple):
    """The rows of a mixture, and how many each file gave."""

    rows: list[ContractRow]
    counts: list[int]


def mix_files(
    files: Sequence[Sequence[ContractRow]], shares: Sequence[float], *, total: int, seed: int
) -> Drawn:
    """Draw total rows in these shares, in an order of the seed's.

    Where more are needed than a file has, all are taken as often as they fit in, and the rest is
    drawn, as `mixing.mix_rows` does.
    """
    keys = Random(seed)
    counts = share_out(total, shares)
    drawn: list[ContractRow] = []
    for rows, wanted in zip(files, counts, strict=True):
        rounds, rest = draw_rows(len(rows), wanted, keys)
        drawn += [row.copy() for _ in range(rounds) for row in rows]
        drawn += [rows[index].copy() for index in rest]
    order = [keys.random() for _ in drawn]
    return Drawn([drawn[index] for index in sorted(range(total), key=order.__getitem__)], counts)
