"""Prefixes that many rows share: held once each, and mixed by weights.

A prefix adds keys to attention, and a weight w scales what they draw in the softmax: every score of
the prefix's keys gets + log(w). So 1 is the prefix as trained, 0 is the base without it, and 2
counts every prefix key twice. A blend shows the keys of two prefixes side by side, each with its
own weight.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class SharedPrefix:
    """A prefix of P tokens as every layer's keys and values, for any number of rows."""

    def __init__(self, key_values: Sequence[Tensor]) -> None:
        """Take L tensors (2, 1, H, P, D), as `PrefixEncoder` returns them; nothing is copied."""
        self.key_values = tuple(tensor.detach() for tensor in key_values)
        self.length = int(self.key_values[0].shape[3])


class PrefixShare(NamedTuple):
    """One prefix that a row sees, and the logarithm of its weight: 0 as trained."""

    prefix: SharedPrefix
    log_weight: float


Shares = tuple[PrefixShare, ...]  # what one row sees; empty for the untouched base


def check_weight(weight: float) -> None:
    """Refuse (ValueError) what no prefix can be weighted with."""
    if not (math.isfinite(weight) and weight >= 0.0):
        raise ValueError(f"a prefix has the weight {weight}; use 0 (off) or more, 1 is as trained.")


def mix_prefixes(weighted: Sequence[tuple[SharedPrefix, float]]) -> Shares:
    """Return the shares of weighted prefixes; one with weight 0 is left out."""
    for _, weight in weighted:
        check_weight(weight)
    return tuple(PrefixShare(prefix, math.log(weight)) for prefix, weight in weighted if weight > 0)
