"""Attention of packed rows on a CPU: rows of about one length together, by plain products.

Nothing is laid out in a grid of the longest row, and the prefix's dropout mask, one for each row as
the published code draws it, comes from random bytes. On a CPU this takes a half (float32) to a
quarter (bfloat16) of the time of PyTorch's fused attention.
Shapes: T tokens of all rows, C cells of all groups, R rows of a group, S tokens of its longest, P
prefix, K keys, P + S and at most 31 that nobody sees, H heads, D width of a head.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from ptuning.model.packing import Packing
from ptuning.model.rotary import Rotation, swap_quarters

PRODUCTS = 32  # matrices in one call: its overhead is small then, and the scores stay in the cache
PADDED_SHARE = 8  # a row joins a group whose longest is longer by an eighth at most
KEY_STEP = 32  # numbers of 16 bits in a vector: the softmax of others takes up to twice as long
BLOCK_ELEMENTS = 2**18  # rotated at a time: 1 MiB in float32, which stays in the cache
BYTES = 2**8  # a mask entry is drawn as one of so many numbers
BITS = {  # the integers as wide as a floating type
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class RowGroup(NamedTuple):
    """R rows of about one length, S the longest, attended by the same products."""

    rows: Tensor  # (R,) which rows of the batch
    members: slice  # the same, counted through all groups
    cells: slice  # their R x S places
    mask: Tensor  # (R, 1, S, K - P), summands of the scores: 0 or very low


class PackedRows(NamedTuple):
    """Where the rows of a packed batch lie, whom their tokens see, and the rotation of all.

    The cells of the groups, one after the other, are C places; those behind a shorter row's end
    hold its last token again on the way in, and nothing on the way out.
    """

    groups: tuple[RowGroup, ...]
    spans: tuple[slice, ...]  # each row's real tokens among the C places
    sources: Tensor  # (C,) which of the T tokens lies in each place
    padding: Tensor  # places behind a row's end
    places: Tensor  # (T,) the place of each token
    cos: Tensor  # (T, 1, 2, D) float32: of queries, with their scale, and of keys
    sin: Tensor  # the same, signed as a Rotation's
    prefix_mask: Tensor | None = None  # (B, 1, P), summands of the prefix's scores; None: all 0


def find_rows(
    packing: Packing, mask: Tensor, rotation: Rotation, *, num_heads: int, prefix_length: int
) -> PackedRows:
    """Return the rows of a packing, given the grid's mask (B, 1, S, S), the prefix left out.

    rotation is that of the whole (B, S) grid.
    """
    num_rows, length = packing.shape
    sizes = torch.bincount(packing.tokens // length, minlength=num_rows)
    firsts = sizes.cumsum(0) - sizes
    groups, sources, padding = [], [], []
    spans: dict[int, slice] = {}
    start = 0
    for members in group_rows(sizes.tolist(), num_heads=num_heads):
        rows = torch.tensor(members)
        last = sizes[rows, None] - 1  # (R, 1)
        steps = torch.arange(int(last.max()) + 1)
        source = firsts[rows, None] + torch.minimum(steps, last)  # (R, S)
        beyond = steps > last  # (R, S)
        sources.append(source.flatten())
        padding.append(start + beyond.flatten().nonzero().squeeze(1))
        seen = _mask_of(rows, packing.tokens[source] % length, beyond, mask)
        seen = functional.pad(
            seen,
            (0, round_up_keys(prefix_length + len(steps)) - prefix_length - len(steps)),
            value=torch.finfo(mask.dtype).min,
        )
        first_member = len(spans)
        for index, row in enumerate(members):
            first = start + index * len(steps)
            spans[row] = slice(first, first + int(sizes[row]))
        cells = slice(start, start + source.numel())
        groups.append(RowGroup(rows, slice(first_member, len(spans)), cells, seen))
        start = cells.stop
    in_order = tuple(spans[row] for row in range(num_rows))
    cos, sin = (_of_tokens(angle, packing) for angle in rotation)
    scale = cos.new_tensor([cos.shape[-1] ** -0.5, 1.0]).view(1, 1, 2, 1)
    return PackedRows(
        tuple(groups),
        in_order,
        torch.cat(sources),
        torch.cat(padding),
        torch.cat([torch.arange(span.start, span.stop) for span in in_order]),
        cos * scale,
        sin * scale,
    )


def group_rows(sizes: Sequence[int], *, num_heads: int) -> list[list[int]]:
    """Return the numbers of rows of these sizes in groups, the longest of each first.

    >>> group_rows([50, 90, 100, 52], num_heads=8)
    [[2, 1], [3, 0]]
    """
    most = max(1, PRODUCTS // num_heads)
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
    """Return the keys that are held for so many, the next multiple of 32.

    >>> round_up_keys(128), round_up_keys(225)
    (128, 256)
    """
    return -(-num_keys // KEY_STEP) * KEY_STEP


def _mask_of(rows: Tensor, columns: Tensor, beyond: Tensor, mask: Tensor) -> Tensor:
    """Return the mask (R, 1, S, S) of rows whose tokens stand in columns (R, S) of the grid."""
    of_row = rows if len(mask) > 1 else torch.zeros_like(rows)
    seen = mask[of_row[:, None, None], 0, columns[:, :, None], columns[:, None]]
    return seen.masked_fill(beyond[:, None], torch.finfo(mask.dtype).min).unsqueeze(1)


def _of_tokens(angle: Tensor, packing: Packing) -> Tensor:
    """Return angle (B or 1, 1, S, D) of every token: (T, 1, 1, D)."""
    grid = angle[:, 0].expand(packing.shape[0], -1, -1)
    return grid.flatten(0, 1).index_select(0, packing.tokens)[:, None, None]


def attend_rows(
    fused: Tensor, prefix: Tensor | None, rows: PackedRows, *, num_heads: int, dropout: float
) -> Tensor:
    """Return the attention's output (1, T, E) for fused (1, T, 3E): each head's query, key, value.

    prefix is (2, 1 or B, H, P, D) or None. dropout > 0 draws a mask for every row.
    """
    if prefix is not None:
        prefix = prefix.to(fused.dtype)
    with torch.autocast("cpu", enabled=False):  # types are settled here
        output: Tensor = _RowAttention.apply(fused, prefix, rows, num_heads, dropout)
    return output


def read_rows(
    fused: Tensor, prefix: Tensor | None, rows: PackedRows, *, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output as `attend_rows` does, and keys and values (H, C, D); no gradients."""
    length = 0 if prefix is None else prefix.shape[3]
    output, attended = _attend(fused, rows, _Prefix(prefix, len(rows.spans), 0.0), num_heads)
    own = [
        joined[:, :, :, length : length + query.shape[2]].transpose(1, 2).flatten(2, 3)
        for query, joined, _ in attended
    ]
    key, value = torch.cat(own, dim=2)  # (H, C, D) each
    return output, key, value


