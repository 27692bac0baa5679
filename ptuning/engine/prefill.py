"""Prefill: one pass over new prompts, each with its own prefixes; only GPU attention pads them.

The layers are those of `ChatGLMModel`; unlike in its forward pass, rows have different prefixes,
whose weights are in the mask.
Shapes: B rows, S tokens of the longest, T tokens of all, W columns of the widest prefixes, H heads,
K = W + S keys, D head width, E hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ptuning.engine.prefixes import BatchPrefixes
from ptuning.model.attention import LayerInputs
from ptuning.model.chatglm import ChatGLMModel
from ptuning.model.cpu.varlen_attention import find_rows
from ptuning.model.positions import (
    Context,
    additive_mask,
    flatten_positions,
    flatten_rows,
    position_ids,
    prompt_layout,
    rotation_at,
    visible_keys,
)


class Prefilled(NamedTuple):
    """What a prefill returns; the cache holds (B, H, S, D), or with spans (1, H, T, D)."""

    cache: DynamicCache
    spans: tuple[slice, ...] | None  # each row's tokens of the T
    context: Context
    last_states: Tensor  # (B, E)


def prefill(
    transformer: ChatGLMModel, prompts: Sequence[Sequence[int]], prefixes: BatchPrefixes | None
) -> Prefilled:
    """Return keys, values and the last states of prompts."""
    device = transformer.final_layernorm.weight.device
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    pad_id = cast(int, transformer.config.pad_token_id)
    padded = [[*prompt, *[pad_id] * (width - len(prompt))] for prompt in prompts]
    input_ids = torch.tensor(padded, device=device)  # (B, S)
    columns = torch.arange(width, device=device)
    real = (columns < torch.tensor(lengths, device=device)[:, None]).long()  # (B, S)
    context = transformer.find_context(input_ids, real)
    layout = prompt_layout(lengths, device)
    positions = position_ids(context, 0, width)  # (B, 2, S)
    dtype = transformer.final_layernorm.weight.dtype
    visible = visible_keys(context.end, real, 0, width, width)  # (B, 1, S, S)
    rows = mask = None
    if transformer.uses_varlen():
        rotation = rotation_at(positions, transformer.inverse_frequencies)
        rows = find_rows(
            layout,
            additive_mask(visible, dtype),
            rotation,
            num_heads=transformer.config.num_attention_heads,
            prefix_length=0 if prefixes is None else prefixes.width,
        )
        if prefixes is not None:
            rows = rows._replace(prefix_mask=_prefix_mask(prefixes, dtype))
    else:
        positions = flatten_positions(positions, layout)  # (1, 2, T)
        rotation = rotation_at(positions, transformer.inverse_frequencies)
        mask = _mask(visible, prefixes, dtype)
    inputs = LayerInputs(rotation, mask, 0.0, layout, rows)
    cache = DynamicCache()
    states = flatten_rows(transformer.word_embeddings(input_ids), layout)  # (1, T, E)
    for index, layer in enumerate(transformer.layers):
        states, _ = layer(
            states,
            inputs,
            None if prefixes is None else prefixes.key_values(index),
            past_key_values=cache,
            only_needed=index == len(transformer.layers) - 1,
        )
    last_states = transformer.final_layernorm(states)[0]  # (B, E)
    return Prefilled(cache, None if rows is None else rows.spans, context, last_states)


def _mask(visible: Tensor, prefixes: BatchPrefixes | None, dtype: torch.dtype) -> Tensor:
    """Return the mask (B, 1, S, K): the prefixes' columns, then those of visible (B, 1, S, S)."""
    if prefixes is None:
        return additive_mask(visible, dtype)
    before = visible.new_zeros(*visible.shape[:-1], prefixes.width)
    mask = additive_mask(torch.cat((before, visible), dim=3), dtype)  # (B, 1, S, K)
    mask[..., : prefixes.width] = _prefix_mask(prefixes, dtype).unsqueeze(2)  # (B, 1, 1, W)
    return mask


def _prefix_mask(prefixes: BatchPrefixes, dtype: torch.dtype) -> Tensor:
    """Return (B, 1, W): log-weights, and the lowest number of dtype where there is no key."""
    return prefixes.mask.clamp(min=torch.finfo(dtype).min).to(dtype)
