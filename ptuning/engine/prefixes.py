"""Rows that see different prefixes, in one product a layer.

The prefixes in use lie stacked, each once, and the rows of a prefix are gathered beside it, so that
a layer's products are one batch however many prefixes there are. Rows that all see the same one
need neither copy nor gathering.
Shapes: R rows, G prefixes in the stack, M rows of the prefix that most rows see, P tokens of the
longest prefix, K prefixes that a row sees at most, W = K x P columns, H heads, D head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptuning.engine.shared_prefix import SharedPrefix, Shares

MOST_IDLE = 2  # a stack is kept while it holds at most so many times the prefixes in use


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (..., N, D) @ right (..., D, M) in float32.

    CUDA's products read half precision as it is; elsewhere the operands are copied to float32.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.bmm.html (out_dtype)
    """
    if left.dtype is torch.float32 or left.device.type != "cuda":
        return left.float() @ right.float()
    by_batch = (left.flatten(0, -3), right.flatten(0, -3))
    product = torch.bmm(*by_batch, out_dtype=torch.float32)  # type: ignore[call-overload]
    found: Tensor = product.unflatten(0, left.shape[:-2])
    return found


class PrefixStack:
    """Prefixes beside each other: for each layer one tensor (2, G, H, P, D), zeros at the ends."""

    def __init__(self, prefixes: Sequence[SharedPrefix]) -> None:
        """Copy the prefixes; one alone is taken as it is."""
        self.places = {prefix: place for place, prefix in enumerate(prefixes)}
        self.length = max(prefix.length for prefix in prefixes)
        if len(prefixes) == 1:
            self.layers = list(prefixes[0].key_values)
        else:
            layers = zip(*(prefix.key_values for prefix in prefixes), strict=True)
            self.layers = [self._stack(key_values) for key_values in layers]

    def _stack(self, key_values: Sequence[Tensor]) -> Tensor:
        first = key_values[0]
        shape = (2, len(key_values), first.shape[2], self.length, first.shape[4])
        stacked = first.new_zeros(shape)
        for place, tensor in enumerate(key_values):
            stacked[:, place, :, : tensor.shape[3]] = tensor[:, 0]
        return stacked


class Gathering(NamedTuple):
    """Where the rows stand in the products with a stack: G x M places, of which some stay idle."""

    num_rows: int  # M
    rows: Tensor  # (G * M,) the row at each place; row 0 at an idle one
    shares: Tensor  # (G * M,) the same among the R * K
    places: Tensor  # (R * K,) the place of each row's K-th prefix; place 0 where it has none
    used_places: Tensor  # (N,) the places that are not idle ...
    used_rows: Tensor  # (N,) ... and the rows that stand there


class PrefixRows(NamedTuple):
    """What R rows see of a stack."""

    stack: PrefixStack
    most_shares: int  # K
    seen: Tensor  # (R * K,) place in the stack of each row's K-th prefix, 0 where it has none
    mask: Tensor  # (R, 1, W) float32: the prefix's log-weight, very low where there is no key
    gathering: Gathering | None  # None: every row sees the only prefix

    @property
    def width(self) -> int:
        """Columns W."""
        return self.most_shares * self.stack.length

    def key_values(self, layer: int) -> Tensor:
        """Return every row's keys and values (2, R, H, W, D); (2, 1, H, P, D) where all are one."""
        stacked = self.stack.layers[layer]
        if self.gathering is None:
            return stacked
        by_share = stacked.index_select(1, self.seen).unflatten(1, (-1, self.most_shares))
        return by_share.transpose(2, 3).flatten(3, 4)  # from (2, R, K, H, P, D)

    def scores(self, layer: int, query: Tensor) -> Tensor:
        """Return float32 products (R, H, W) of query (R, H, D) and the keys; mask is not in it."""
        keys = self.stack.layers[layer][0].transpose(-1, -2)  # (G, H, D, P)
        if self.gathering is None:
            return float_product(query.transpose(0, 1), keys[0]).transpose(0, 1)
        grouped = self._grouped(query, self.gathering.rows)  # (G, H, M, D)
        products = float_product(grouped, keys).transpose(1, 2).flatten(0, 1)  # (G * M, H, P)
        by_share = products.index_select(0, self.gathering.places)
        return by_share.unflatten(0, (-1, self.most_shares)).transpose(1, 2).flatten(2)

    def add_values(self, layer: int, weights: Tensor, output: Tensor) -> Tensor:
        """Return output (R, H, D) plus the values, drawn by weights (R, H, W)."""
        values = self.stack.layers[layer][1]  # (G, H, P, D)
        if self.gathering is None:
            return output + (weights.transpose(0, 1) @ values[0]).transpose(0, 1)
        by_share = weights.unflatten(2, (self.most_shares, -1)).transpose(1, 2).flatten(0, 1)
        grouped = self._grouped(by_share, self.gathering.shares)  # (G, H, M, P)
        drawn = (grouped @ values).transpose(1, 2).flatten(0, 1)  # (G * M, H, D)
        used = drawn.index_select(0, self.gathering.used_places)
        return output.index_add(0, self.gathering.used_rows, used)

    def _grouped(self, tensor: Tensor, indices: Tensor) -> Tensor:
        """Return (G, H, M, ...): the rows of tensor (..., H, ...) at each place of the products."""
        assert self.gathering is not None, "only gathered rows are grouped"
        gathered = tensor.index_select(0, indices)
        return gathered.unflatten(0, (-1, self.gathering.num_rows)).transpose(1, 2)


