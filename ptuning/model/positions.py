"""Where tokens are: GLM's 2-D positions, its attention mask, rotary embedding, rows end to end.

A row is `context <sop> answer`. Context tokens count 0, 1, 2, ... in the first channel and stay at
0 in the second; from <sop> on the first channel stays at the mask token's position and the second
counts 1, 2, 3, ... Every token sees the whole context; from <sop> on attention is causal. Padding
is masked and has position 0.
Rotary embedding rotates the first half of each head by the first channel, the second half by the
second one. Inverse frequencies are rounded to float16, as in the published checkpoint.
Sources: GLM, Du et al. 2021, https://arxiv.org/abs/2103.10360, sections 2.1 and 2.3; RoFormer, Su
et al. 2021, https://arxiv.org/abs/2104.09864, section 3.4.2; RotaryEmbedding and
get_position_ids in
https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/modeling_chatglm.py
Shapes: B rows, S tokens of this call, C columns: cached tokens and these, H heads, D head width, T
real tokens of all rows, N tokens whose output is read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Context(NamedTuple):
    """Where each row's context is; columns include left padding."""

    start: Tensor  # (B,) first column that is not left padding
    end: Tensor  # (B,) column of <sop>, the first causal token; the number of columns without one
    mask_position: Tensor  # (B,) first-channel position of every token from <sop> on

    def shift(self, num_columns: int) -> "Context":
        """Return the context after num_columns columns were inserted in front."""
        return Context(self.start + num_columns, self.end + num_columns, self.mask_position)


def find_context(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    bos_token_id: int,
    mask_token_id: int,
    gmask_token_id: int,
) -> Context:
    """Find each row's context in input_ids (B, S); attention_mask (B, S) is 0 at padding.

    The mask token is the context's first [gMASK], else its first [MASK], else its last token.
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
    """Return who sees whom as bool (B, 1, S, C), True for visible.

    Queries are the columns from first_column on. attention_mask (B, <= C) is 0 at padding; a key
    column beyond its width is not padding. A padding query sees itself, so that no softmax is
    empty.
    """
    if attention_mask is not None and attention_mask.shape[1] > num_keys:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {num_keys} keys; give one "
            "column for each cached token and each token of this call."
        )
    keys = torch.arange(num_keys, device=context_end.device)
    queries = torch.arange(num_queries, device=context_end.device) + first_column
    causal = keys <= queries[:, None]  # (S, C)
    visible = causal | (keys < context_end[:, None, None])  # (B, S, C)
    if attention_mask is not None:
        real = attention_mask.bool()
        real = functional.pad(real, (0, num_keys - real.shape[1]), value=True)  # (B, C)
        visible = visible & real[:, None, :] | (keys == queries[:, None])
    return visible[:, None]  # (B, 1, S, C)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bool visible (..., C or K) as a mask to add to scores: 0, or dtype's lowest number.

    Row strides are padded to a multiple of 16 elements; without that alignment fused CUDA kernels
    copy the mask on every call.
    """
    num_keys = visible.shape[-1]
    # Rounding would fix the number of tokens that torch.export is asked to leave open.
    stride = num_keys if torch.compiler.is_exporting() else -(-num_keys // 16) * 16
    stored = visible.new_empty(*visible.shape[:-1], stride, dtype=dtype)
    mask = stored[..., :num_keys]
    mask.fill_(torch.finfo(dtype).min)
    return mask.masked_fill_(visible, 0.0)


def is_full_mask(attention_mask: Tensor | None) -> bool:
    """Tell a full mask, bool (B, 1, S, C), from a padding mask (B, S); refuse anything else."""
    if attention_mask is None or attention_mask.dim() == 2:
        return False
    if attention_mask.dim() != 4 or attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} of {attention_mask.dtype}; give "
            "(B, S) with 0 at padding, or bool (B, 1, S, cached + S) with True for visible."
        )
    return True


def mask_of_call(attention_mask: Tensor | None, num_columns: int) -> Tensor | None:
    """Return a padding mask's columns (B, S) of this call's tokens, without the cached ones."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -num_columns:]


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each of a head's entries, float32 (B, S, D)."""

    cos: Tensor
    sin: Tensor  # negated in the first quarter of each half, see `swap_quarters`


def inverse_frequencies(head_dim: int) -> Tensor:
    """Return the D/4 inverse frequencies of one half, float32 values rounded to float16.

    >>> inverse_frequencies(16).tolist()
    [1.0, 0.0999755859375, 0.01000213623046875, 0.0010004043579101562]
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32) / half
    return (1.0 / 10000.0**exponents).half().float()


def rotation_at(positions: Tensor, frequencies: Tensor) -> Rotation:
    """Return the rotation of tokens at positions (B, 2, S)."""
    angles = positions.transpose(1, 2).unsqueeze(-1).float() * frequencies  # (B, S, 2, D/4)
    cos, sin = angles.cos(), angles.sin()
    both = torch.stack((cos, cos), dim=-2), torch.stack((-sin, sin), dim=-2)  # (B, S, 2, 2, D/4)
    return Rotation(*(entries.flatten(-3) for entries in both))  # (B, S, D)


def swap_quarters(x: Tensor) -> Tensor:
    """Swap the two quarters of each half of x (..., D): an entry's partner takes its place.

    >>> swap_quarters(torch.arange(8)).tolist()
    [2, 3, 0, 1, 6, 7, 4, 5]
    """
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (..., 2, D/4) each
    return torch.stack((second, first), dim=-2).flatten(-3)  # (..., D)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries and keys of heads (B, S, H, 3, D), in float32; values stay as they are.

    On CUDA with Triton this is one kernel (`rotary_triton`); a compiler fuses it.
    """
    rotated: Tensor = _Rotate.apply(heads, rotation.cos, rotation.sin)
    return rotated


