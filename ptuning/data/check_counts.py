"""What `check` counts in one file, in numbers; `check_findings` puts it in words."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MOST_EXAMPLES = 5  # lines that are named for one finding


@dataclass
class Tally:
    """How often something was found, and the first few places where."""

    count: int = 0
    places: list[int] = field(default_factory=list)

    def add(self, place: int) -> None:
        """Count one more; its place is kept only among the first few."""
        self.count += 1
        if len(self.places) < MOST_EXAMPLES:
            self.places.append(place)


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are used; history None where there are no earlier turns."""

    prompt: str
    response: str
    history: str | None = None


@dataclass
class FileCounts:
    """Everything counted in one file.

    Where a row stands is its line, or, if the whole file is one line, its number among the rows.
    Keys of rows and prompts are digests: 16 bytes of the prompt, then 16 of the answer for a row.
    Lengths are in tokens, control tokens not counted, one for each row that training would use.
    """

    path: Path
    columns: Columns
    unreadable: str | None = None  # why nothing of the file could be read
    encoding: str = ""
    has_mark: bool = False
    has_lines: bool = True
    damaged_lines: tuple[int, ...] = ()
    num_read: int = 0  # objects found, usable or not
    column_rows: Counter[str] = field(default_factory=Counter)  # rows that have a column
    broken: Tally = field(default_factory=Tally)
    broken_messages: list[str] = field(default_factory=list)
    empty: dict[str, Tally] = field(default_factory=dict)  # by column
    invisible: Tally = field(default_factory=Tally)  # text that yields no token
    lost_characters: Tally = field(default_factory=Tally)
    control_rows: Tally = field(default_factory=Tally)
    control_names: dict[str, Tally] = field(default_factory=dict)
    unknown_prompts: Tally = field(default_factory=Tally)
    unknown_answers: Tally = field(default_factory=Tally)
    unknown_ids: Tally = field(default_factory=Tally)
    spelled_rows: Tally = field(default_factory=Tally)  # rows with characters written as bytes
    spelled_characters: Counter[str] = field(default_factory=Counter)
    duplicates: Tally = field(default_factory=Tally)
    duplicate_pairs: list[tuple[int, int]] = field(default_factory=list)  # place, earlier place
    rows: dict[bytes, int] = field(default_factory=dict)  # key -> first place
    prompts: dict[bytes, int] = field(default_factory=dict)  # key -> first place
    contested: dict[bytes, list[int]] = field(default_factory=dict)  # prompt -> places
    prompt_lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    answer_lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def place_name(self) -> str:
        """What a place counts: lines, or rows of a file of one line."""
        return "line" if self.has_lines else "row"

    @property
    def num_used(self) -> int:
        """Rows that training would use."""
        return len(self.prompt_lengths)

    def missing_columns(self) -> list[tuple[str, str]]:
        """Return (flag, column) of each named column that no row has."""
        named = [
            ("--prompt_column", self.columns.prompt),
            ("--response_column", self.columns.response),
            ("--history_column", self.columns.history),
        ]
        return [
            (flag, column)
            for flag, column in named
            if column is not None and column not in self.column_rows
        ]
