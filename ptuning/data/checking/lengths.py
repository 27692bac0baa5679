"""How long texts are in tokens, and which limits cut them: numbers, tables and bars.

For `data check` and `data convert`. Bars are `#` and headings ASCII, to line up where block
characters are two columns wide.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ptuning.data.prompts import RowFormat

TABLE_LENGTHS = (64, 128, 256, 512, 1024)
PROMPT_RESERVE = 1  # of --max_source_length: [gMASK]
ANSWER_RESERVE = 2  # of --max_target_length: <sop> and <eop>; see tokenization.to_training_batch
BAR_WIDTH = 24
MOST_BINS = 10


class Side(NamedTuple):
    """The lengths of a file's prompts or answers, and what limits them."""

    noun: str
    flag: str
    limit: int
    reserve: int  # of the limit, for control tokens
    lengths: np.ndarray


def sides_of(row_format: RowFormat, prompts: np.ndarray, answers: np.ndarray) -> list[Side]:
    """Return the two sides of rows with these lengths."""
    source, target = row_format.max_source_length, row_format.max_target_length
    return [
        Side("prompt", "--max_source_length", source, PROMPT_RESERVE, prompts),
        Side("answer", "--max_target_length", target, ANSWER_RESERVE, answers),
    ]


def cut_share(lengths: np.ndarray, limit: int, reserve: int) -> float:
    """Return the share of lengths that do not fit in limit - reserve tokens, 0 to 1.

    >>> cut_share(np.array([62, 63, 64, 65]), 64, PROMPT_RESERVE)
    0.5
    """
    return float((lengths > limit - reserve).mean()) if len(lengths) else 0.0


def sufficient_limit(lengths: np.ndarray, limit: int, reserve: int) -> int:
    """Return the next round limit that cuts at most 1 % of the lengths, or what fits them all.

    A limit that cuts none is returned itself.

    >>> [sufficient_limit(np.array([10, longest]), 64, 2) for longest in (62, 100, 3000)]
    [64, 128, 3002]
    """
    if not cut_share(lengths, limit, reserve):
        return limit
    for longer in TABLE_LENGTHS:
        if longer > limit and cut_share(lengths, longer, reserve) <= 0.01:
            return longer
    return int(lengths.max()) + reserve


def length_values(sides: Sequence[Side]) -> dict[str, dict[str, Any]]:
    """Return mean, quantiles, shares cut at each limit and histogram of prompts and of answers."""
    edges = shared_edges([side.lengths for side in sides])
    limits = sorted({*TABLE_LENGTHS, *(side.limit for side in sides)})
    values = {}
    for noun, _, _, reserve, lengths in sides:
        median, high = np.percentile(lengths, [50, 95], method="higher")
        values[f"{noun}s"] = {
            "mean": float(lengths.mean()),
            "median": int(median),
            "percentile_95": int(high),
            "longest": int(lengths.max()),
            "cut_share": {str(n): cut_share(lengths, n, reserve) for n in limits},
            "histogram": {"edges": edges, "counts": count_bins(lengths, edges)},
        }
    return values


def shared_edges(lengths: Sequence[np.ndarray]) -> list[int]:
    """Return the lower edges of at most 10 bins for all; a width is 1, 2 or 5 times 10**n.

    The longest 1 % of each may lie beyond: they go into the last bin.

    >>> shared_edges([np.array([3, 45])])
    [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    """
    high = max(int(np.percentile(one, 99, method="higher")) for one in lengths)
    widths = (step * 10**power for power in range(9) for step in (1, 2, 5))
    return list(range(0, high + 1, next(width for width in widths if high // width < MOST_BINS)))


def count_bins(lengths: np.ndarray, edges: list[int]) -> list[int]:
    """Count the lengths between the edges, and from the last edge on.

    >>> count_bins(np.array([1, 6, 7, 99]), [0, 5, 10])
    [1, 2, 1]
    """
    return np.histogram(lengths, bins=[*edges, np.inf])[0].tolist()


# Text


def table_lines(values: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table of lengths and cuts, a line for prompts and one for answers."""
    limits = "".join(f"{limit:>8}" for limit in values["prompts"]["cut_share"])
    heading = f"  {'tokens':<8}{'mean':>8}{'median':>8}{'95 %':>8}{'longest':>9}   cut at{limits}"
    return [heading] + [
        f"  {noun:<8}{one['mean']:>8,.1f}{one['median']:>8,}{one['percentile_95']:>8,}"
        f"{one['longest']:>9,}{'':9}"
        + "".join(f"{as_percent(share):>8}" for share in one["cut_share"].values())
        for noun, one in values.items()
    ]


def histogram_lines(values: dict[str, dict[str, Any]], num_rows: int) -> list[str]:
    """Return both histograms side by side, shares of all rows."""
    edges = values["prompts"]["histogram"]["edges"]
    bins = [one["histogram"]["counts"] for one in values.values()]
    highest = max(map(max, bins))
    lines = [f"  {'tokens':<12}{'prompts':<{BAR_WIDTH + 10}}answers"]
    for index, pair in enumerate(zip(*bins, strict=True)):
        bars = [
            f"{as_percent(count / num_rows):>6} "
            f"{'#' * round(BAR_WIDTH * count / highest):<{BAR_WIDTH + 3}}"
            for count in pair
        ]
        lines.append(f"  {bin_label(edges, index):<11}{''.join(bars)}".rstrip())
    return lines


def bin_label(edges: list[int], index: int) -> str:
    """Name a bin.

    >>> bin_label([0, 20, 40], 1), bin_label([0, 20, 40], 2), bin_label([0, 1], 0)
    ('20-39', '40+', '0')
    """
    low = edges[index]
    if index + 1 == len(edges):
        return f"{low}+"
    last = edges[index + 1] - 1
    return f"{low}-{last}" if last > low else str(low)


def number_of(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> number_of(1, "row"), number_of(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def as_percent(share: float) -> str:
    """Return a share, 0 to 1, as a percentage; only zero reads 0.0%.

    >>> as_percent(0.5434), as_percent(0.0002), as_percent(0)
    ('54.3%', '<0.1%', '0.0%')
    """
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