class _Rotate(torch.autograd.Function):
    """The backward pass is the inverse rotation, so only the angles are saved."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, sign=1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_outputs[0], cos, sin, sign=-1.0), None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, *, sign: float) -> Tensor:
    if not torch.compiler.is_compiling() and heads.device.type == "cuda":
        from ptuning.model import rotary_triton

        if rotary_triton.can_rotate(heads.device, heads.dtype):
            by_kernel: Tensor = torch.ops.ptuning.rotate(heads, cos, sin, sign)
            return by_kernel
    exact = heads[..., :2, :].float()  # (B, S, H, 2, D)
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]  # (B, S, 1, 1, D)
    rotated = torch.mul(exact, cos).addcmul_(swap_quarters(exact), sin, value=sign)
    return torch.cat((rotated.to(heads.dtype), heads[..., 2:, :]), dim=-2)  # (B, S, H, 3, D)


class FlatLayout(NamedTuple):
    """Which cells of the (B, S) grid hold real tokens, so that rows can be laid end to end.

    Linear layers and norms, nearly all of the work, then skip padding. On a GPU attention keeps the
    grid, where padding costs little; on a CPU it is `ptuning.model.cpu.varlen_attention`. After the
    last layer's attention only needed tokens remain.
    """

    shape: tuple[int, int]  # (B, S)
    tokens: Tensor  # (T,) cells of the flattened grid, in row order
    needed: Tensor | None  # (N,) indices into `tokens` of those whose output is read; None for all


def find_layout(attention_mask: Tensor, needed: Tensor | None) -> FlatLayout:
    """Return the layout of attention_mask (B, S), 0 at padding; needed (B, S) is bool.

    On a GPU this synchronises. A caller that knows the row lengths builds the indices itself:
    `ptuning.data.tokenization.pad_right`, `prompt_layout`.

    >>> find_layout(torch.tensor([[1, 1, 0], [1, 1, 1]]), None).tokens.tolist()
    [0, 1, 3, 4, 5]
    """
    real = attention_mask.bool()
    tokens = real.flatten().nonzero().squeeze(1)  # (T,)
    if needed is not None:
        needed = needed.flatten()[tokens].nonzero().squeeze(1)  # (N,)
    return FlatLayout((real.shape[0], real.shape[1]), tokens, needed)


def padding_layout(input_ids: Tensor, attention_mask: Tensor | None) -> FlatLayout | None:
    """Return the layout that skips padding; None without padding or while a graph is traced."""
    if attention_mask is None or attention_mask.shape != input_ids.shape:
        return None
    if torch.compiler.is_compiling():  # a shape that depends on the mask's values breaks a graph
        return None
    return None if bool(attention_mask.all()) else find_layout(attention_mask, None)


def prompt_layout(lengths: Sequence[int], device: torch.device) -> FlatLayout:
    """Return the layout of right-padded prompts of which only the last token is needed.

    >>> prompt_layout([2, 3], torch.device("cpu"))[1:]
    (tensor([0, 1, 3, 4, 5]), tensor([1, 4]))
    """
    longest = max(lengths)
    tokens = [row * longest + column for row, n in enumerate(lengths) for column in range(n)]
    ends = torch.tensor(lengths).cumsum(0) - 1
    return FlatLayout((len(lengths), longest), torch.tensor(tokens, device=device), ends.to(device))


def flatten_rows(grid: Tensor, layout: FlatLayout, *, only_needed: bool = False) -> Tensor:
    """Return the real tokens of grid (B, S, E) end to end: (1, T, E), or the needed (1, N, E)."""
    cells = layout.tokens
    if only_needed and layout.needed is not None:
        cells = cells[layout.needed]
    return grid.flatten(0, 1).index_select(0, cells).unsqueeze(0)  # (1, T or N, E)


def flatten_positions(positions: Tensor, layout: FlatLayout) -> Tensor:
    """Return positions (B or 1, 2, S) of the real tokens, end to end: (1, 2, T)."""
    grid = positions.expand(layout.shape[0], -1, -1).transpose(1, 2)  # (B, S, 2)
    return flatten_rows(grid, layout).transpose(1, 2)  # (1, 2, T)


def unflatten_rows(flat: Tensor, layout: FlatLayout) -> Tensor:
    """Put flat tokens (1, T, ...) back into their cells, zeros elsewhere: (B, S, ...)."""
    num_rows, length = layout.shape
    grid = flat.new_zeros(num_rows * length, *flat.shape[2:])
    # index_copy_ would save the flat tokens for its backward pass, which reads only their shape.
    grid.index_put_((layout.tokens,), flat.squeeze(0))  # from (T, ...)
    return grid.unflatten(0, (num_rows, length))  # (B, S, ...)


def keep_needed(flat: Tensor, layout: FlatLayout) -> Tensor:
    """Keep the needed ones of flat (1, T, E) tokens: (1, N, E)."""
    return flat if layout.needed is None else flat.index_select(1, layout.needed)
