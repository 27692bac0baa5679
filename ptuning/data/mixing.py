"""Mix general rows into the rows of a task: `--mix FILE:RATIO`, one data set in a fixed order.

RATIO is the share of general rows among all rows of an epoch: 0.2 adds one general row for every
four of the task. Every epoch has all rows of the task and the same general rows, drawn by the seed,
so a resumed run continues exactly.
"""

from pathlib import Path
from random import Random
from typing import NamedTuple

FORM = "FILE:RATIO or FILE:RATIO:PROMPT,RESPONSE, such as general.jsonl:0.2"


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
