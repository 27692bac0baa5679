"""Prefixes in a batch: each is held once, and every row attends to its own, mixed by weights.

A weight w scales the attention a prefix receives: log(w) is added to every score of its keys. So 1
is the prefix as trained, 0 the base without it, and 2 counts every prefix key twice. A row may
attend to several prefixes, each with its own weight.
The prefixes in use are stacked, and the rows of each are grouped, so that a layer's products are
one batched product however many prefixes there are. Rows that all see the same prefix need neither
stack nor groups.
Shapes: R rows, G prefixes in the stack, M rows of the prefix that most rows see, P tokens of the
longest prefix, A prefixes that a row sees at most, W = A x P columns, H heads, D head width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STACK_RATIO = 2  # a stack is kept while it holds at most this many times the prefixes in use


class SharedPrefix:
    """A prefix of P tokens as every layer's keys and values, for any number of rows."""

    def __init__(self, key_values: Sequence[Tensor]) -> None:
        """Take L tensors (2, 1, H, P, D) without copying, as `PrefixEncoder` returns them."""
        self.key_values = tuple(tensor.detach() for tensor in key_values)
        self.length = int(self.key_values[0].shape[3])


class WeightedPrefix(NamedTuple):
    """A prefix that a row sees, and the logarithm of its weight: 0 as trained."""

    prefix: SharedPrefix
    log_weight: float


PrefixMix = tuple[WeightedPrefix, ...]  # what one row sees; empty for the base


def check_weight(weight: float) -> None:
    """Raise ValueError for a number that is no weight."""
    if not (math.isfinite(weight) and weight >= 0.0):
        raise ValueError(f"a prefix has the weight {weight}; use 0 (off) or more, 1 is as trained.")


def mix_prefixes(weighted: Sequence[tuple[SharedPrefix, float]]) -> PrefixMix:
    """Return the mix of weighted prefixes, without those of weight 0."""
    for _, weight in weighted:
        check_weight(weight)
    return tuple(WeightedPrefix(prefix, math.log(w)) for prefix, w in weighted if w > 0)


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (..., X, D) @ right (..., D, Y) in float32.

    CUDA multiplies half precision as it is; elsewhere the operands are converted to float32.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.bmm.html (out_dtype)
    """
    if left.dtype is torch.float32 or left.device.type != "cuda":
        return left.float() @ right.float()
    batches = (left.flatten(0, -3), right.flatten(0, -3))  # (B, X, D), (B, D, Y)
    product = torch.bmm(*batches, out_dtype=torch.float32)  # type: ignore[call-overload]
    found: Tensor = product.unflatten(0, left.shape[:-2])  # (..., X, Y)
    return found


class PrefixStack:
    """G prefixes as one tensor (2, G, H, P, D) per layer, the shorter ones padded with zeros."""

    def __init__(self, prefixes: Sequence[SharedPrefix]) -> None:
        """Copy the prefixes; a single one is taken as it is."""
        self.places = {prefix: place for place, prefix in enumerate(prefixes)}
        self.length = max(prefix.length for prefix in prefixes)
        layers = zip(*(prefix.key_values for prefix in prefixes), strict=True)
        self.layers = [self._stack(layer) for layer in layers]

    def _stack(self, key_values: Sequence[Tensor]) -> Tensor:
        first = key_values[0]
        if len(key_values) == 1:
            return first
        shape = (2, len(key_values), first.shape[2], self.length, first.shape[4])
        stacked = first.new_zeros(shape)  # (2, G, H, P, D)
        for place, tensor in enumerate(key_values):
            stacked[:, place, :, : tensor.shape[3]] = tensor[:, 0]
        return stacked


class Groups(NamedTuple):
    """The rows of each prefix in the stack: G x M places, some of which stay empty."""

    size: int  # M
    rows: Tensor  # (G * M,) the row at each place; row 0 at an empty one
    indices: Tensor  # (G * M,) the same as an index into the R * A prefixes that rows see
    places: Tensor  # (R * A,) the place of each of a row's prefixes; place 0 where it has none
    used_places: Tensor  # (used,) the places that are not empty ...
    used_rows: Tensor  # (used,) ... and their rows


class BatchPrefixes(NamedTuple):
    """What R rows see of a stack."""

    stack: PrefixStack
    num_seen: int  # A
    seen: Tensor  # (R * A,) places in the stack of a row's prefixes, 0 where it has none
    mask: Tensor  # (R, 1, W) float32: the prefix's log-weight, very low where there is no key
    groups: Groups | None  # None: every row sees the only prefix

    @property
    def width(self) -> int:
        """Columns W."""
        return self.num_seen * self.stack.length

    def key_values(self, layer: int) -> Tensor:
        """Return the rows' keys and values (2, R, H, W, D); (2, 1, H, P, D) if all are one."""
        stacked = self.stack.layers[layer]
        if self.groups is None:
            return stacked
        key_values = stacked.index_select(1, self.seen)  # (2, R * A, H, P, D)
        key_values = key_values.unflatten(1, (-1, self.num_seen))  # (2, R, A, H, P, D)
        return key_values.transpose(2, 3).flatten(3, 4)  # (2, R, H, W, D)

    def scores(self, layer: int, query: Tensor) -> Tensor:
        """Return float32 products (R, H, W) of query (R, H, D) and the keys, without the mask."""
        keys = self.stack.layers[layer][0].transpose(-1, -2)  # (G, H, D, P)
        if self.groups is None:
            return float_product(query.transpose(0, 1), keys[0]).transpose(0, 1)  # (R, H, P)
        grouped = self._grouped(query, self.groups.rows)  # (G, H, M, D)
        products = float_product(grouped, keys).transpose(1, 2).flatten(0, 1)  # (G * M, H, P)
        products = products.index_select(0, self.groups.places)  # (R * A, H, P)
        return products.unflatten(0, (-1, self.num_seen)).transpose(1, 2).flatten(2)  # (R, H, W)

    def add_values(self, layer: int, weights: Tensor, output: Tensor) -> Tensor:
        """Return output (R, H, D) plus the values weighted by weights (R, H, W)."""
        values = self.stack.layers[layer][1]  # (G, H, P, D)
        if self.groups is None:
            return output + (weights.transpose(0, 1) @ values[0]).transpose(0, 1)  # (R, H, D)
        weights = weights.unflatten(2, (self.num_seen, -1)).transpose(1, 2)  # (R, A, H, P)
        grouped = self._grouped(weights.flatten(0, 1), self.groups.indices)  # (G, H, M, P)
        drawn = (grouped @ values).transpose(1, 2).flatten(0, 1)  # (G * M, H, D)
        used = drawn.index_select(0, self.groups.used_places)  # (used, H, D)
        return output.index_add(0, self.groups.used_rows, used)

    def _grouped(self, tensor: Tensor, indices: Tensor) -> Tensor:
        """Return (G, H, M, ...): the rows of tensor (..., H, ...) at each place of the groups."""
        assert self.groups is not None, "there are groups only where rows see different prefixes"
        rows = tensor.index_select(0, indices)  # (G * M, H, ...)
        return rows.unflatten(0, (-1, self.groups.size)).transpose(1, 2)  # (G, H, M, ...)


