"""Files of any known format to rows of the row contract, each converted or rejected with a reason.

The contract: {"id", "prompt", "response", "history": [[q, a], ...], "source", "meta": {...}}.
Rejected is what training would stop at or drop, so that a converted file is trained on completely.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, TypedDict

from ptuning.data.checking.check import find_placeholders
from ptuning.data.formats import Layout, to_text_rows
from ptuning.data.mixing import MixSource, draw_rows, parse_mix
from ptuning.data.prompts import ALPACA, RowFormat, Template, TextRow, build_alpaca, build_rounds
from ptuning.data.raw_file import RawRow
from ptuning.data.reading import ORIGIN, FileRows, is_contract, read_rows
from ptuning.output import Progress

MIX_FORM = "FILE:SHARE,FILE:SHARE, such as a.jsonl:0.7,b.jsonl:0.3"
_SHARE = re.compile(r"\s*(.+?):\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?:,|$)")


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
    """Convert every row of a file, or reject it with a reason and continue.

    DataError for a file of which nothing can be read, or whose columns have no known meaning.
    keep_unanswered keeps rows without an answer, with the response "".
    """
    read = read_rows(path, row_format, for_training=not keep_unanswered, strict=False)
    made = Conversion(path, read)
    kept = []
    with Progress(len(read.kept), f"converting {path.name}", leave=False) as progress:
        for row, raw_row in zip(read.kept, read.sources, strict=True):
            reason = _obstacle(row, read.layout, template)
            if reason is None:
                kept.append(row)
                made.rows.append(_to_contract(raw_row, read.layout, row, template))
                texts = (row.prompt, row.response, *(text for turn in row.history for text in turn))
                for name in dict.fromkeys(chain.from_iterable(map(find_placeholders, texts))):
                    made.placeholders[name].append(row.line)
            else:
                read.dropped[reason].append(row.line)
            progress.update()
    read.kept = kept
    return made


def _obstacle(row: TextRow, layout: Layout, template: Template) -> str | None:
    """Say why a row is rejected; None if it is not."""
    if row.skipped is not None or not row.prompt.strip():
        return layout.lack(row)
    if template in ALPACA and row.history:
        return f"earlier turns, which {template} has no place for: use --template plain or round"
    return None


def _to_contract(raw_row: RawRow, layout: Layout, row: TextRow, template: Template) -> ContractRow:
    """Return a row of the contract; meta holds every filled column that is not used.

    A row of the contract keeps its id, source and meta; others are named by their file and line.
    """
    prompt, history = row.prompt, row.history
    if template in ALPACA:
        prompt = build_alpaca(*split_input(raw_row, layout, row), template)
    elif template == "round" and history:
        prompt, history = build_rounds(prompt, history), ()
    columns = raw_row.columns
    turn = "" if layout.conversation is None else f".{len(row.history) + 1}"
    stem = Path(re.sub(r"\.gz$", "", raw_row.path.name, flags=re.IGNORECASE)).stem
    row_id, source, meta = f"{stem}:{row.line}{turn}", raw_row.path.name, {}
    used = set(layout.columns.values())
    if is_contract(columns):
        row_id, source, meta = columns["id"], columns["source"], columns["meta"]
        used |= {*ORIGIN}
    unused = {
        column: value
        for column, value in columns.items()
        if column not in used and value not in (None, "", [], {})
    }
    return ContractRow(
        id=str(row_id),
        prompt=prompt,
        response=row.response,
        history=[list(turn) for turn in history],
        source=str(source),
        meta=meta | unused,
    )


def split_input(raw_row: RawRow, layout: Layout, row: TextRow) -> tuple[str, str]:
    """Return the instruction and its input, "" for none, which `row.prompt` joins."""
    if layout.input is None:
        return row.prompt, ""
    instruction = to_text_rows(raw_row, replace(layout, input=None))[0].prompt
    text = to_text_rows(raw_row, Layout("columns", prompt=layout.input))[0].prompt
    return (instruction, text) if instruction.strip() and text.strip() else (row.prompt, "")


def number_repeats(rows: Sequence[ContractRow]) -> list[str]:
    """Make the ids of rows unique by adding +1, +2, ...; return the ids that repeated.

    >>> rows = [ContractRow(id="a:1"), ContractRow(id="a:1")]
    >>> number_repeats(rows), rows[1]["id"]
    (['a:1'], 'a:1+1')
    """
    taken = {row["id"] for row in rows}
    repeats: dict[str, int] = {}  # the last number added to an id
    for row in rows:
        row_id = row["id"]
        if row_id not in repeats:
            repeats[row_id] = 0
            continue
        while row["id"] in taken:
            repeats[row_id] += 1
            row["id"] = f"{row_id}+{repeats[row_id]}"
        taken.add(row["id"])
    return [row_id for row_id, last in repeats.items() if last]


# Mixing


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
        raise ValueError(f"--mix is {given}; give {MIX_FORM}.")
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


def mix_files(
    files: Sequence[Sequence[ContractRow]], counts: Sequence[int], seed: int
) -> list[ContractRow]:
    """Draw that many rows of each file, as `mixing.mix_rows` does, in a random order."""
    keys = Random(seed)
    drawn: list[ContractRow] = []
    for rows, wanted in zip(files, counts, strict=True):
        rounds, rest = draw_rows(len(rows), wanted, keys)
        drawn += [row.copy() for _ in range(rounds) for row in rows]
        drawn += [rows[index].copy() for index in rest]
    order = [keys.random() for _ in drawn]
    return [drawn[index] for index in sorted(range(len(drawn)), key=order.__getitem__)]
