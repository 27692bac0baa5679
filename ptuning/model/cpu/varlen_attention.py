"""Attention of flat rows on a CPU: rows of similar length together, by batched matmuls.

No grid as wide as the longest row is formed, and the prefix's dropout mask, one per row as in the
published code, comes from random bytes. On a CPU this takes a half (float32) to a quarter
(bfloat16) of the time of PyTorch's fused attention.
Shapes: B batch, T tokens of all rows, R rows of a group, S tokens of its longest, P prefix,
K keys: P + S, rounded up with at most 31 masked ones, H heads, D head width.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from ptuning.model.positions import FlatLayout, Rotation, swap_quarters

MATRICES = 32  # in one call: its overhead is small then, and the scores stay in the cache
PADDED_SHARE = 8  # a group's longest row is at most an eighth longer than any row in it
KEY_STEP = 32  # numbers of 16 bits in a vector: softmax over other widths takes up to twice as long
BYTES = 2**8  # values of the random byte that decides about a mask entry
BITS = {  # the integers as wide as a floating type
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class RowGroup(NamedTuple):
    """R rows of similar length, S the longest, computed by the same matmuls.

    Cells past a shorter row's end repeat its last token and are masked.
    """

    rows: Tensor  # (R,) which rows of the batch
    members: slice  # the same, counted through all groups
    tokens: tuple[slice, ...]  # each row's own of the T tokens
    sources: Tensor  # (R * S,) the token in each cell, of the T
    cos: Tensor  # (R * S, 1, 2, D) float32: of queries, with their scale, and of keys
    sin: Tensor  # the same, signed as a Rotation's
    mask: Tensor  # (R, 1, S, K - P), added to the scores: 0 or very low


class VarlenRows(NamedTuple):
    """A batch's rows, grouped by length, with their masks and rotations."""

    groups: tuple[RowGroup, ...]
    spans: tuple[slice, ...]  # each row's real tokens among the cells of all groups
    prefix_mask: Tensor | None = None  # (B, 1, P), added to the prefix's scores; None: all 0


