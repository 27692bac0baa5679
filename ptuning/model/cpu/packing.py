"""Rows packed end to end for everything that works on single tokens, and unpacked for attention.

Linear layers and norms, nearly all of the work, then see real tokens only; on a GPU attention keeps
its (B, S) grid, where padding costs little (on a CPU: `ptuning.model.cpu.varlen_attention`). In the
last layer only the tokens whose output is read continue after attention.
Shapes: B rows, S tokens of the longest, T real tokens of all rows, N needed tokens, E width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Which cells of the (B, S) grid hold tokens, flattened, and which of those are needed."""

    shape: tuple[int, int]  # (B, S)
    tokens: Tensor  # (T,) cells of the grid, in row order
    needed: Tensor | None  # (N,) indices into `tokens`; None for all


def find_packing(attention_mask: Tensor, needed: Tensor | None) -> Packing:
    """Return the packing of attention_mask (B, S), 0 at padding; needed (B, S) is True where
    output is read.

    On a GPU this waits for the device. What knows the lengths of its rows gives the indices
    instead: `ptuning.data.tokenization.pad_right`, `pack_prompts`.

    >>> import torch
    >>> find_packing(torch.tensor([[1, 1, 0], [1, 1, 1]]), None).tokens.tolist()
    [0, 1, 3, 4, 5]
    """
    real = attention_mask.bool()
    tokens = real.flatten().nonzero().squeeze(1)  # (T,)
    if needed is not None:
        needed = needed.flatten()[tokens].nonzero().squeeze(1)  # (N,)
    return Packing((real.shape[0], real.shape[1]), tokens, needed)


def pack_prompts(lengths: Sequence[int], device: torch.device) -> Packing:
    """Return the packing of right-padded prompts of which only the last token is needed.

    >>> pack_prompts([2, 3], torch.device("cpu"))[1:]
    (tensor([0, 1, 3, 4, 5]), tensor([1, 4]))
    """
    longest = max(lengths)
    tokens = [row * longest + column for row, n in enumerate(lengths) for column in range(n)]
    ends = torch.tensor(lengths).cumsum(0) - 1
    return Packing((len(lengths), longest), torch.tensor(tokens, device=device), ends.to(device))


def pack(grid: Tensor, packing: Packing, *, only_needed: bool = False) -> Tensor:
    """Return the real tokens of grid (B, S, E) end to end: (1, T, E), or the needed (1, N, E)."""
    cells = packing.tokens
    if only_needed and packing.needed is not None:
        cells = cells[packing.needed]
    return grid.flatten(0, 1).index_select(0, cells).unsqueeze(0)


def pack_positions(positions: Tensor, packing: Packing) -> Tensor:
    """Return positions (B or 1, 2, S) of the real tokens, end to end: (1, 2, T)."""
    grid = positions.expand(packing.shape[0], -1, -1).transpose(1, 2)  # (B, S, 2)
    return pack(grid, packing).transpose(1, 2)


def unpack(packed: Tensor, packing: Packing) -> Tensor:
    """Put packed tokens (1, T, ...) back in their cells, zeros elsewhere: (B, S, ...)."""
    num_rows, length = packing.shape
    grid = packed.new_zeros(num_rows * length, *packed.shape[2:])
    # index_copy_ would keep the packed tokens for its backward pass, which reads only their shape.
    grid.index_put_((packing.tokens,), packed.squeeze(0))
    return grid.unflatten(0, (num_rows, length))


def take_needed(packed: Tensor, packing: Packing) -> Tensor:
    """Keep the needed ones of packed (1, T, E) tokens: (1, N, E)."""
    return packed if packing.needed is None else packed.index_select(1, packing.needed)
