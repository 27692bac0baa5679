"""Keys and values of the decoding rows, in slots that grow and shrink with the load.

A slot holds the row's tokens from column 0 on. In memory the columns of a key are contiguous, which
makes the scores of a single query twice as fast to compute. Memory grows by at least half, or to
what is needed, shrinks when three quarters are unused, and is freed when no row is left; a small
amount is allocated at once.
Shapes: B rows, S tokens of the longest, T tokens of all, H heads, D head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ptuning.model.chatglm import ChatGLMForConditionalGeneration

COLUMN_STEP = 16  # capacities are multiples of it: fast products need aligned rows
MIN_SLOTS, MIN_COLUMNS = 4, 64  # below this, memory is not worth moving tensors for
SMALL_BYTES = 64 * 2**20  # up to this, all that the rows can ever need is allocated at once
SMALL_BYTES_CUDA, SMALL_SHARE_CUDA = 2**30, 1 / 16  # ... on CUDA: a resize drops all graphs
SHRINK_RATIO = 4  # shrink when a quarter or less is in use


class Slots:
    """Keys and values of every layer, (slots, H, capacity, D) each."""

    def __init__(
        self, model: ChatGLMForConditionalGeneration, num_slots: int = 0, capacity: int = 0
    ) -> None:
        config = model.config
        self.num_slots, self.capacity = num_slots, round_up(capacity)
        self.generation = 0  # how often the tensors were replaced
        self._heads = (config.num_attention_heads, config.head_dim)
        self._like = model.transformer.final_layernorm.weight
        self.small_bytes = _small_bytes(self._like.device)
        self.keys = [self._new_keys() for _ in range(config.num_layers)]
        self.values = [self._new_values() for _ in range(config.num_layers)]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(stored.nbytes for stored in (*self.keys, *self.values))

    def write(
        self, first_slot: int, cache: DynamicCache, spans: Sequence[slice] | None = None
    ) -> None:
        """Copy prompts' keys and values to slots from the first on.

        The cache holds (B, H, S, D), or with spans, each row's tokens of the T, (1, H, T, D).
        """
        layers: Any = cache.layers  # typed as any kind of cache layer; these hold keys and values
        for index, layer in enumerate(layers):
            for stored, read in (
                (self.keys[index], layer.keys),
                (self.values[index], layer.values),
            ):
                if spans is None:
                    stored[first_slot : first_slot + len(read), :, : read.shape[2]] = read
                    continue
                for slot, span in enumerate(spans, start=first_slot):
                    stored[slot, :, : span.stop - span.start] = read[0, :, span]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot to another."""
        for stored in (*self.keys, *self.values):
            stored[target, :, :length] = stored[source, :, :length]

    def reserve(self, num_rows: int, columns: int, *, max_rows: int, max_columns: int) -> None:
        """Hold num_rows of `columns` at least; grow ahead of need, but not past the maxima."""
        columns, max_columns = round_up(columns), round_up(max_columns)
        num_slots, capacity = self.num_slots, self.capacity
        if num_rows > num_slots:
            num_slots = max(num_rows, min(max_rows, max(2 * num_slots, MIN_SLOTS)))
        if columns > capacity:
            ahead = max(round_up(capacity * 3 // 2), MIN_COLUMNS)
            if num_slots * max_columns * self._column_bytes <= self.small_bytes:
                ahead = max_columns
            capacity = max(columns, min(max_columns, ahead))
        self._resize(num_slots, capacity)

    def shrink(self, num_rows: int, columns: int) -> None:
        """Keep about twice what num_rows of `columns` need, once three quarters are unused."""
        if num_rows == 0:
            self._resize(0, 0)
            return
        num_slots, capacity = self.num_slots, self.capacity
        if num_rows * SHRINK_RATIO <= num_slots > MIN_SLOTS:
            num_slots = max(2 * num_rows, MIN_SLOTS)
        is_small = num_slots * capacity * self._column_bytes <= self.small_bytes
        if columns * SHRINK_RATIO <= capacity > MIN_COLUMNS and not is_small:
            capacity = max(round_up(2 * columns), MIN_COLUMNS)
        self._resize(num_slots, capacity)

    @property
    def _column_bytes(self) -> int:
        heads, width = self._heads
        return 2 * len(self.keys) * heads * width * self._like.element_size()

    def _new_values(self) -> Tensor:
        heads, width = self._heads
        return self._like.new_zeros(self.num_slots, heads, self.capacity, width)

    def _new_keys(self) -> Tensor:
        heads, width = self._heads
        stored = self._like.new_zeros(self.num_slots, heads, width, self.capacity)
        return stored.transpose(2, 3)  # (slots, H, capacity, D)

    def _resize(self, num_slots: int, capacity: int) -> None:
        """Replace the tensors one after the other, keeping the contents that fit."""
        if (num_slots, capacity) == (self.num_slots, self.capacity):
            return
        rows, columns = min(num_slots, self.num_slots), min(capacity, self.capacity)
        self.num_slots, self.capacity = num_slots, capacity
        self.generation += 1
        for tensors, new in ((self.keys, self._new_keys), (self.values, self._new_values)):
            for index, old in enumerate(tensors):
                tensors[index] = new()
                tensors[index][:rows, :, :columns] = old[:rows, :, :columns]


def _small_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return SMALL_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    return max(SMALL_BYTES, min(SMALL_BYTES_CUDA, int(total * SMALL_SHARE_CUDA)))


def round_up(columns: int) -> int:
    """Return the next multiple of COLUMN_STEP.

    >>> [round_up(columns) for columns in (0, 1, 16, 17)]
    [0, 16, 16, 32]
    """
    return -(-columns // COLUMN_STEP) * COLUMN_STEP