class PrefixCache:
    """Finds what rows see; keeps the last stack and the last result for rows that stay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack: PrefixStack | None = None
        self._asked: list[PrefixMix] = []
        self._found: BatchPrefixes | None = None

    def lookup(
        self, mixes: Sequence[PrefixMix], *, staying: Sequence[PrefixMix] = ()
    ) -> BatchPrefixes | None:
        """Return what R rows see, None if nothing; keep what the staying rows see in the stack."""
        asked = list(mixes)
        if asked != self._asked:
            self._asked, self._found = [], None  # in case the next line fails
            self._found = self._find(asked, staying)
            self._asked = asked
        return self._found

    def clear(self) -> None:
        """Hold no prefix any more."""
        self._stack, self._asked, self._found = None, [], None

    def _find(self, mixes: list[PrefixMix], staying: Sequence[PrefixMix]) -> BatchPrefixes | None:
        in_use = dict.fromkeys(one.prefix for mix in (*staying, *mixes) for one in mix)
        if not in_use:
            self._stack = None
        if not any(mixes):
            return None
        stack = self._stack
        if (
            stack is None
            or not all(prefix in stack.places for prefix in in_use)
            or len(stack.places) > MAX_STACK_RATIO * len(in_use)
        ):
            stack = self._stack = PrefixStack(list(in_use))
        num_seen = max(map(len, mixes))
        seen = [0] * (len(mixes) * num_seen)
        mask = torch.full((len(mixes), num_seen, stack.length), torch.finfo(torch.float32).min)
        for row, mix in enumerate(mixes):
            for place, (prefix, log_weight) in enumerate(mix):
                seen[row * num_seen + place] = stack.places[prefix]
                mask[row, place, : prefix.length] = log_weight
        is_one = len(stack.places) == 1 and all(len(mix) == 1 for mix in mixes)
        return BatchPrefixes(
            stack,
            num_seen,
            self._tensor(seen),
            mask.flatten(1).unsqueeze(1).to(self._device),  # (R, 1, W)
            None if is_one else self._group(mixes, stack, num_seen),
        )

    def _group(self, mixes: list[PrefixMix], stack: PrefixStack, num_seen: int) -> Groups:
        members: list[list[int]] = [[] for _ in stack.places]  # indices into the R * A
        for row, mix in enumerate(mixes):
            for place, (prefix, _) in enumerate(mix):
                members[stack.places[prefix]].append(row * num_seen + place)
        size = max(map(len, members))
        at_places, places, used = [0] * (len(members) * size), [0] * (len(mixes) * num_seen), []
        for group, indices in enumerate(members):
            for place, index in enumerate(indices, start=group * size):
                at_places[place], places[index] = index, place
                used.append(place)
        indices_at, used_places = self._tensor(at_places), self._tensor(used)
        rows = indices_at // num_seen
        return Groups(size, rows, indices_at, self._tensor(places), used_places, rows[used_places])

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)
