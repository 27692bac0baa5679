"""Attention of packed rows on a CPU: each row by itself, at its own length, by plain products.

There is no padding, nothing is laid out in a grid, and the prefix's dropout mask, one for each row
as the published code draws it, comes from 16-bit random numbers. On a CPU this takes a half
(float32) to a quarter (bfloat16) of the time of PyTorch's fused attention.
Shapes: T tokens of all rows, S of one row, P prefix, K = P + S, H heads, D width of a head.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ptuning.model.packing import Packing
from ptuning.model.rotary import Rotation

DRAWS = 2**16  # a mask entry is drawn as one of so many numbers
BITS = {  # the integers as wide as a floating type
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class PackedRows(NamedTuple):
    """Where the rows of a packed batch lie, whom their tokens see, and the rotation of all."""

    spans: tuple[slice, ...]  # places of each row's tokens among the T
    masks: tuple[Tensor, ...]  # (S, S) each, summands of the scores: 0 or very low
    cos: Tensor  # (2, 1, T, D) float32: of queries, with their scale, and of keys
    sin: Tensor  # the same, the first half of each channel negated
    prefix_mask: Tensor | None = None  # (B, 1, P), summands of the prefix's scores; None: all 0


def find_rows(packing: Packing, mask: Tensor, rotation: Rotation) -> PackedRows:
    """Return the rows of a packing, given the grid's mask (B, 1, S, S), the prefix left out.

    rotation is that of the whole (B, S) grid.
    """
    num_rows, length = packing.shape
    row_of = packing.tokens // length
    columns = packing.tokens % length
    sizes = torch.bincount(row_of, minlength=num_rows).tolist()
    spans, masks, start = [], [], 0
    for row, size in enumerate(sizes):
        span = slice(start, start + size)
        own = columns[span]
        spans.append(span)
        masks.append(mask[min(row, mask.shape[0] - 1), 0][own][:, own].contiguous())
        start += size
    cos, sin = (_both_halves(angle, packing) for angle in rotation)
    sin[..., 0, :].neg_()
    scale = cos.new_tensor([(4 * cos.shape[-1]) ** -0.5, 1.0]).view(2, 1, 1, 1)
    return PackedRows(tuple(spans), tuple(masks), cos.flatten(-3) * scale, sin.flatten(-3) * scale)


def _both_halves(angle: Tensor, packing: Packing) -> Tensor:
    """Return angle (B or 1, 1, S, 2, D/4) of every token for both halves: (1, 1, T, 2, 2, D/4)."""
    grid = angle[:, 0].expand(packing.shape[0], -1, -1, -1)
    tokens = grid.flatten(0, 1).index_select(0, packing.tokens)  # (T, 2, D/4)
    return torch.stack((tokens, tokens), dim=-2)[None, None]


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
    """Return the output as `attend_rows` does, and keys and values (H, T, D); no gradients."""
    done = _attend(fused, rows, _RowKeys(prefix, len(rows.spans), dropout=0.0), num_heads)
    return done.output.unsqueeze(0), done.key, done.value


class _Attended(NamedTuple):
    """What attention of all rows gives: the output (T, E), and (H, T, D) each of the others."""

    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def _attend(
    fused: Tensor,
    rows: PackedRows,
    keys_of: "_RowKeys",
    num_heads: int,
    saved: list[Tensor] | None = None,
) -> _Attended:
    """Attend row by row; saved gets each row's joined keys and values, and its weights."""
    heads = fused.view(fused.shape[1], num_heads, 3, -1).permute(2, 1, 0, 3)  # (3, H, T, D)
    query, key = _rotated(heads[:2], rows.cos, rows.sin)
    value = heads[2]
    output = fused.new_empty(fused.shape[1], num_heads, heads.shape[-1])
    for index, span in enumerate(rows.spans):
        joined = keys_of.join(index, key[:, span], value[:, span])  # (2, H, K, D)
        weights = _weights_of_row(index, query[:, span], joined[0], rows)
        output[span] = torch.bmm(weights, joined[1]).transpose(0, 1)
        if saved is not None:
            saved += [joined, weights]
    return _Attended(output.flatten(1), query, key, value)


def _weights_of_row(index: int, query: Tensor, keys: Tensor, rows: PackedRows) -> Tensor:
    """Return the softmax (H, S, K) of one row's query (H, S, D), scaled, and keys (H, K, D)."""
    scores = torch.bmm(query, keys.transpose(1, 2))
    length = keys.shape[1] - query.shape[1]
    scores[..., length:] += rows.masks[index]
    if rows.prefix_mask is not None:
        scores[..., :length] += rows.prefix_mask[index]
    return scores.softmax(dim=-1)


