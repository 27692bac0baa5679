"""Lengths of texts in tokens: their summary, histogram, and the share that a limit would cut.

Source of the two reserves: `tokenization.to_training_batch`, which a test compares with this.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PROMPT_RESERVE = 1  # of --max_source_length: [gMASK]
ANSWER_RESERVE = 2  # of --max_target_length: <sop> and <eop>
TABLE_LENGTHS = (64, 128, 256, 512, 1024)
MOST_BINS = 10


class LengthSummary(NamedTuple):
    """Tokens of all prompts, or all answers, of a file; control tokens are not counted."""

    mean: float
    median: int
    percentile_95: int
    longest: int


class Histogram(NamedTuple):
    """Bin i counts lengths from edges[i] to edges[i + 1] - 1; the last has no end."""

    edges: list[int]
    counts: list[int]


def summarise_lengths(lengths: np.ndarray) -> LengthSummary:
    """Summarise; no lengths at all give zeros.

    >>> summarise_lengths(np.array([1, 2, 9]))
    LengthSummary(mean=4.0, median=2, percentile_95=9, longest=9)
    """
    if not len(lengths):
        return LengthSummary(0.0, 0, 0, 0)
    median, high = np.percentile(lengths, [50, 95], method="higher")
    return LengthSummary(float(lengths.mean()), int(median), int(high), int(lengths.max()))


def cut_share(lengths: np.ndarray, limit: int, reserve: int) -> float:
    """Return the share of lengths that do not fit in limit - reserve tokens, 0 to 1.

    >>> cut_share(np.array([62, 63, 64, 65]), 64, PROMPT_RESERVE)
    0.5
    """
    return float((lengths > limit - reserve).mean()) if len(lengths) else 0.0


def sufficient_limit(lengths: np.ndarray, limit: int, reserve: int) -> int:
    """Return the next round limit that cuts at most 1 % of the lengths, or what fits them all.

    >>> sufficient_limit(np.array([10, 100]), 64, 2), sufficient_limit(np.array([3000]), 64, 2)
    (128, 3002)
    """
    for longer in TABLE_LENGTHS:
        if longer > limit and cut_share(lengths, longer, reserve) <= 0.01:
            return longer
    return int(lengths.max()) + reserve


def shared_edges(lengths: Sequence[np.ndarray]) -> list[int]:
    """Return the lower edges of at most 10 bins, 1, 2 or 5 times a power of ten wide, for all.

    The widest 1 % of each may lie beyond: they go into the last bin.

    >>> shared_edges([np.array([3, 45])])
    [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    """
    highs = [int(np.percentile(one, 99, method="higher")) for one in lengths if len(one)]
    high = max(highs, default=0)
    width = 1
    for width in (step * 10**power for power in range(9) for step in (1, 2, 5)):
        if high // width < MOST_BINS:
            break
    return list(range(0, high + 1, width))


def count_bins(lengths: np.ndarray, edges: list[int]) -> Histogram:
    """Count the lengths between the edges, and from the last edge on.

    >>> count_bins(np.array([1, 6, 7, 99]), [0, 5, 10]).counts
    [1, 2, 1]
    """
    counts, _ = np.histogram(lengths, bins=[*edges, np.inf])
    return Histogram(edges, [int(count) for count in counts])
