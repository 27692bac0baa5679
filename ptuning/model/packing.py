"""Rows laid end to end for all that works on single tokens, and apart again for attention.

Linear layers and norms, nearly all of the work, then see real tokens only; attention keeps its
(B, S) grid, where padding costs little. In the last layer only the tokens whose output is asked
for go on after attention.
Shapes: B rows, S tokens of the longest, T real tokens of all rows, N needed tokens, E width.
"""

from typing import NamedTuple

from torch import Tensor


class Packing(NamedTuple):
    """Which cells of the (B, S) grid hold tokens, flattened, and which of those are needed at the
    end.
    """

    shape: tuple[int, int]  # (B, S)
    tokens: Tensor  # (T,) cells of the grid, in row order
    needed: Tensor | None  # (N,) places in `tokens`; None for all


def find_packing(attention_mask: Tensor, needed: Tensor | None) -> Packing:
    """Return the packing of attention_mask (B, S), 0 at padding; needed (B, S) is True where
    output is read.

    >>> import torch
    >>> find_packing(torch.tensor([[1, 1, 0], [1, 1, 1]]), None).tokens.tolist()
    [0, 1, 3, 4, 5]
    """
    real = attention_mask.bool()
    tokens = real.flatten().nonzero().squeeze(1)  # (T,)
    if needed is not None:
        needed = needed.flatten()[tokens].nonzero().squeeze(1)  # (N,)
    return Packing((real.shape[0], real.shape[1]), tokens, needed)


def pack(grid: Tensor, packing: Packing, *, only_needed: bool = False) -> Tensor:
    """Lay the real tokens of grid (B, S, E) end to end: (1, T, E), or the needed ones (1, N, E)."""
    cells = packing.tokens
    if only_needed and packing.needed is not None:
        cells = cells[packing.needed]
    return grid.flatten(0, 1).index_select(0, cells).unsqueeze(0)


def unpack(packed: Tensor, packing: Packing) -> Tensor:
    """Put packed (1, T, E) tokens back in their cells, zeros elsewhere: (B, S, E)."""
    num_rows, length = packing.shape
    grid = packed.new_zeros(num_rows * length, packed.shape[-1])
    return grid.index_copy(0, packing.tokens, packed[0]).unflatten(0, (num_rows, length))


def take_needed(packed: Tensor, packing: Packing) -> Tensor:
    """Keep the needed ones of packed (1, T, E) tokens: (1, N, E)."""
    return packed if packing.needed is None else packed.index_select(1, packing.needed)


def unpack_needed(packed: Tensor, packing: Packing) -> Tensor:
    """Put the needed tokens (1, N, E) in their cells, zeros elsewhere: (B, S, E)."""
    if packing.needed is None:
        return unpack(packed, packing)
    return unpack(packed, packing._replace(tokens=packing.tokens[packing.needed]))