class _Attended(NamedTuple):
    """What a group's backward pass needs."""

    query: Tensor  # (R, H, S, D), rotated and scaled
    joined: Tensor  # (2, R, H, K, D): keys and values, the prefix's before the rows' own
    weights: Tensor  # (R, H, S, K)


def _attend(
    fused: Tensor, rows: PackedRows, prefix: "_Prefix", num_heads: int
) -> tuple[Tensor, list[_Attended]]:
    """Return the output (1, T, E), and what each group's attention went through."""
    turned = _rotated(fused.view(fused.shape[1], num_heads, 3, -1), rows.cos, rows.sin)
    turned = turned.index_select(0, rows.sources)  # (C, H, 3, D)
    output = fused.new_empty(turned.shape[0], num_heads, turned.shape[-1])
    attended = []
    for group in rows.groups:
        heads = turned[group.cells].unflatten(0, (len(group.rows), -1)).permute(3, 0, 2, 1, 4)
        query = heads[0].contiguous()  # (R, H, S, D)
        joined = prefix.join(group, heads[1:])
        weights = _products(query, joined[0].transpose(2, 3))  # (R, H, S, K)
        weights[..., prefix.length :] += group.mask
        if rows.prefix_mask is not None:
            weights[..., : prefix.length] += rows.prefix_mask[group.rows].unsqueeze(1)
        torch.softmax(weights, dim=-1, out=weights)
        read = _products(weights, joined[1]).transpose(1, 2)  # (R, S, H, D)
        output[group.cells].view(read.shape).copy_(read)
        attended.append(_Attended(query, joined, weights))
    return output.flatten(1).index_select(0, rows.places).unsqueeze(0), attended


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return left (R, H, X, Y) times right (R, H, Y, Z), matrix by matrix."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


