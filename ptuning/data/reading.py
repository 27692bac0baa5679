"""Steps 1 and 2 of 5: a data file to checked rows, or `file:line: what is wrong, what is needed`.

Nothing is dropped silently: a row that training cannot use is counted with its reason and line, and
so are unused columns. Every other fault ends the reading; `data check` and `data convert` continue
after it.
"""

import glob
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from ptuning.data.formats import TURN_KEYS, Layout, UnknownColumns, find_layout, to_text_rows
from ptuning.data.parsing import (
    HISTORY,
    INPUT_NAMES,
    PROMPT_NAMES,
    RESPONSE_NAMES,
    SYSTEM,
    TOOLS,
    TURN_NAMES,
    DataFile,
    open_data,
    parse_json,
)
from ptuning.data.prompts import RowFormat, TextRow, Turns
from ptuning.data.raw_file import MAX_PLACES, DataError, RawRow, as_places, number_of

# Columns that belong to a prompt if they are filled, and columns that never do
PROMPT_PARTS = {
    *(*PROMPT_NAMES, *INPUT_NAMES, *TURN_NAMES, SYSTEM, TOOLS),
    *("passage", "document", "background", "knowledge", "上下文", "背景"),
}
NEVER_PROMPT_PARTS = re.compile(
    rf"^({'|'.join(RESPONSE_NAMES)}|id|cot|meta.*)$|_id$|reject|chosen|reason|explan|analy|thought"
    r"|categ|type|label|tag|title|source|url|author|annotat|user|name|lang|time|date|_at$|score"
    r"|model|来源|类别|类型|分类|标签|标题|作者|时间|日期|理由|解释"
)
ORIGIN = ("id", "source", "meta")  # fields of the row contract that say where a row comes from
REPEATED_SHARE = 0.1  # share of rows above which another column is taken for a part of the prompt


class LeftOut(NamedTuple):
    """A filled column that is not used, though rows with the same prompt differ in it.

    flags: those that use the column; "" if it can only be joined to the prompt in the file.
    """

    column: str
    num_rows: int
    flags: str

    def __str__(self) -> str:
        """Say what is wrong."""
        return (
            f'{self.num_rows:,} rows differ only in the column "{self.column}", which is not used, '
            "so that one prompt has different answers"
        )

    @property
    def remedy(self) -> str:
        """Say what to do."""
        return f"use it: {self.flags}" if self.flags else "join it to the prompt in the file"


@dataclass
class FileRows:
    """The rows of a file that were kept, and what was left out of them and why.

    A place is a line, or the number of a row where unit is "row". sources: the raw row behind each
    row kept. dropped: places by reason. unused: columns, with the number of rows that fill them.
    leaks: places of rows whose history already holds their own question and answer.
    """

    layout: Layout
    unit: str
    kept: list[TextRow] = field(default_factory=list)
    sources: list[RawRow] = field(default_factory=list)
    num_read: int = 0  # rows of the file
    dropped: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    unused: dict[str, int] = field(default_factory=dict)
    leaks: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: LeftOut | None = None

    @property
    def num_made(self) -> int:
        """Rows that the file's rows became: more than those if it has conversations."""
        return len(self.kept) + sum(map(len, self.dropped.values()))

    def heading(self, num_kept: int, kept: str) -> str:
        """Say how many rows there are; kept is what became of num_kept."""
        made = "" if self.num_made == self.num_read else f", {self.num_made:,} answers in them"
        return f"{number_of(self.num_read, 'row')} read{made}, {num_kept:,} {kept}"

    def lines(self, *, left_out: str, most: int | None = MAX_PLACES) -> list[str]:
        """Say what was found and what was not used; left_out is the verb for rows not kept.

        most places are named for one reason; None names all.
        """
        lines = [f"format {self.layout}"]
        if self.unused:
            unused = [
                f"{name} (filled in {count:,} of {number_of(self.num_read, 'row')})"
                for name, count in self.unused.items()
            ]
            lines.append(f"columns not used: {', '.join(unused)}")
        lines += self.notes
        for reason, places in self.dropped.items():
            rows = f"{number_of(len(places), 'row')} ({len(places) / self.num_made:.1%})"
            where = as_places(sorted(places), self.unit, most)
            lines.append(f"{rows} {left_out}: {reason} ({where})")
        if self.left_out is not None:
            lines.append(f"{self.left_out}; {self.left_out.remedy}")
        if self.leaks:
            lines.append(
                f"{number_of(len(self.leaks), 'row')} with a history that holds their own question "
                "and answer, which is learned as copying: delete that turn "
                f"({as_places(self.leaks, self.unit, most)})"
            )
        return lines


