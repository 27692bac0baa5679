"""GLM's two-dimensional positions and its attention mask, derived from the tokens.

A row is `context <sop> answer`. Context tokens count 0, 1, 2, ... in the first channel and 0 in the
second; from <sop> on the first channel stays at the mask token's position and the second counts
1, 2, 3, ... Everybody sees the whole context; from <sop> on attention is causal. Padding is hidden
and has position 0.
Source: Du et al. 2021, https://arxiv.org/abs/2103.10360, sections 2.1 and 2.3.
Shapes: B batch, S tokens of this call, K key columns without the prefix.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Context(NamedTuple):
    """Where each row's context lies; columns count from the batch's left edge, padding included."""

    start: Tensor  # (B,) first column that is not left padding
    end: Tensor  # (B,) column of <sop>, the first causal token; the number of columns without one
    mask_position: Tensor  # (B,) first-channel position of every token from <sop> on

    def behind(self, num_columns: int) -> "Context":
        """Shift the context by num_columns columns inserted before it."""
        return Context(self.start + num_columns, self.end + num_columns, self.mask_position)


def find_context(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    bos_token_id: int,
    mask_token_id: int,
    gmask_token_id: int,
) -> Context:
    """Find each row's context in input_ids (B, S); attention_mask (B, S) holds 0 at padding.

    The mask token is the first [gMASK] of the context, else its first [MASK], else its last token.
    ValueError when the two have different shapes.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} for input_ids "
            f"{tuple(input_ids.shape)}; give one column for each token."
        )
    num_columns = input_ids.shape[1]
    columns = torch.arange(num_columns, device=input_ids.device)

    def first_column(found: Tensor) -> Tensor:
        return torch.where(found, columns, num_columns).amin(dim=1)  # (B,)

    start = torch.zeros_like(input_ids[:, 0])
    if attention_mask is not None:
        start = first_column(attention_mask.bool()).clamp(max=num_columns - 1)
    end = first_column(input_ids == bos_token_id)
    in_context = columns < end[:, None]  # (B, S)
    gmask = first_column((input_ids == gmask_token_id) & in_context)
    mask = first_column((input_ids == mask_token_id) & in_context)
    mask_column = torch.where(gmask < num_columns, gmask, mask)
    mask_column = torch.where(mask_column < num_columns, mask_column, end - 1)
    return Context(start, end, (mask_column - start).clamp(min=0))


def position_ids(context: Context, first_column: int | Tensor, num_columns: int) -> Tensor:
    """Return the positions (B, 2, num_columns) of the columns from first_column on.

    >>> row = Context(torch.tensor([0]), torch.tensor([3]), torch.tensor([2]))
    >>> position_ids(row, 0, 5).tolist()
    [[[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]]
    """
    columns = torch.arange(num_columns, device=context.end.device) + first_column
    in_context = columns < context.end[:, None]
    first = torch.where(
        in_context, columns - context.start[:, None], context.mask_position[:, None]
    )
    second = columns - context.end[:, None] + 1
    return torch.stack((first, second), dim=1).clamp(min=0)  # (B, 2, S)


def visible_keys(
    context_end: Tensor,
    attention_mask: Tensor | None,
    first_column: int | Tensor,
    num_queries: int,
    num_keys: int,
) -> Tensor:
    """Return who sees whom as bool (B, 1, S, K), True for visible.

    Queries are the columns from first_column on. attention_mask (B, <= K) holds 0 at padding;
    columns it does not reach are visible by the rule alone. A padding query sees itself, so that no
    softmax row is empty. ValueError when attention_mask is wider than K.
    """
    if attention_mask is not None and attention_mask.shape[1] > num_keys:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {num_keys} keys; give one "
            "column for each cached token and each token of this call."
        )
    keys = torch.arange(num_keys, device=context_end.device)
    queries = torch.arange(num_queries, device=context_end.device) + first_column
    causal = keys <= queries[:, None]  # (S, K)
    visible = causal | (keys < context_end[:, None, None])  # (B, S, K)
    if attention_mask is not None:
        real = attention_mask.bool()
        real = torch.nn.functional.pad(real, (0, num_keys - real.shape[1]), value=True)
        visible = visible & real[:, None, :] | (keys == queries[:, None])
    return visible[:, None]  # (B, 1, S, K)
