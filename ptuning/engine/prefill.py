"""Reading prompts for the decoding engine: one pass over flat rows, each with its own prefixes.

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

from ptuning.engine.prefixes import PrefixRows
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


class ReadPrompts(NamedTuple):
    """What reading left: the cache, where the contexts end, the last states (B, E).

    The cache holds (B, H, S, D), or with spans (1, H, T, D): each row's tokens of the T.
    """

    cache: DynamicCache
    spans: tuple[slice, ...] | None
    context: Context
    last_states: Tensor


def read_prompts(
    transformer: ChatGLMModel, prompts: Sequence[Sequence[int]], prefixes: PrefixRows | None
) -> ReadPrompts:
    """Read prompts, each of which sees its own prefixes."""
    device = transformer.final_layernorm.weight.device
    width = max(len(prompt) for prompt in prompts)
    pad_id = cast(int, transformer.config.pad_token_id)
    padded = [[*prompt, *[pad_id] * (width - len(prompt))] for prompt in prompts]
    input_ids = torch.tensor(padded, device=device)  # (B, S)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    columns = torch.arange(width, device=device)
    real = (columns < lengths[:, None]).long()  # (B, S)
    context = transformer.find_context(input_ids, real)
    layout = prompt_layout([len(prompt) for prompt in prompts], device)
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
        mask = _mask_of(visible, prefixes, dtype)
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
    return ReadPrompts(cache, None if rows is None else rows.spans, context, last_states)


def _mask_of(visible: Tensor, prefixes: PrefixRows | None, dtype: torch.dtype) -> Tensor:
    """Return the mask (B, 1, S, K) of visible (B, 1, S, S) with the prefixes' columns before it."""
    if prefixes is None:
        return additive_mask(visible, dtype)
    before = visible.new_zeros(*visible.shape[:-1], prefixes.width)
    mask = additive_mask(torch.cat((before, visible), dim=3), dtype)
    mask[..., : prefixes.width] = _prefix_mask(prefixes, dtype).unsqueeze(2)
    return mask


def _prefix_mask(prefixes: PrefixRows, dtype: torch.dtype) -> Tensor:
    """Return (B, 1, W): the rows' log-weights, the lowest number of dtype where none is seen."""
    return prefixes.mask.clamp(min=torch.finfo(dtype).min).to(dtype)
