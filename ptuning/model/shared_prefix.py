"""Prefixes that many rows share: held once each, and mixed by weights.

A prefix adds keys to attention, and a weight w scales what they draw in the softmax: every score of
the prefix's keys gets + log(w). So 1 is the prefix as trained, 0 is the base without it, and 2
counts every prefix key twice. A blend shows the keys of two prefixes side by side, each with its
own weight.
Shapes: P prefix tokens, L layers, H heads, D head width, R rows, G rows of one prefix, W columns of
the widest prefixes side by side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LayerPrefix(NamedTuple):
    """One layer's prefix; each (H, P, D)."""

    keys: Tensor
    values: Tensor


class SharedPrefix:
    """A prefix as every layer's keys and values, for any number of rows."""

    def __init__(self, key_values: Sequence[Tensor]) -> None:
        """Take L tensors (2, 1, H, P, D), as `PrefixEncoder` returns them; nothing is copied."""
        self.key_values = tuple(tensor.detach() for tensor in key_values)
        self.layers = [LayerPrefix(tensor[0, 0], tensor[1, 0]) for tensor in self.key_values]
        self.length = int(self.key_values[0].shape[3])


class PrefixShare(NamedTuple):
    """One prefix that a row sees, and the logarithm of its weight: 0 as trained."""

    prefix: SharedPrefix
    log_weight: float


Shares = tuple[PrefixShare, ...]  # what one row sees; empty for the untouched base


def mix_prefixes(weighted: Sequence[tuple[SharedPrefix, float]]) -> Shares:
    """Return the shares of weighted prefixes; one with weight 0 is left out."""
    for _, weight in weighted:
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(
                f"a prefix has the weight {weight}; use 0 (off) or more, 1 is as trained."
            )
    return tuple(PrefixShare(prefix, math.log(weight)) for prefix, weight in weighted if weight > 0)


class PrefixGroup(NamedTuple):
    """The rows that see one prefix, and the first of its columns among the W."""

    prefix: SharedPrefix
    first_column: int
    rows: Tensor | None  # (G,) places among the R; None for all of them
    log_weights: Tensor | None  # (G, 1, 1); None when all are 0

    @property
    def columns(self) -> slice:
        """Its columns among the W."""
        return slice(self.first_column, self.first_column + self.prefix.length)


def group_by_prefix(shares: Sequence[Shares], device: torch.device) -> list[PrefixGroup]:
    """Gather the rows of each prefix, once for each column that it starts at; shares has R."""
    members: dict[tuple[SharedPrefix, int], list[tuple[int, float]]] = {}
    for place, row in enumerate(shares):
        column = 0
        for prefix, log_weight in row:
            members.setdefault((prefix, column), []).append((place, log_weight))
            column += prefix.length
    groups = []
    for (prefix, column), found in members.items():
        places, weights = zip(*found, strict=True)
        indices = None
        if len(places) < len(shares):
            indices = torch.tensor(places, device=device)
        log_weights = None
        if any(weights):
            log_weights = torch.tensor(weights, device=device).view(-1, 1, 1)
        groups.append(PrefixGroup(prefix, column, indices, log_weights))
    return groups


def count_columns(groups: Sequence[PrefixGroup]) -> int:
    """Return W, 0 when no row has a prefix."""
    return max((group.columns.stop for group in groups), default=0)


def rows_of(group: PrefixGroup, tensor: Tensor) -> Tensor:
    """Return the group's rows of a tensor (R, ...)."""
    return tensor if group.rows is None else tensor.index_select(0, group.rows)
