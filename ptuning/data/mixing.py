"""Mix general rows into the rows of a task: `--mix FILE:RATIO`, one data set in a fixed order.

RATIO is the share of general rows among all rows of an epoch: 0.2 adds one general row for every
four of the task. Every epoch has all rows of the task and the same general rows, drawn by the seed,
so a resumed run continues exactly.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # `parse_mix` checks a command line before anything heavy is loaded
    from ptuning.data.dataset import TokenDataset

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


def mix_rows(
    task: "TokenDataset", general: "TokenDataset", *, share: float, seed: int
) -> "TokenDataset":
    """Return the rows of the task, then as many general rows as make up share of all.

    Where more are needed than there are, all are taken as often as they fit in, and the rest is
    drawn. At least one general row is taken.
    """
    wanted = max(1, round(len(task) * share / (1 - share)))
    rounds, drawn = draw_rows(len(general), wanted, Random(seed))
    return join_rows([task, general], [None, [*range(len(general))] * rounds + sorted(drawn)])


def draw_rows(size: int, wanted: int, keys: Random) -> tuple[int, list[int]]:
    """Return how often all of size rows are taken to make up wanted, and the rest that is drawn.

    >>> draw_rows(3, 7, Random(1))
    (2, [0])
    """
    rounds, missing = divmod(wanted, size)
    order = [keys.random() for _ in range(size)]  # random() alone: Python promises to keep it
    return rounds, sorted(range(size), key=order.__getitem__)[:missing]


def join_rows(
    parts: "Sequence[TokenDataset]", chosen: Sequence[Sequence[int] | None] | None = None
) -> "TokenDataset":
    """Return the rows of all parts end to end, of each those that are chosen; None takes all."""
    import numpy as np

    from ptuning.data.cache import TokenArrays
    from ptuning.data.dataset import TokenDataset

    if len(parts) == 1 and chosen is None:
        return parts[0]  # memory-mapped as it is
    ids, lengths, context_lengths = [], [], []
    for part, indices in zip(parts, chosen or [None] * len(parts), strict=True):
        arrays = part.arrays
        if indices is None:
            ids.append(arrays.ids)
            lengths.append(part.lengths)
            context_lengths.append(arrays.context_lengths)
        else:
            ids += [arrays.ids[arrays.offsets[row] : arrays.offsets[row + 1]] for row in indices]
            lengths.append(part.lengths[list(indices)])
            context_lengths.append(arrays.context_lengths[list(indices)])
    offsets = np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int64)
    return TokenDataset(TokenArrays(np.concatenate(ids), offsets, np.concatenate(context_lengths)))
