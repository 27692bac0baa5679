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
from typing import Any, TypedDict

from ptuning.data.checking.check import find_placeholders
from ptuning.data.formats import Layout, to_text_rows
from ptuning.data.prompts import ALPACA, RowFormat, Template, TextRow, build_alpaca, build_rounds
from ptuning.data.raw_file import RawRow
from ptuning.data.reading import ORIGIN, FileRows, is_contract, read_rows
from ptuning.output import Progress


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
    kept, sources = [], []
    with Progress(len(read.kept), f"converting {path.name}", leave=False) as progress:
        for row, raw_row in zip(read.kept, read.sources, strict=True):
            reason = _obstacle(row, read.layout, template)
            if reason is None:
                kept.append(row)
                sources.append(raw_row)
                made.rows.append(_to_contract(raw_row, read.layout, row, template))
                texts = (row.prompt, row.response, *(text for turn in row.history for text in turn))
                for name in dict.fromkeys(chain.from_iterable(map(find_placeholders, texts))):
                    made.placeholders[name].append(row.line)
            else:
                read.dropped[reason].append(row.line)
            progress.update()
    read.kept, read.sources = kept, sources
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
