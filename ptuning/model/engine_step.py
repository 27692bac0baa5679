"""One decoding step of the engine: one new token in each row, every row with its own prefixes.

Rows that see the same prefix are one product with its keys, which are held once. A row's scores,
its prefixes' in the first W columns and its own after them, meet in one softmax in float32.
Shapes: R rows decoding, G rows of one prefix, C columns of the longest row, W columns of the widest
prefixes, P prefix, H heads, D head width, E = H x D.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ptuning.model.backbone import ChatGLMModel
from ptuning.model.engine_row import Row
from ptuning.model.engine_slots import Slots
from ptuning.model.layer import SKIP_SCALE, Layer
from ptuning.model.rotary import Rotation, rotate, rotation_at
from ptuning.model.shared_prefix import (
    LayerPrefix,
    PrefixGroup,
    count_columns,
    group_by_prefix,
    rows_of,
)


class Step(NamedTuple):
    """What every layer needs to know of the R rows."""

    places: Tensor  # (R,) 0, 1, 2, ...
    columns: Tensor  # (R,) column that each row's new key goes to
    rotation: Rotation
    mask: Tensor  # (R, 1, C), 0 for the row's own columns, else very low
    groups: list[PrefixGroup]
    prefix_columns: int  # W


def decode_step(transformer: ChatGLMModel, rows: Sequence[Row], slots: Slots) -> Tensor:
    """Return the final states (R, E) of the newest tokens; row i's keys go to slot i."""
    device = transformer.final_layernorm.weight.device
    tokens = torch.tensor([row.answer[-1] for row in rows], device=device)
    hidden = transformer.word_embeddings(tokens)  # (R, E)
    step = _plan_step(transformer, rows, device)
    for index, module in enumerate(transformer.layers):
        layer = cast(Layer, module)
        prefixes = [group.prefix.layers[index] for group in step.groups]
        normalised = layer.input_layernorm(hidden)
        output = _attend(layer, slots.keys[index], slots.values[index], prefixes, normalised, step)
        attended = layer.attention.dense(output)
        normalised = layer.post_attention_layernorm(SKIP_SCALE * normalised + attended)
        hidden = SKIP_SCALE * normalised + layer.mlp(normalised)
    return cast(Tensor, transformer.final_layernorm(hidden))


def _plan_step(transformer: ChatGLMModel, rows: Sequence[Row], device: torch.device) -> Step:
    lengths = [row.length for row in rows]
    columns = torch.tensor(lengths, device=device)
    positions = torch.tensor(
        [[row.first_position, row.length - row.context_end + 1] for row in rows], device=device
    ).unsqueeze(-1)  # (R, 2, 1)
    num_columns = max(lengths) + 1
    beyond = torch.arange(num_columns, device=device) > columns[:, None]  # (R, C)
    mask = torch.zeros(beyond.shape, device=device)
    mask.masked_fill_(beyond, torch.finfo(torch.float32).min)
    rotation = rotation_at(positions, transformer.inverse_frequencies)
    groups = group_by_prefix([row.request.shares for row in rows], device)
    places = torch.arange(len(rows), device=device)
    return Step(places, columns, rotation, mask.unsqueeze(1), groups, count_columns(groups))


def _attend(
    layer: Layer,
    keys: Tensor,
    values: Tensor,
    prefixes: Sequence[LayerPrefix],
    normalised: Tensor,
    step: Step,
) -> Tensor:
    """Return the attention output (R, E) of one new token in each row."""
    num_rows, num_columns = len(step.columns), step.mask.shape[-1]
    fused = layer.attention.query_key_value(normalised)
    fused = fused.unflatten(-1, (layer.attention.num_heads, 3, -1))  # (R, H, 3, D)
    # Query and key lie where rotate expects two tokens, and turn alike: one call for both.
    query, key = rotate(fused[:, :, :2], step.rotation).unbind(2)  # (R, H, D) each
    value = fused[:, :, 2]
    keys[step.places, :, step.columns] = key
    values[step.places, :, step.columns] = value
    own_keys = keys[:num_rows, :, :num_columns].float()  # (R, H, C, D)
    query = query.float() * query.shape[-1] ** -0.5
    scores = (query.unsqueeze(2) @ own_keys.transpose(-1, -2)).squeeze(2) + step.mask  # (R, H, C)
    if prefixes:
        scores = _with_prefix_scores(scores, query, prefixes, step)
    weights = scores.softmax(dim=-1).to(value.dtype)  # (R, H, W + C)
    own = weights[..., step.prefix_columns :].unsqueeze(2) @ values[:num_rows, :, :num_columns]
    output = own.squeeze(2)  # (R, H, D)
    for group, prefix in zip(step.groups, prefixes, strict=True):
        drawn = rows_of(group, weights[..., group.columns]).transpose(0, 1)  # (H, G, P)
        shared = (drawn @ prefix.values).transpose(0, 1)  # (G, H, D)
        if group.rows is None:
            output = output + shared
        else:
            output.index_add_(0, group.rows, shared)
    return output.flatten(1)  # (R, E)


def _with_prefix_scores(
    scores: Tensor, query: Tensor, prefixes: Sequence[LayerPrefix], step: Step
) -> Tensor:
    """Return (R, H, W + C): the prefixes' scores, very low where a row has none, then its own."""
    width = step.prefix_columns
    shape = (*scores.shape[:2], width + scores.shape[2])
    joined = scores.new_full(shape, torch.finfo(scores.dtype).min)
    joined[..., width:] = scores
    for group, prefix in zip(step.groups, prefixes, strict=True):
        by_head = rows_of(group, query).transpose(0, 1)  # (H, G, D)
        found = (by_head @ prefix.keys.float().transpose(-1, -2)).transpose(0, 1)  # (G, H, P)
        if group.log_weights is not None:
            found = found + group.log_weights
        if group.rows is None:
            joined[..., group.columns] = found
        else:
            joined[group.rows, :, group.columns] = found
    return joined