def find_rows(
    layout: FlatLayout, mask: Tensor, rotation: Rotation, *, num_heads: int, prefix_length: int
) -> VarlenRows:
    """Group the rows of a layout; mask (B or 1, 1, S, S) and rotation are those of the whole grid.

    The mask leaves the prefix out.
    """
    num_rows, length = layout.shape
    sizes = torch.bincount(layout.tokens // length, minlength=num_rows)  # (B,)
    firsts = sizes.cumsum(0) - sizes
    cos, sin = (
        angle.expand(num_rows, -1, -1).flatten(0, 1)[layout.tokens][:, None, None]  # (T, 1, 1, D)
        for angle in rotation
    )
    scale = cos.new_tensor([cos.shape[-1] ** -0.5, 1.0]).view(1, 1, 2, 1)  # of queries, of keys
    cos, sin = cos * scale, sin * scale  # (T, 1, 2, D)
    lowest = torch.finfo(mask.dtype).min
    groups = []
    spans: dict[int, slice] = {}
    start = 0
    for members in group_rows(sizes.tolist(), num_heads=num_heads):
        rows = torch.tensor(members)
        last = sizes[rows, None] - 1  # (R, 1)
        steps = torch.arange(int(last.max()) + 1)
        source = firsts[rows, None] + torch.minimum(steps, last)  # (R, S)
        columns = layout.tokens[source] % length  # (R, S) of the grid
        mask_rows = rows if len(mask) > 1 else torch.zeros_like(rows)
        seen = mask[mask_rows[:, None, None], 0, columns[:, :, None], columns[:, None]]  # (R, S, S)
        seen = seen.masked_fill((steps > last)[:, None], lowest).unsqueeze(1)  # (R, 1, S, S)
        num_keys = prefix_length + len(steps)
        seen = functional.pad(seen, (0, round_up_keys(num_keys) - num_keys), value=lowest)
        first_member, source = len(spans), source.flatten()  # (R * S,)
        for index, row in enumerate(members):
            first = start + index * len(steps)
            spans[row] = slice(first, first + int(sizes[row]))
        groups.append(
            RowGroup(
                rows,
                slice(first_member, len(spans)),
                tuple(slice(int(firsts[row]), int(firsts[row] + sizes[row])) for row in members),
                source,
                cos[source],
                sin[source],
                seen,
            )
        )
        start += len(source)
    return VarlenRows(tuple(groups), tuple(spans[row] for row in range(num_rows)))


def group_rows(sizes: Sequence[int], *, num_heads: int) -> list[list[int]]:
    """Group rows of these sizes by length; each group starts with its longest row.

    >>> group_rows([50, 90, 100, 52], num_heads=8)
    [[2, 1], [3, 0]]
    """
    most = max(1, MATRICES // num_heads)
    groups: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        if groups and len(groups[-1]) < most:
            longest = sizes[groups[-1][0]]
            if (longest - sizes[row]) * PADDED_SHARE <= longest:
                groups[-1].append(row)
                continue
        groups.append([row])
    return groups


def round_up_keys(num_keys: int) -> int:
    """Round up to the key columns that are computed, a multiple of 32.

    >>> round_up_keys(128), round_up_keys(225)
    (128, 256)
    """
    return -(-num_keys // KEY_STEP) * KEY_STEP


def varlen_attention(
    fused: Tensor, prefix: Tensor | None, rows: VarlenRows, *, num_heads: int, dropout: float
) -> Tensor:
    """Return the attention output (1, T, E) for fused (1, T, 3E): each head's query, key, value.

    prefix is (2, 1 or B, H, P, D) or None. dropout > 0 draws a mask for each row.
    """
    if prefix is not None:
        prefix = prefix.to(fused.dtype)
    with torch.autocast("cpu", enabled=False):  # the dtypes are right already
        output: Tensor = _RowAttention.apply(fused, prefix, rows, num_heads, dropout)
    return output


def varlen_prefill(
    fused: Tensor, prefix: Tensor | None, rows: VarlenRows, *, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and keys and values (H, cells, D) of all groups; no gradients."""
    length = 0 if prefix is None else prefix.shape[3]
    output, attended = _attend(fused, rows, _Prefix(prefix, len(rows.spans), 0.0), num_heads)
    own = [
        joined[:, :, :, length : length + query.shape[2]]
        .transpose(1, 2)
        .flatten(2, 3)  # (2, H, R * S, D)
        for query, joined, _ in attended
    ]
    key, value = torch.cat(own, dim=2)  # (H, cells, D) each
    return output, key, value


class _Attended(NamedTuple):
    """What a group's backward pass needs."""

    query: Tensor  # (R, H, S, D), rotated and scaled
    joined: Tensor  # (2, R, H, K, D): keys and values, the prefix's before the rows' own
    weights: Tensor  # (R, H, S, K)


def _attend(
    fused: Tensor, rows: VarlenRows, prefix: "_Prefix", num_heads: int
) -> tuple[Tensor, list[_Attended]]:
    """Return the output (1, T, E) and what each group's backward pass needs."""
    tokens = fused[0].unflatten(1, (num_heads, 3, -1))  # (T, H, 3, D)
    output = fused.new_empty(len(tokens), num_heads, tokens.shape[-1])
    attended = []
    for group in rows.groups:
        cells = tokens.index_select(0, group.sources)  # (R * S, H, 3, D)
        rotated, key = (_by_head(x, group) for x in _rotate(cells[:, :, :2], group).unbind(2))
        query = fused.new_empty(rotated.shape).copy_(rotated)  # (R, H, S, D)
        joined = prefix.join(group, key, _by_head(cells[:, :, 2], group))
        weights = _matmul(query, joined[0].transpose(2, 3))  # (R, H, S, K)
        weights[..., prefix.length :] += group.mask
        if rows.prefix_mask is not None:
            prefix_mask = rows.prefix_mask[group.rows].unsqueeze(1)  # (R, 1, 1, P)
            weights[..., : prefix.length] += prefix_mask
        torch.softmax(weights, dim=-1, out=weights)
        attended_rows = _matmul(weights, joined[1]).transpose(1, 2)  # (R, S, H, D)
        for index, place in enumerate(group.tokens):
            output[place] = attended_rows[index, : place.stop - place.start]
        attended.append(_Attended(query, joined, weights))
    return output.flatten(1).unsqueeze(0), attended  # (1, T, E)


def _rotate(pairs: Tensor, group: RowGroup, *, sign: float = 1.0) -> Tensor:
    """Rotate pairs (R * S, H, 2, D) of queries and keys, in float32; may overwrite them."""
    exact = pairs.float()
    partner = swap_quarters(exact)
    return exact.mul_(group.cos).addcmul_(partner, group.sin, value=sign)


def _by_head(cells: Tensor, group: RowGroup) -> Tensor:
    return cells.unflatten(0, (len(group.rows), -1)).transpose(1, 2)  # (R, H, S, D)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left (R, H, X, Y) @ right (R, H, Y, Z): (R, H, X, Z), several times faster here."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


class _RowAttention(torch.autograd.Function):
    """Save rotated queries, each group's keys and values, and weights; derive backward by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        fused: Tensor,
        prefix: Tensor | None,
        rows: VarlenRows,
        num_heads: int,
        dropout: float,
    ) -> Tensor:
        given = _Prefix(prefix, len(rows.spans), dropout)
        output, attended = _attend(fused, rows, given, num_heads)
        kept = [] if given.keep is None else [given.keep]
        ctx.save_for_backward(*[tensor for group in attended for tensor in group], *kept)
        ctx.rows, ctx.dropout = rows, dropout
        ctx.prefix_shape = None if prefix is None else prefix.shape
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows: VarlenRows = ctx.rows
        saved = ctx.saved_tensors
        num_kept = 3 * len(rows.groups)
        keep = saved[num_kept] if len(saved) > num_kept else None
        grad_prefix = grad_fused = None
        length = 0 if ctx.prefix_shape is None else ctx.prefix_shape[3]
        if ctx.prefix_shape is not None:
            grad_prefix = saved[0].new_zeros(ctx.prefix_shape, dtype=torch.float32)
        grad = grad_outputs[0][0].unflatten(1, (saved[0].shape[1], -1))  # (T, H, D)
        if ctx.needs_input_grad[0]:
            grad_fused = grad.new_empty(*grad.shape[:2], 3, grad.shape[2])
        for index, group in enumerate(rows.groups):
            attended = _Attended(*saved[3 * index : 3 * index + 3])
            grad_rows = torch.zeros_like(attended.query)
            for place, target in zip(group.tokens, grad_rows, strict=True):
                target[:, : place.stop - place.start] = grad[place].transpose(0, 1)  # (H, S, D)
            slope, grad_joined = _slopes(attended, grad_rows)
            if grad_prefix is not None:
                _add_prefix_gradient(grad_prefix, grad_joined, keep, group)
            if grad_fused is not None:
                own = grad_joined[:, :, :, length : length + slope.shape[2]]  # (2, R, H, S, D)
                grad_query = _matmul(slope, attended.joined[0])
                _add_own_gradient(grad_fused, grad_query, own, group)
        if grad_fused is not None:
            grad_fused = grad_fused.flatten(1).unsqueeze(0)  # (1, T, 3 * E)
        if grad_prefix is not None:
            grad_prefix = (grad_prefix / (1.0 - ctx.dropout)).to(grad.dtype)
        return grad_fused, grad_prefix, None, None, None


def _slopes(attended: _Attended, grad_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the scores (R, H, S, K) and of keys and values (2, R, H, K, D)."""
    query, joined, weights = attended
    slope = _matmul(grad_rows, joined[1].transpose(2, 3))  # (R, H, S, K)
    torch._softmax_backward_data(slope, weights, -1, weights.dtype, grad_input=slope)
    grad_joined = torch.empty_like(joined)
    for half, left, right in ((0, slope, query), (1, weights, grad_rows)):
        left, right = left.flatten(0, 1), right.flatten(0, 1)  # (R * H, S, K), (R * H, S, D)
        torch.bmm(left.transpose(1, 2), right, out=grad_joined[half].flatten(0, 1))  # (R * H, K, D)
    return slope, grad_joined


def _add_own_gradient(
    grad_fused: Tensor, grad_query: Tensor, grad_own: Tensor, group: RowGroup
) -> None:
    """Write the gradients of a group's queries, keys and values to grad_fused (T, H, 3, D).

    grad_query is (R, H, S, D), of rotated queries; grad_own (2, R, H, S, D), of keys and values.
    """
    pairs = torch.stack((grad_query, grad_own[0]), dim=3)  # (R, H, S, 2, D)
    pairs = pairs.transpose(1, 2).flatten(0, 1)  # (R * S, H, 2, D)
    pairs = _rotate(pairs, group, sign=-1.0).unflatten(0, (len(group.rows), -1))  # (R, S, H, 2, D)
    for index, place in enumerate(group.tokens):
        num_tokens = place.stop - place.start
        grad_fused[place, :, :2] = pairs[index, :num_tokens]
        grad_fused[place, :, 2] = grad_own[1, index, :, :num_tokens].transpose(0, 1)  # (S, H, D)


def _add_prefix_gradient(
    grad_prefix: Tensor, grad_joined: Tensor, keep: Tensor | None, group: RowGroup
) -> None:
    """Add the gradients of a group's first P keys to grad_prefix (2, 1 or B, H, P, D), float32."""
    part = grad_joined[:, :, :, : grad_prefix.shape[3]]  # (2, R, H, P, D)
    if keep is not None:
        _keep(part, keep[:, group.members], part)
    if grad_prefix.shape[1] == 1:
        grad_prefix += part.sum(dim=1, keepdim=True, dtype=torch.float32)
    else:
        grad_prefix.index_copy_(1, group.rows, part.float())


class _Prefix:
    """Joins the prefix, under each row's own dropout mask, with the rows' keys and values."""

    def __init__(self, prefix: Tensor | None, num_rows: int, dropout: float) -> None:
        self.prefix = prefix
        self.length = 0 if prefix is None else prefix.shape[3]
        self.keep: Tensor | None = None  # (2, B, H, P, D), rows in the order of the groups
        if prefix is not None and dropout > 0.0:
            self.prefix = prefix / (1.0 - dropout)
            self.keep = draw_keep_mask((2, num_rows, *prefix.shape[2:]), dropout)

    def join(self, group: RowGroup, key: Tensor, value: Tensor) -> Tensor:
        """Return a group's keys and values (2, R, H, K, D), given its own (R, H, S, D) each."""
        num_rows, num_heads, length, width = value.shape
        num_keys = self.length + group.mask.shape[3]
        joined = value.new_empty(2, num_rows, num_heads, num_keys, width)
        if self.prefix is not None:
            prefix = self.prefix
            if prefix.shape[1] > 1:
                prefix = prefix.index_select(1, group.rows)
            place = joined[:, :, :, : self.length]
            if self.keep is None:
                place.copy_(prefix)
            else:
                _keep(prefix, self.keep[:, group.members], place)
        joined[0, :, :, self.length : self.length + length] = key
        joined[1, :, :, self.length : self.length + length] = value
        joined[:, :, :, self.length + length :] = 0.0
        return joined


def draw_keep_mask(shape: Sequence[int], dropout: float) -> Tensor:
    """Return an int8 mask: 0 with probability dropout, else all bits set.

    An entry is 0 where a random byte is below a threshold: dropout * 256, rounded up or down at
    random for each matrix of the last two axes, so that the probability is exact. Such a mask is
    drawn and applied (`_keep`) several times as fast as a bool one. torch's generator seeds it, so
    a resumed or recomputed step draws the same mask.
    """
    assert 0.0 <= dropout <= 1 - 1 / BYTES, "a threshold is a byte"
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    count = math.prod(shape)
    words = numpy.random.SFC64(seed).random_raw(-(-count // 8)).view(numpy.uint8)
    lower = math.floor(dropout * BYTES)
    rounded_up = torch.rand(*shape[:-2], 1, 1) < dropout * BYTES - lower
    thresholds = rounded_up.to(torch.uint8) + lower
    drawn = torch.from_numpy(words)[:count].view(*shape)  # shape
    return drawn.ge_(thresholds).view(torch.int8).neg_()


def _keep(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write values to out, zero where the mask is zero."""
    bits = BITS[values.dtype]
    torch.bitwise_and(values.view(bits), mask, out=out.view(bits))