class _RowAttention(torch.autograd.Function):
    """Forward keeps rotated queries, each group's keys, values and weights; backward is by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        fused: Tensor,
        prefix: Tensor | None,
        rows: PackedRows,
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
        rows: PackedRows = ctx.rows
        saved = ctx.saved_tensors
        num_kept = 3 * len(rows.groups)
        keep = saved[num_kept] if len(saved) > num_kept else None
        num_heads, width = saved[0].shape[1], saved[0].shape[3]
        grad_prefix = turned = None
        length = 0 if ctx.prefix_shape is None else ctx.prefix_shape[3]
        if ctx.prefix_shape is not None:
            grad_prefix = saved[0].new_zeros(ctx.prefix_shape, dtype=torch.float32)
        grad = grad_outputs[0][0].index_select(0, rows.sources)  # (C, E)
        grad.index_fill_(0, rows.padding, 0.0)
        if ctx.needs_input_grad[0]:
            turned = grad.new_empty(len(grad), num_heads, 3, width)
        for index, group in enumerate(rows.groups):
            attended = _Attended(*saved[3 * index : 3 * index + 3])
            grad_rows = grad[group.cells].view(len(group.rows), -1, num_heads, width)
            slope, grad_joined = _slopes(attended, grad_rows.transpose(1, 2).contiguous())
            if grad_prefix is not None:
                _add_prefix_gradient(grad_prefix, grad_joined, keep, group)
            if turned is not None:
                place = turned[group.cells].unflatten(0, (len(group.rows), -1))  # (R, S, H, 3, D)
                own = slice(length, length + place.shape[1])
                place[:, :, :, 0] = _products(slope, attended.joined[0]).transpose(1, 2)
                place[:, :, :, 1:] = grad_joined[:, :, :, own].permute(1, 3, 2, 0, 4)
        grad_fused = None
        if turned is not None:
            turned = turned.index_select(0, rows.places)  # (T, H, 3, D)
            grad_fused = _rotated(turned, rows.cos, rows.sin, sign=-1.0).flatten(1).unsqueeze(0)
        if grad_prefix is not None:
            grad_prefix = (grad_prefix / (1.0 - ctx.dropout)).to(grad.dtype)
        return grad_fused, grad_prefix, None, None, None


def _slopes(attended: _Attended, grad_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the scores (R, H, S, K) and of keys and values (2, R, H, K, D)."""
    query, joined, weights = attended
    slope = _products(grad_rows, joined[1].transpose(2, 3))
    torch._softmax_backward_data(slope, weights, -1, weights.dtype, grad_input=slope)
    grad_joined = torch.empty_like(joined)
    for half, left, right in ((0, slope, query), (1, weights, grad_rows)):
        left, right = left.flatten(0, 1), right.flatten(0, 1)
        torch.bmm(left.transpose(1, 2), right, out=grad_joined[half].flatten(0, 1))
    return slope, grad_joined


