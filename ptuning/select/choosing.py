"""Step 5 of 5, pick: the best rows within quotas, none too similar to one picked before it.

Sources are drawn from at a temperature, as LIMA drew from its forums (Zhou et al. 2023, section
2.1, https://arxiv.org/abs/2305.11206); similar rows are skipped as in DEITA (Liu et al. 2024,
section 2.4, https://arxiv.org/abs/2312.15685).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from ptuning.data.mixing import share_out
from ptuning.data.near_duplicates import Nearest

EMBED_ROWS = 16  # whose states are computed at once

Similar = Callable[[int], Nearest | None]


def quotas(
    counts: Mapping[str, int], budget: int, temperature: float
) -> tuple[dict[str, float], dict[str, int]]:
    """Share a budget by count ** (1 / temperature); return exact shares and whole rows.

    A source whose share reaches its count gives all it has, and the others share the rest.

    >>> quotas({"big": 8000, "small": 1000}, 300, 3)[1]
    {'big': 200, 'small': 100}
    """
    budget = min(budget, sum(counts.values()))
    weights = {name: count ** (1 / temperature) if count else 0.0 for name, count in counts.items()}
    exact: dict[str, float] = {}
    while len(exact) < len(counts):
        left = [name for name in counts if name not in exact]
        rest, total = budget - sum(exact.values()), sum(weights[name] for name in left)
        parts = {name: rest * weights[name] / total if total else 0.0 for name in left}
        full = [name for name in left if parts[name] >= counts[name]]
        exact |= {name: float(counts[name]) for name in full} if full else parts
    shares = [exact[name] / max(budget, 1) for name in counts]
    rooms = dict(zip(counts, share_out(budget, shares), strict=True))
    return {name: exact[name] for name in counts}, rooms


def pick(
    sources: Sequence[str], rooms: Mapping[str, int], similar: Similar
) -> tuple[list[int], dict[int, Nearest]]:
    """Pick rows of each source, as many as it has room for; return them and the skipped.

    sources are those of the rows in falling order of their scores. similar returns the picked row
    that a row is too similar to; where there is none, it takes the row for picked. Room that a
    source cannot fill goes to the best of the other rows.
    """
    budget, taken = sum(rooms.values()), Counter[str]()
    picked: list[int] = []
    skipped: dict[int, Nearest] = {}

    def consider(index: int) -> None:
        if (nearest := similar(index)) is not None:
            skipped[index] = nearest
        else:
            picked.append(index)
            taken[sources[index]] += 1

    waiting = []
    for index, source in enumerate(sources):
        if taken[source] < rooms[source]:
            consider(index)
        else:
            waiting.append(index)
    for index in waiting:
        if len(picked) < budget:
            consider(index)
    return sorted(picked), skipped


class SimilarStates:
    """Compares rows with the picked ones, of which there are most at most, by their states' cosine.

    embed returns the states of a range of rows, each of length 1, (rows, E) float32. It is asked
    for a block of rows when one of them is considered.
    """

    def __init__(self, most: int, embed: Callable[[range], np.ndarray], threshold: float) -> None:
        self._most, self._threshold = most, threshold
        self._block = lru_cache(1)(lambda start: embed(range(start, start + EMBED_ROWS)))
        self._picked: list[int] = []
        self._states = np.empty((0, 0), np.float32)  # of the picked, and room for more

    def __call__(self, index: int) -> Nearest | None:
        """Return the picked row with the highest cosine if that is above the threshold."""
        state = self._block(index - index % EMBED_ROWS)[index % EMBED_ROWS]
        count = len(self._picked)
        if not count:
            self._states = np.empty((self._most, len(state)), np.float32)
        cosines = self._states[:count] @ state  # (count,)
        if count and cosines.max() > self._threshold:
            return Nearest(self._picked[int(cosines.argmax())], float(cosines.max()))
        self._states[count] = state
        self._picked.append(index)
        return None
