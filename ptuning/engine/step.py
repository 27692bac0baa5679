"""One decoding step: one new token in each row, every row with its own prefixes.

A row's scores, for its prefixes in the first W columns and for its own tokens after them, go
through one softmax in float32.
Shapes: R rows decoding, B rows including idle ones, C columns of the longest row, rounded up,
W columns of the widest prefixes, H heads, D head width, E = H x D.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ptuning.engine.prefixes import BatchPrefixes, float_product
from ptuning.engine.request import Row
from ptuning.engine.slots import Slots, round_up
from ptuning.model.chatglm import SKIP_SCALE, ChatGLMModel, Layer
from ptuning.model.positions import Rotation, rotate, rotation_at


class StepInputs(NamedTuple):
    """What every layer needs to know of the R rows."""

    slots: Tensor  # (R,) 0, 1, 2, ...
    columns: Tensor  # (R,) column that each row's new key goes to
    rotation: Rotation
    mask: Tensor  # (R, 1, W + C), added to the scores
    prefixes: BatchPrefixes | None


def decode_step(
    transformer: ChatGLMModel, rows: Sequence[Row], slots: Slots, prefixes: BatchPrefixes | None
) -> Tensor:
    """Return the final states (R, E) of the newest tokens; row i's keys go to slot i."""
    device = transformer.final_layernorm.weight.device
    numbers = step_numbers(rows, len(rows), device).to(device, non_blocking=True)
    num_columns = round_up(max(row.length for row in rows) + 1)
    return run_step(transformer, numbers, slots, num_columns, prefixes)


def step_numbers(rows: Sequence[Row], num_rows: int, device: torch.device) -> Tensor:
    """Return (4, B) on the CPU: each row's newest token, its column and its two positions.

    The B - R idle rows have token 0 in column 0. For CUDA the tensor is pinned: a non_blocking copy
    does not synchronise, and PyTorch does not reuse the memory before the copy has finished.
    """
    numbers = [
        (row.answer[-1], row.length, row.first_position, row.length - row.context_end + 1)
        for row in rows
    ]
    numbers += [(0, 0, 0, 0)] * (num_rows - len(rows))
    return torch.tensor(list(zip(*numbers, strict=True)), pin_memory=device.type == "cuda")


def run_step(
    transformer: ChatGLMModel,
    numbers: Tensor,
    slots: Slots,
    num_columns: int,
    prefixes: BatchPrefixes | None,
) -> Tensor:
    """Return the final states (R, E) for numbers (4, R) on the device, without synchronising.

    Repeating a step is harmless: it writes the same keys and values to the same columns.
    """
    device, columns = numbers.device, numbers[1]
    positions = numbers[2:].t().unsqueeze(-1)  # (R, 2, 1)
    beyond = torch.arange(num_columns, device=device) > columns[:, None]  # (R, C)
    mask = torch.zeros(beyond.shape, device=device)
    mask = mask.masked_fill_(beyond, torch.finfo(torch.float32).min).unsqueeze(1)  # (R, 1, C)
    if prefixes is not None:
        mask = torch.cat((prefixes.mask, mask), dim=-1)  # (R, 1, W + C)
    rotation = rotation_at(positions, transformer.inverse_frequencies)
    indices = torch.arange(len(columns), device=device)
    inputs = StepInputs(indices, columns, rotation, mask, prefixes)
    hidden = transformer.word_embeddings(numbers[0])  # (R, E)
    for index, module in enumerate(transformer.layers):
        layer = cast(Layer, module)
        normalised = layer.input_layernorm(hidden)
        attended = layer.attention.dense(_attend(layer, index, slots, normalised, inputs))
        hidden = torch.add(attended, normalised, alpha=SKIP_SCALE)
        normalised = layer.post_attention_layernorm(hidden)
        hidden = torch.add(layer.mlp(normalised), normalised, alpha=SKIP_SCALE)
    return cast(Tensor, transformer.final_layernorm(hidden))


def _attend(
    layer: Layer, index: int, slots: Slots, normalised: Tensor, inputs: StepInputs
) -> Tensor:
    """Return the attention output (R, E) of one new token in each row."""
    fused = layer.attention.query_key_value(normalised)  # (R, 3 * E)
    heads = fused.unflatten(-1, (layer.attention.num_heads, 3, -1)).unsqueeze(1)  # (R, 1, H, 3, D)
    query, key, value = rotate(heads, inputs.rotation)[:, 0].unbind(2)  # (R, H, D) each
    keys, values = slots.keys[index], slots.values[index]
    keys[inputs.slots, :, inputs.columns] = key
    values[inputs.slots, :, inputs.columns] = value
    prefixes, num_rows = inputs.prefixes, len(query)
    width = 0 if prefixes is None else prefixes.width
    num_columns = inputs.mask.shape[-1] - width
    own_keys = keys[:num_rows, :, :num_columns].transpose(-1, -2)  # (R, H, D, C)
    scores = float_product(query.unsqueeze(2), own_keys).squeeze(2)  # (R, H, C)
    if prefixes is not None:
        scores = torch.cat((prefixes.scores(index, query), scores), dim=-1)  # (R, H, W + C)
    scores = torch.add(inputs.mask, scores, alpha=query.shape[-1] ** -0.5)
    weights = scores.softmax(dim=-1).to(query.dtype)
    own = weights[..., width:].unsqueeze(2) @ values[:num_rows, :, :num_columns]  # (R, H, 1, D)
    output = own.squeeze(2)  # (R, H, D)
    if prefixes is not None:
        output = prefixes.add_values(index, weights[..., :width], output)
    return output.flatten(1)  # (R, E)