def _add_prefix_gradient(
    grad_prefix: Tensor, grad_joined: Tensor, keep: Tensor | None, group: RowGroup
) -> None:
    """Add to grad_prefix (2, 1 or B, H, P, D) float32 what these rows' first P keys have."""
    part = grad_joined[:, :, :, : grad_prefix.shape[3]]  # (2, R, H, P, D)
    if keep is not None:
        _keep(part, keep[:, group.members], part)
    if grad_prefix.shape[1] == 1:
        grad_prefix += part.sum(dim=1, keepdim=True, dtype=torch.float32)
    else:
        grad_prefix.index_copy_(1, group.rows, part.float())


class _Prefix:
    """Joins the prefix, under a dropout mask of each row's own, with rows' keys and values."""

    def __init__(self, prefix: Tensor | None, num_rows: int, dropout: float) -> None:
        self.prefix = prefix
        self.length = 0 if prefix is None else prefix.shape[3]
        self.keep: Tensor | None = None  # (2, B, H, P, D), the rows counted through the groups
        if prefix is not None and dropout > 0.0:
            self.prefix = prefix / (1.0 - dropout)
            self.keep = draw_keep_mask((2, num_rows, *prefix.shape[2:]), dropout)

    def join(self, group: RowGroup, own: Tensor) -> Tensor:
        """Return keys and values of a group (2, R, H, K, D), given its own (2, R, H, S, D)."""
        _, num_rows, num_heads, length, width = own.shape
        num_keys = self.length + group.mask.shape[3]
        joined = own.new_empty(2, num_rows, num_heads, num_keys, width)
        if self.prefix is not None:
            prefix = self.prefix
            if prefix.shape[1] > 1:
                prefix = prefix.index_select(1, group.rows)
            place = joined[:, :, :, : self.length]
            if self.keep is None:
                place.copy_(prefix)
            else:
                _keep(prefix, self.keep[:, group.members], place)
        joined[:, :, :, self.length : self.length + length] = own
        joined[:, :, :, self.length + length :] = 0.0
        return joined


def draw_keep_mask(shape: Sequence[int], dropout: float) -> Tensor:
    """Return an int8 mask: 0 with probability dropout, else all bits set.

    An entry falls where a random byte is below a threshold: dropout * 256, rounded up or down by
    chance for each matrix of the last two axes, so that the probability is exact. Such a mask is
    drawn and applied (`_keep`) several times as fast as a bool one. It is seeded from torch's
    generator, so that a resumed or recomputed step draws the same.
    """
    assert 0.0 <= dropout <= 1 - 1 / BYTES, "a threshold is a byte"
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    count = math.prod(shape)
    words = numpy.random.SFC64(seed).random_raw(-(-count // 8)).view(numpy.uint8)
    lower = math.floor(dropout * BYTES)
    rounded_up = torch.rand(*shape[:-2], 1, 1) < dropout * BYTES - lower
    thresholds = rounded_up.to(torch.uint8) + lower
    drawn = torch.from_numpy(words)[:count].view(*shape)
    return drawn.ge_(thresholds).view(torch.int8).neg_()


def _keep(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write values to out, zero where the mask is; the shapes are those of out."""
    bits = BITS[values.dtype]
    torch.bitwise_and(values.view(bits), mask, out=out.view(bits))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float = 1.0) -> Tensor:
    """Return x (T, H, 3, D) with queries and keys rotated; the arithmetic is float32."""
    rotated = torch.empty_like(x)
    block = max(1, BLOCK_ELEMENTS // x[0].numel())
    for start in range(0, len(x), block):
        part = slice(start, start + block)
        exact = x[part].to(torch.float32, copy=True)
        pairs = exact[:, :, :2]
        partner = swap_quarters(pairs)
        pairs.mul_(cos[part]).addcmul_(partner, sin[part], value=sign)
        rotated[part] = exact
    return rotated
