"""A row as it stands in a data file, the usual names of its columns, and the error for faults."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

# Usual names of columns, most usual first, lower case.
PROMPT_NAMES = (
    *("content", "prompt", "question", "instruction", "query", "input"),
    *("问题", "提问", "指令", "输入"),
)
RESPONSE_NAMES = (
    *("summary", "response", "answer", "output", "completion", "target"),
    *("答案", "回答", "回复", "输出", "摘要"),
)
INPUT_NAMES = ("input", "context", "输入")  # what an instruction is about: Alpaca, Dolly
INSTRUCTION_NAMES = ("instruction", "指令")
HISTORY, SYSTEM, TOOLS = "history", "system", "tools"
CONVERSATION_NAMES = ("messages", "conversations")
LIMA_NAMES = ("conversations", "conversation")  # whose turns may be texts without a speaker
DIALOGUE_NAMES = ("conversation", "dialogue", "dialog", "paragraph", "turns")  # texts or turns
TURN_NAMES = (*CONVERSATION_NAMES, *DIALOGUE_NAMES, HISTORY)
TEXT_NAMES = (*PROMPT_NAMES, *RESPONSE_NAMES, *INPUT_NAMES)
# What a reader passes over, by kind, with the places: repeated headers and byte order marks.
Skipped = defaultdict[str, list[int]]
MARK = "\ufeff"
MARKS = "byte order mark"  # a kind of Skipped


class DataError(ValueError):
    """A fault in a data file; its text is `file:line: what is wrong, what is needed`."""

    def __init__(
        self, path: Path | str, line: int | None, message: str, unit: str = "line"
    ) -> None:
        """Keep the place next to the message; line is None if the whole file is meant.

        unit is "row" where line is the number of a row, from 1.
        """
        self.path = Path(path)
        self.line = line
        self.unit = unit
        self.message = message
        place = f"{path}"
        if line is not None:
            place += f":{line}" if unit == "line" else f", {unit} {line}"
        super().__init__(f"{place}: {message}")


class Row(NamedTuple):
    """One row: the line it begins on, and its columns.

    line is a row number, from 1, where unit is "row": rows there have no lines of their own.
    """

    line: int
    columns: dict[str, Any]
    unit: str = "line"

    def fault(self, path: Path | str, message: str) -> DataError:
        """Return the error for something wrong in this row."""
        return DataError(path, self.line, message, self.unit)


def shown(name: str) -> str:
    r"""Return a name of a column in quotes, on one line.

    >>> shown("a\nb")
    '"a\\nb"'
    """
    return json.dumps(name, ensure_ascii=False)