class SeenPrefixes:
    """Finds what rows see; keeps the last stack and the last finding for rows that stay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack: PrefixStack | None = None
        self._asked: list[Shares] = []
        self._found: PrefixRows | None = None

    def of(self, shares: Sequence[Shares], *, staying: Sequence[Shares] = ()) -> PrefixRows | None:
        """Return what R rows see; None when none of them sees a prefix.

        staying is what other rows see meanwhile, whose prefixes are kept in the stack with these.
        """
        asked = list(shares)
        if asked != self._asked:
            self._asked, self._found = [], None  # so that a failure leaves nothing half found
            self._found = self._find(asked, staying)
            self._asked = asked
        return self._found

    def forget(self) -> None:
        """Hold no prefix any more."""
        self._stack, self._asked, self._found = None, [], None

    def _find(self, shares: list[Shares], staying: Sequence[Shares]) -> PrefixRows | None:
        in_use = dict.fromkeys(share.prefix for row in (*staying, *shares) for share in row)
        if not in_use:
            self._stack = None
        if not any(shares):
            return None
        stack = self._stack_of(list(in_use))
        most_shares = max(map(len, shares))
        seen = [
            [stack.places[share.prefix] for share in row] + [0] * (most_shares - len(row))
            for row in shares
        ]
        is_one = len(stack.places) == 1 and all(len(row) == 1 for row in shares)
        return PrefixRows(
            stack,
            most_shares,
            self._indices([place for row in seen for place in row]),
            self._mask(shares, stack, most_shares),
            None if is_one else self._gather(shares, stack, most_shares),
        )

    def _stack_of(self, prefixes: list[SharedPrefix]) -> PrefixStack:
        stack = self._stack
        if (
            stack is None
            or not all(prefix in stack.places for prefix in prefixes)
            or len(stack.places) > MOST_IDLE * len(prefixes)
        ):
            stack = self._stack = PrefixStack(prefixes)
        return stack

    def _mask(self, shares: list[Shares], stack: PrefixStack, most_shares: int) -> Tensor:
        very_low = torch.finfo(torch.float32).min
        mask = torch.full((len(shares), most_shares, stack.length), very_low)
        for row, seen in enumerate(shares):
            for place, share in enumerate(seen):
                mask[row, place, : share.prefix.length] = share.log_weight
        return mask.flatten(1).unsqueeze(1).to(self._device)

    def _gather(self, shares: list[Shares], stack: PrefixStack, most_shares: int) -> Gathering:
        standing: list[list[int]] = [[] for _ in stack.places]  # shares of each prefix
        for row, seen in enumerate(shares):
            for place, share in enumerate(seen):
                standing[stack.places[share.prefix]].append(row * most_shares + place)
        num_rows = max(map(len, standing))
        at_places = [0] * (len(standing) * num_rows)
        places = [0] * (len(shares) * most_shares)
        used = []
        for group, some in enumerate(standing):
            for place, index in enumerate(some, start=group * num_rows):
                at_places[place], places[index] = index, place
                used.append(place)
        return Gathering(
            num_rows,
            self._indices([index // most_shares for index in at_places]),
            self._indices(at_places),
            self._indices(places),
            self._indices(used),
            self._indices([at_places[place] // most_shares for place in used]),
        )

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)
