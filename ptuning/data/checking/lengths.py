"""Lengths of prompts and answers in tokens, and what the limits cut: numbers, tables, histograms.

For `data check` and `data convert`. Bars are `#` and headings ASCII, because some terminals draw
block characters two columns wide.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ptuning.data.prompts import RowFormat

TABLE_LENGTHS = (64, 128, 256, 512, 1024)
BAR_WIDTH = 24
MOST_BINS = 10


class Side(NamedTuple):
    """The lengths of a file's prompts or answers, and the limit on them.

    reserve: how much of the limit control tokens take, as in `tokenization.to_training_batch`.

    >>> side = Side("prompt", "--max_source_length", 64, 1, np.array([62, 63, 64, 65]))
    >>> side.cut_share(64), side.sufficient_limit
    (0.5, 128)
    """

    noun: str
    flag: str
    limit: int
    reserve: int
    lengths: np.ndarray

    def are_cut(self, limit: int) -> np.ndarray:
        """Return which texts are longer than a limit leaves, as booleans."""
        return self.lengths > limit - self.reserve

    def cut_share(self, limit: int) -> float:
        """Return the share of texts that a limit cuts, 0 to 1."""
        return float(self.are_cut(limit).mean()) if len(self.lengths) else 0.0

    @property
    def sufficient_limit(self) -> int:
        """The limit if it cuts nothing, else the next round one that cuts at most 1 %, or none."""
        if not self.cut_share(self.limit):
            return self.limit
        for longer in TABLE_LENGTHS:
            if longer > self.limit and self.cut_share(longer) <= 0.01:
                return longer
        return int(self.lengths.max()) + self.reserve


def sides_of(row_format: RowFormat, lengths: np.ndarray) -> list[Side]:
    """Return prompts and answers as two sides; lengths is (rows, 2)."""
    source, target = row_format.max_source_length, row_format.max_target_length
    return [
        Side("prompt", "--max_source_length", source, 1, lengths[:, 0]),  # 1: [gMASK]
        Side("answer", "--max_target_length", target, 2, lengths[:, 1]),  # 2: <sop> and <eop>
    ]


def length_values(sides: Sequence[Side]) -> dict[str, dict[str, Any]]:
    """Return mean, quantiles, shares cut at each limit and histogram of prompts and of answers."""
    edges = shared_edges([side.lengths for side in sides])
    limits = sorted({*TABLE_LENGTHS, *(side.limit for side in sides)})
    values = {}
    for side in sides:
        lengths = side.lengths
        median, high = np.percentile(lengths, [50, 95], method="higher")
        counts = np.histogram(lengths, bins=[*edges, np.inf])[0].tolist()
        values[f"{side.noun}s"] = {
            "mean": float(lengths.mean()),
            "median": int(median),
            "percentile_95": int(high),
            "longest": int(lengths.max()),
            "cut_share": {str(limit): side.cut_share(limit) for limit in limits},
            "histogram": {"edges": edges, "counts": counts},
        }
    return values


def shared_edges(lengths: Sequence[np.ndarray]) -> list[int]:
    """Return the lower edges of at most 10 bins for all; their width is 1, 2 or 5 times 10**n.

    Up to 1 % of each may be longer and falls into the last bin, which is open.

    >>> shared_edges([np.array([3, 45])])
    [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    """
    high = max(int(np.percentile(one, 99, method="higher")) for one in lengths)
    widths = (step * 10**power for power in range(9) for step in (1, 2, 5))
    return list(range(0, high + 1, next(width for width in widths if high // width < MOST_BINS)))


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
    """Return both histograms side by side, as shares of all rows."""
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
        lines.append(f"  {_bin_label(edges, index):<11}{''.join(bars)}".rstrip())
    return lines


def _bin_label(edges: list[int], index: int) -> str:
    """Name a bin.

    >>> _bin_label([0, 20, 40], 1), _bin_label([0, 20, 40], 2), _bin_label([0, 1], 0)
    ('20-39', '40+', '0')
    """
    low = edges[index]
    if index + 1 == len(edges):
        return f"{low}+"
    last = edges[index + 1] - 1
    return f"{low}-{last}" if last > low else str(low)


def as_percent(share: float) -> str:
    """Return a share, 0 to 1, as a percentage; only zero reads 0.0%.

    >>> as_percent(0.5434), as_percent(0.0002), as_percent(0)
    ('54.3%', '<0.1%', '0.0%')
    """
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
