"""Greedy decoding of many prompts at once: finished rows leave the batch, waiting rows join.

Keys and values live in slots allocated once. The prefix is held once for all rows: its scores are
one product of all rows' queries with the shared keys, joined with the row's own scores before the
softmax. Nothing is padded: prompts are packed, and a slot holds real tokens from column 0 on.
Shapes: R rows decoding now, C columns of the longest, P prefix, H heads, D head width, E = H x D.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.layer import SKIP_SCALE, Layer
from ptuning.model.rotary import Rotation, rotate, rotation_at

JOIN_SHARE = 4  # waiting rows join when a quarter of the slots is free: prompts are read together


class Step(NamedTuple):
    """What one decoding step needs to know of its R rows."""

    columns: Tensor  # (R,) column that each row's new key goes to
    rotation: Rotation
    mask: Tensor  # (R, 1, C), 0 for the row's own columns, else very low


class SharedPrefix(NamedTuple):
    """One layer's prefix, held once for all rows; each (H, P, D)."""

    keys: Tensor
    values: Tensor


class Slots:
    """Keys and values of every layer, (slots, H, capacity, D) each; capacity grows when needed."""

    def __init__(
        self, model: ChatGLMForConditionalGeneration, num_slots: int, capacity: int
    ) -> None:
        config = model.config
        shape = (num_slots, config.num_attention_heads, capacity, config.head_dim)
        like = model.transformer.final_layernorm.weight
        self.keys = [like.new_zeros(shape) for _ in range(config.num_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_layers)]

    def fill(self, slots: Sequence[int], cache: DynamicCache, lengths: Sequence[int]) -> None:
        """Copy prompts' keys and values from transformers' cache (B, H, S, D) into slots."""
        longest = max(lengths)
        layers: Any = cache.layers  # typed as any kind of cache layer; these hold keys and values
        for layer_index, layer in enumerate(layers):
            self.keys[layer_index][slots, :, :longest] = layer.keys
            self.values[layer_index][slots, :, :longest] = layer.values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot to another."""
        for stored in (*self.keys, *self.values):
            stored[target, :, :length] = stored[source, :, :length]


class Row:
    """One prompt on its way: its answer so far and where its next token stands."""

    def __init__(self, index: int, prompt: Sequence[int]) -> None:
        self.index = index
        self.prompt = list(prompt)
        self.answer: list[int] = []
        self.first_position = 0  # first-channel position of every answer token
        self.context_end = 0  # column of <sop>

    @property
    def length(self) -> int:
        """Columns in use: the prompt and the answer, whose newest token has no key yet."""
        return len(self.prompt) + len(self.answer) - 1


class GreedyEngine:
    """Answers a queue of prompts with at most `max_rows` of them in the batch."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        prompts: Sequence[Sequence[int]],
        *,
        max_rows: int,
        max_new_tokens: int,
        use_prefix: bool = True,
    ) -> None:
        """Take prompts of token ids, each ending in [gMASK] <sop>."""
        self.model = model
        self.max_rows = max(1, min(max_rows, len(prompts)))
        self.max_new_tokens = max_new_tokens
        self.waiting = deque(Row(index, prompt) for index, prompt in enumerate(prompts))
        self.rows: list[Row] = []  # row i decodes in slot i
        longest = max((len(prompt) for prompt in prompts), default=0)
        self.slots = Slots(model, self.max_rows, longest + max_new_tokens)
        prefix = model.transformer.prefix_for(use_prefix)
        self.prefix_tensors = prefix
        self.prefix = [SharedPrefix(kv[0, 0], kv[1, 0]) for kv in prefix] if prefix else None

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Yield (prompt index, answer tokens without <eop>) as rows finish."""
        while self.rows or self.waiting:
            free = self.max_rows - len(self.rows)
            if self.waiting and (not self.rows or free * JOIN_SHARE >= self.max_rows):
                self._join([self.waiting.popleft() for _ in range(min(free, len(self.waiting)))])
            else:
                self._step()
            yield from self._leave()

    def _join(self, rows: list[Row]) -> None:
        """Read the prompts of new rows in one packed pass and choose their first tokens."""
        width = max(len(row.prompt) for row in rows)
        pad_id = cast(int, self.model.config.pad_token_id)
        padded = [row.prompt + [pad_id] * (width - len(row.prompt)) for row in rows]
        input_ids = torch.tensor(padded, device=self.model.device)  # (rows, S)
        lengths = torch.tensor([len(row.prompt) for row in rows], device=input_ids.device)
        columns = torch.arange(width, device=input_ids.device)
        mask = (columns < lengths[:, None]).long()
        context = self.model.transformer.find_context(input_ids, mask)
        cache = DynamicCache()
        states = self.model.transformer(
            input_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            prefix_key_values=self.prefix_tensors,
            use_prefix=self.prefix_tensors is not None,
            needed=columns == lengths[:, None] - 1,
        ).last_hidden_state  # (rows, S, E)
        slots = list(range(len(self.rows), len(self.rows) + len(rows)))
        self.slots.fill(slots, cache, [len(row.prompt) for row in rows])
        last = states[torch.arange(len(rows), device=states.device), lengths - 1]  # (rows, E)
        for row, end, position in zip(
            rows, context.end.tolist(), context.mask_position.tolist(), strict=True
        ):
            row.context_end, row.first_position = end, position
        self.rows += rows
        self._choose(rows, last)

    def _step(self) -> None:
        """Advance every row by one token."""
        device = self.model.device
        tokens = torch.tensor([row.answer[-1] for row in self.rows], device=device)
        columns = torch.tensor([row.length for row in self.rows], device=device)
        positions = torch.tensor(
            [[row.first_position, row.length - row.context_end + 1] for row in self.rows],
            device=device,
        ).unsqueeze(-1)  # (R, 2, 1)
        num_columns = max(row.length for row in self.rows) + 1
        hidden = self.model.transformer.word_embeddings(tokens)  # (R, E)
        beyond = torch.arange(num_columns, device=device) > columns[:, None]  # (R, C)
        mask = torch.zeros(beyond.shape, device=device)
        mask.masked_fill_(beyond, torch.finfo(torch.float32).min)
        rotation = rotation_at(positions, self.model.transformer.inverse_frequencies)
        step = Step(columns, rotation, mask.unsqueeze(1))
        for index, layer in enumerate(self.model.transformer.layers):
            hidden = self._layer(cast(Layer, layer), index, hidden, step)
        self._choose(self.rows, self.model.transformer.final_layernorm(hidden))

    def _layer(self, layer: Layer, index: int, hidden: Tensor, step: Step) -> Tensor:
        normalised = layer.input_layernorm(hidden)
        attended = layer.attention.dense(self._attend(layer, index, normalised, step))
        normalised = layer.post_attention_layernorm(SKIP_SCALE * normalised + attended)
        return SKIP_SCALE * normalised + layer.mlp(normalised)

    def _attend(self, layer: Layer, index: int, normalised: Tensor, step: Step) -> Tensor:
        """Return the attention output (R, E) of one new token in each row."""
        num_rows, num_columns = len(step.columns), step.mask.shape[-1]
        fused = layer.attention.query_key_value(normalised)
        fused = fused.unflatten(-1, (layer.attention.num_heads, -1)).unsqueeze(2)  # (R, H, 1, 3D)
        query, key, value = fused.chunk(3, dim=-1)
        query, key = rotate(query, step.rotation), rotate(key, step.rotation)
        keys, values = self.slots.keys[index], self.slots.values[index]
        rows = torch.arange(num_rows, device=keys.device)
        keys[rows, :, step.columns] = key[:, :, 0]
        values[rows, :, step.columns] = value[:, :, 0]
        own_keys = keys[:num_rows, :, :num_columns].float()  # (R, H, C, D)
        query = query.float() * query.shape[-1] ** -0.5  # (R, H, 1, D)
        scores = (query @ own_keys.transpose(-1, -2)).squeeze(2) + step.mask  # (R, H, C)
        if self.prefix is None:
            weights = scores.softmax(dim=-1).to(value.dtype)
            shared = None
        else:
            prefix = self.prefix[index]
            by_head = query.squeeze(2).transpose(0, 1)  # (H, R, D)
            prefix_scores = by_head @ prefix.keys.float().transpose(-1, -2)  # (H, R, P)
            joined = torch.cat((prefix_scores.transpose(0, 1), scores), dim=-1)
            joined = joined.softmax(dim=-1).to(value.dtype)  # (R, H, P + C)
            prefix_length = prefix.keys.shape[1]
            weights = joined[..., prefix_length:]
            shared = joined[..., :prefix_length].transpose(0, 1) @ prefix.values  # (H, R, D)
        own = weights.unsqueeze(2) @ values[:num_rows, :, :num_columns]  # (R, H, 1, D)
        output = own.squeeze(2) if shared is None else own.squeeze(2) + shared.transpose(0, 1)
        return output.flatten(1)  # (R, E)

    def _choose(self, rows: Sequence[Row], hidden: Tensor) -> None:
        """Append each row's most likely next token, given final hidden states (rows, E)."""
        chosen = self.model.lm_head(hidden).argmax(dim=-1).tolist()
        for row, token in zip(rows, chosen, strict=True):
            row.answer.append(token)

    def _leave(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the rows that are done and close the gaps they leave."""
        end = self.model.config.eos_token_id
        for slot in range(len(self.rows) - 1, -1, -1):
            row = self.rows[slot]
            ended = row.answer[-1] == end
            if not ended and len(row.answer) < self.max_new_tokens:
                continue
            last = self.rows.pop()
            if last is not row:
                self.slots.move(len(self.rows), slot, last.length)
                self.rows[slot] = last
            yield row.index, row.answer[:-1] if ended else row.answer