def read_rows(
    path: Path | str,
    row_format: RowFormat,
    *,
    max_rows: int | None = None,
    for_training: bool = True,
    strict: bool = True,
) -> FileRows:
    """Read and check the rows of a file of any form.

    max_rows stops after that many rows of the file, dropped ones included; None reads all.
    for_training False keeps every row: a row to be answered needs no answer, nor even a prompt.
    Raises DataError for every fault of a file; strict False drops broken rows like the others, and
    raises only if no row is left to detect the columns by.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(
            f"the number of rows to read is {max_rows}; use 1 or more, or leave it out."
        )
    path = Path(path)
    file = open_data(path)
    encoding_fault = file.encoding_fault
    if encoding_fault is not None:
        raise encoding_fault
    faults: list[DataError] = []
    kept_faults = None if strict else faults
    raw_rows = read_raw_rows(file, kept_faults, max_rows)
    if not raw_rows:
        raise faults[0]
    try:
        layout = find_layout(path, raw_rows, row_format, needs_answers=for_training)
    except UnknownColumns as error:
        if file.header_line is None:
            raise
        said = f"{error.message} They are taken from line {file.header_line}."
        raise type(error)(path, None, said) from error
    rows = FileRows(layout, file.unit, num_read=len(raw_rows) + len(faults), notes=file.notes)
    rows.unused = count_unused(raw_rows, layout)
    turns = row_format.turns
    for row, raw_row in make_rows(raw_rows, layout, turns, kept_faults, needs_answers=for_training):
        reason = layout.lack(row) if for_training else None
        if reason is not None:
            rows.dropped[reason].append(row.line)
            continue
        if row.history and layout.leaks(row):
            rows.leaks.append(row.line)
        rows.kept.append(row)
        rows.sources.append(raw_row)
    for fault in faults:
        rows.dropped[fault.message].append(fault.line or 1)
    rows.left_out = find_left_out(rows.kept, rows.sources, rows.unused, layout)
    return rows


def read_raw_rows(
    file: DataFile, faults: list[DataError] | None, max_rows: int | None = None
) -> list[RawRow]:
    """Return the rows as they are; faults between them are added to faults, or raised if None."""
    rows: list[RawRow] = []
    for item in file.rows():
        if isinstance(item, RawRow):
            rows.append(item)
        elif faults is None:
            raise item
        else:
            faults.append(item)
        if len(rows) == max_rows:
            break
    return rows


def make_rows(
    raw_rows: Iterable[RawRow],
    layout: Layout,
    turns: Turns,
    faults: list[DataError] | None,
    *,
    needs_answers: bool = True,
) -> Iterator[tuple[TextRow, RawRow]]:
    """Yield what raw rows become, each with its raw row; faults are as in `read_raw_rows`."""
    for raw_row in raw_rows:
        try:
            made = to_text_rows(raw_row, layout, turns=turns, needs_answers=needs_answers)
        except DataError as error:
            if faults is None:
                raise
            faults.append(error)
        else:
            yield from ((row, raw_row) for row in made)


def count_unused(rows: Sequence[RawRow], layout: Layout) -> dict[str, int]:
    """Return the columns that are not used, with the number of rows that fill them.

    In rows of the row contract, those that say where a row comes from do not count.
    """
    used = set(layout.columns.values())
    if rows and all(is_contract(row.columns) for row in rows):
        used |= {*ORIGIN}
    filled: defaultdict[str, int] = defaultdict(int)
    for row in rows:
        if not row.columns.keys() <= used:
            for name, value in row.columns.items():
                if name not in used and _is_filled(value):
                    filled[name] += 1
        if layout.conversation is not None:
            for name in _unused_in_turns(row, layout.conversation):
                filled[name] += 1
    return dict(filled)


def is_contract(columns: dict[str, Any]) -> bool:
    """Return whether a row says where it comes from, as rows of the contract do."""
    row_id, source, meta = (columns.get(name) for name in ORIGIN)
    return isinstance(row_id, str) and isinstance(source, str) and isinstance(meta, dict)


def _unused_in_turns(row: RawRow, column: str) -> set[str]:
    """Return what the turns of a conversation hold besides speaker and text, as `column.key`."""
    turns = row.columns.get(column)
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # as in CSV
        with suppress(ValueError):
            turns = parse_json(turns)
    return {
        f"{column}.{key}"
        for turn in (turns if isinstance(turns, list) else ())
        if isinstance(turn, dict) and not turn.keys() <= TURN_KEYS
        for key, value in turn.items()
        if key not in TURN_KEYS and _is_filled(value)
    }


def _is_filled(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})


def find_left_out(
    rows: Sequence[TextRow], sources: Sequence[RawRow], unused: Iterable[str], layout: Layout
) -> LeftOut | None:
    """Return the unused column in which most rows with a repeated prompt differ; None if none do.

    A column with a usual name of a prompt counts from the first such row, another one with text
    from a tenth of all rows. sources: the raw row behind each of rows.
    """
    candidates = [
        name
        for name in unused
        if _is_prompt_part(name) or not NEVER_PROMPT_PARTS.search(name.strip().lower())
    ]
    if not candidates:
        return None
    groups: defaultdict[Any, list[RawRow]] = defaultdict(list)
    for row, source in zip(rows, sources, strict=True):
        groups[row.prompt, row.history].append(source)
    repeated = [group for group in groups.values() if len(group) > 1]
    found = []
    for name in candidates:
        differing = [
            len(group)
            for group in repeated
            if len({repr(source.columns.get(name)) for source in group}) > 1
        ]
        num_rows = sum(differing)
        is_frequent = num_rows >= REPEATED_SHARE * len(rows)
        if num_rows and (_is_prompt_part(name) or (is_frequent and _is_text(sources, name))):
            found.append(LeftOut(name, num_rows, _flags_that_use(name, layout)))
    return max(found, key=lambda one: one.num_rows, default=None)


def _is_prompt_part(name: str) -> bool:
    return name.strip().lower() in PROMPT_PARTS


def _flags_that_use(column: str, layout: Layout) -> str:
    """Return the flags that make a column a part of the prompt; "" if there is no place for it."""
    added = {"history": column} if column.strip().lower() == HISTORY else {"input": column}
    if layout.conversation is not None or added.keys() & layout.columns.keys():
        return ""
    named = {**layout.columns, **added}
    roles = ("prompt", "input", "response", "history")
    return " ".join(f"--{role}_column {quote(named[role])}" for role in roles if role in named)


def _is_text(rows: Sequence[RawRow], name: str) -> bool:
    """Return whether most values are text; numbers, names and ids hold no white space."""
    values = [value for row in rows if _is_filled(value := row.columns.get(name))]
    texts = [
        value
        for value in values
        if isinstance(value, str) and (not value.isascii() or len(value.split()) > 1)
    ]
    return 2 * len(texts) > len(values)


def find_files(given: str) -> list[Path]:
    """Return the files that a name stands for: itself, or what a pattern such as `a*` matches.

    A name that matches nothing is returned as it is: reading it reports the error.
    """
    if Path(given).exists() or not glob.has_magic(given):
        return [Path(given)]
    return [Path(name) for name in sorted(glob.glob(given, recursive=True))] or [Path(given)]
