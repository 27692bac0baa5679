"""Reading prompts for the decoding engine: one packed pass over rows that see the same prefixes.

The layers are those of `ChatGLMModel`; what differs from its forward pass is that prefixes have
weights, which stand in the mask.
Shapes: B rows, S tokens of the longest, K = P + S keys, P prefix, H heads, D head width, E hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from ptuning.model.attention import LayerInputs, additive_mask
from ptuning.model.backbone import ChatGLMModel
from ptuning.model.packing import Packing, find_packing, pack, unpack_needed
from ptuning.model.positions import Context, position_ids, visible_keys
from ptuning.model.rotary import rotation_at
from ptuning.model.shared_prefix import Shares


class ReadPrompts(NamedTuple):
    """What reading left: the cache (B, H, S, D), where the contexts end, the last states (B, E)."""

    cache: DynamicCache
    context: Context
    last_states: Tensor


def read_prompts(
    transformer: ChatGLMModel, prompts: Sequence[Sequence[int]], shares: Shares
) -> ReadPrompts:
    """Read prompts that all see the same prefixes."""
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
    inputs = _layer_inputs(transformer, context, real, shares, packing)
    prefix = _join_shares(shares)
    cache = DynamicCache()
    states = pack(transformer.word_embeddings(input_ids), packing)  # (1, T, E)
    for index, layer in enumerate(transformer.layers):
        states, _ = layer(
            states,
            inputs,
            None if prefix is None else prefix[index],
            past_key_values=cache,
            only_needed=index == len(transformer.layers) - 1,
        )
    states = unpack_needed(transformer.final_layernorm(states), packing)  # (B, S, E)
    last = states[torch.arange(len(prompts), device=device), lengths - 1]  # (B, E)
    return ReadPrompts(cache, context, last)


def _layer_inputs(
    transformer: ChatGLMModel, context: Context, real: Tensor, shares: Shares, packing: Packing
) -> LayerInputs:
    """Return positions and mask; a prefix's log-weight stands in its columns of the mask."""
    width = real.shape[1]
    visible = visible_keys(context.end, real, 0, width, width)  # (B, 1, S, S)
    visible = functional.pad(visible, (sum(share.prefix.length for share in shares), 0), value=True)
    mask = additive_mask(visible, transformer.final_layernorm.weight.dtype)  # (B, 1, S, K)
    start = 0
    for share in shares:
        end = start + share.prefix.length
        if share.log_weight != 0.0:
            mask[..., start:end] = share.log_weight
        start = end
    rotation = rotation_at(position_ids(context, 0, width), transformer.inverse_frequencies)
    return LayerInputs(rotation, mask, 0.0, packing)


def _join_shares(shares: Shares) -> Sequence[Tensor] | None:
    """Return every layer's prefixes side by side, (2, 1, H, P, D) each; None for the base."""
    if not shares:
        return None
    if len(shares) == 1:
        return shares[0].prefix.key_values
    layers = zip(*(share.prefix.key_values for share in shares), strict=True)
    return [torch.cat(layer, dim=3) for layer in layers]