class _RowAttention(torch.autograd.Function):
    """Forward keeps rotated queries, each row's keys, values and weights; backward is by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        fused: Tensor,
        prefix: Tensor | None,
        rows: PackedRows,
        num_heads: int,
        dropout: float,
    ) -> Tensor:
        keys_of = _RowKeys(prefix, len(rows.spans), dropout)
        saved: list[Tensor] = []
        done = _attend(fused, rows, keys_of, num_heads, saved)
        kept = [] if keys_of.keep is None else [keys_of.keep]
        # A copy: the view would hold the rotated keys, which stand in `saved`, a second time.
        ctx.save_for_backward(done.query.clone(), *saved, *kept)
        ctx.rows, ctx.dropout = rows, dropout
        ctx.prefix_shape = None if prefix is None else prefix.shape
        return done.output.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, *saved = ctx.saved_tensors  # query: (H, T, D)
        rows: PackedRows = ctx.rows
        num_rows = len(rows.spans)
        keep = saved[-1] if len(saved) > 2 * num_rows else None
        num_heads, num_tokens, width = query.shape
        wants_input = ctx.needs_input_grad[0]
        grad_fused = query.new_empty(num_tokens, num_heads, 3, width) if wants_input else None
        turned = query.new_empty(2, *query.shape) if wants_input else None
        grad_prefix = None
        if ctx.prefix_shape is not None:
            grad_prefix = query.new_zeros(ctx.prefix_shape, dtype=torch.float32)
        length = 0 if grad_prefix is None else grad_prefix.shape[3]
        grad = grad_outputs[0].reshape(num_tokens, num_heads, width).transpose(0, 1)
        for index, span in enumerate(rows.spans):
            joined, weights = saved[2 * index : 2 * index + 2]
            grad_row = grad[:, span].contiguous()  # (H, S, D)
            grad_joined = torch.empty_like(joined)  # (2, H, K, D)
            torch.bmm(weights.transpose(1, 2), grad_row, out=grad_joined[1])
            slope = torch.bmm(grad_row, joined[1].transpose(1, 2))
            slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
            torch.bmm(slope.transpose(1, 2), query[:, span], out=grad_joined[0])
            if grad_prefix is not None:
                part = grad_joined[:, :, :length]
                if keep is not None:
                    _keep(part, keep[:, index], part)
                grad_prefix[:, min(index, grad_prefix.shape[1] - 1)] += part
            if turned is not None and grad_fused is not None:
                turned[0][:, span] = torch.bmm(slope, joined[0])
                turned[1][:, span] = grad_joined[0, :, length:]
                grad_fused[span, :, 2] = grad_joined[1, :, length:].transpose(0, 1)
        if turned is not None and grad_fused is not None:
            grad_fused[:, :, :2] = _rotated(turned, rows.cos, rows.sin, sign=-1.0).permute(
                2, 1, 0, 3
            )
            grad_fused = grad_fused.view(1, num_tokens, -1)
        if grad_prefix is not None:
            grad_prefix = (grad_prefix / (1.0 - ctx.dropout)).to(query.dtype)
        return grad_fused, grad_prefix, None, None, None


class _RowKeys:
    """Joins the prefix, under a dropout mask of each row's own, with the row's keys and values."""

    def __init__(self, prefix: Tensor | None, num_rows: int, dropout: float) -> None:
        self.prefix = prefix
        self.length = 0 if prefix is None else prefix.shape[3]
        self.keep: Tensor | None = None  # (2, B, H, P, D)
        if prefix is not None and dropout > 0.0:
            self.prefix = prefix / (1.0 - dropout)
            self.keep = draw_keep_mask((2, num_rows, *prefix.shape[2:]), dropout)

    def join(self, index: int, key: Tensor, value: Tensor) -> Tensor:
        """Return keys and values (2, H, P + S, D) of one row from its own (H, S, D)."""
        joined = key.new_empty(2, key.shape[0], self.length + key.shape[1], key.shape[2])
        if self.prefix is not None:
            prefix = self.prefix[:, min(index, self.prefix.shape[1] - 1)]
            place = joined[:, :, : self.length]
            if self.keep is None:
                place.copy_(prefix)
            else:
                _keep(prefix, self.keep[:, index], place)
        joined[0, :, self.length :] = key
        joined[1, :, self.length :] = value
        return joined


def draw_keep_mask(shape: Sequence[int], dropout: float) -> Tensor:
    """Return an int16 mask: 0 with probability dropout to the nearest 1/65,536, else all bits set.

    Such a mask is drawn and applied (`_keep`) several times as fast as a bool one. It is seeded
    from torch's generator, so that a resumed or recomputed step draws the same.
    """
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    count = math.prod(shape)
    words = numpy.random.SFC64(seed).random_raw(-(-count // 4)).view(numpy.int16)
    threshold = round(dropout * DRAWS) - DRAWS // 2
    return torch.from_numpy(words)[:count].ge_(threshold).neg_().view(*shape)


def _keep(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write values to out, zero where the mask is; all three have one shape."""
    bits = BITS[values.dtype]
    torch.bitwise_and(values.view(bits), mask, out=out.view(bits))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float = 1.0) -> Tensor:
    """Return x (2, H, T, D), queries and keys, rotated; the arithmetic is float32."""
    exact = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    first, second = exact.unflatten(-1, (2, 2, -1)).unbind(-2)
    partner = torch.stack((second, first), dim=-2).view(exact.shape)
    return exact.mul_(cos).addcmul_(partner, sin, value=sign).to(x.dtype)
