"""Reading prompts for the decoding engine: one packed pass over rows, each with its own prefixes.

The layers are those of `ChatGLMModel`; what differs from its forward pass is that rows have
prefixes of their own, with weights that stand in the mask.
Shapes: B rows, S tokens of the longest, W columns of the widest prefixes, K = W + S keys, P prefix,
H heads, D head width, E hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ptuning.model.attention import LayerInputs, additive_mask
from ptuning.model.backbone import ChatGLMModel
from ptuning.model.packing import find_packing, pack, unpack_needed
from ptuning.model.positions import Context, position_ids, visible_keys
from ptuning.model.rotary import rotation_at
from ptuning.model.shared_prefix import PrefixGroup, Shares, count_columns, group_by_prefix


class ReadPrompts(NamedTuple):
    """What reading left: the cache (B, H, S, D), where the contexts end, the last states (B, E)."""

    cache: DynamicCache
    context: Context
    last_states: Tensor


def read_prompts(
    transformer: ChatGLMModel, prompts: Sequence[Sequence[int]], shares: Sequence[Shares]
) -> ReadPrompts:
    """Read prompts, each of which sees its own shares."""
    device = transformer.final_layernorm.weight.device
    width = max(len(prompt) for prompt in prompts)
    pad_id = cast(int, transformer.config.pad_token_id)
    padded = [[*prompt, *[pad_id] * (width - len(prompt))] for prompt in prompts]
    input_ids = torch.tensor(padded, device=device)  # (B, S)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    columns = torch.arange(width, device=device)
    real = (columns < lengths[:, None]).long()  # (B, S)
    context = transformer.find_context(input_ids, real)
    packing = find_packing(real, columns == lengths[:, None] - 1)
    groups = group_by_prefix(shares, device)
    rotation = rotation_at(position_ids(context, 0, width), transformer.inverse_frequencies)
    dtype = transformer.final_layernorm.weight.dtype
    inputs = LayerInputs(rotation, _mask_of(context, real, groups, dtype), 0.0, packing)
    cache = DynamicCache()
    states = pack(transformer.word_embeddings(input_ids), packing)  # (1, T, E)
    for index, layer in enumerate(transformer.layers):
        states, _ = layer(
            states,
            inputs,
            _prefixes_of_rows(groups, index, len(prompts)),
            past_key_values=cache,
            only_needed=index == len(transformer.layers) - 1,
        )
    states = unpack_needed(transformer.final_layernorm(states), packing)  # (B, S, E)
    last = states[torch.arange(len(prompts), device=device), lengths - 1]  # (B, E)
    return ReadPrompts(cache, context, last)


def _mask_of(
    context: Context, real: Tensor, groups: Sequence[PrefixGroup], dtype: torch.dtype
) -> Tensor:
    """Return the mask (B, 1, S, K): in the prefixes' columns stand the rows' log-weights."""
    num_rows, width = real.shape
    visible = visible_keys(context.end, real, 0, width, width)  # (B, 1, S, S)
    before = visible.new_zeros(num_rows, 1, width, count_columns(groups))
    for group in groups:
        rows = slice(None) if group.rows is None else group.rows
        before[rows, :, :, group.columns] = True
    mask = additive_mask(torch.cat((before, visible), dim=3), dtype)
    for group in groups:
        if group.log_weights is not None:
            rows = slice(None) if group.rows is None else group.rows
            mask[rows, :, :, group.columns] = group.log_weights.unsqueeze(1).to(dtype)
    return mask


def _prefixes_of_rows(groups: Sequence[PrefixGroup], layer: int, num_rows: int) -> Tensor | None:
    """Return one layer's prefixes, (2, B, H, W, D) for as long as the layer is computed.

    Rows that all see one prefix share it, (2, 1, H, P, D); None when nobody has any.
    """
    if not groups:
        return None
    first = groups[0].prefix.key_values[layer]
    if len(groups) == 1 and groups[0].rows is None:
        return first
    heads, head_dim = first.shape[2], first.shape[4]
    joined = first.new_zeros(2, num_rows, heads, count_columns(groups), head_dim)
    for group in groups:
        rows = slice(None) if group.rows is None else group.rows
        joined[:, rows, :, group.columns] = group.prefix.key_values[layer]
    return joined
