"""Key/value caches that carry each row's context, and the positions of tokens appended to them.

transformers' caches hold keys and values only, and reorder, repeat and select rows (for beams and
samples) by their own methods. A cache that the model fills changes its class to one of these, whose
methods move the context too: 2-D positions follow from it.
Shapes: B rows, S tokens of this call, C columns: cached tokens and these.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache

from ptuning.model.positions import (
    Context,
    is_full_mask,
    mask_of_call,
    position_ids,
    visible_keys,
)


class ContextKeeper:
    """Mixed into a cache's class: moves the context with its rows and drops it with them."""

    # The fields of a Context: transformers exports plain tuples only.
    glm_context: tuple[Tensor, ...] | None = None
    glm_prefix_length = 0  # columns in front that another program filled (peft's PrefixTuning)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Make row i the former row beam_idx[i]."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows: numbers, a bool mask or a slice."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row this many times, its copies next to each other."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.glm_context is not None:
            self.glm_context = tuple(part.repeat_interleave(repeats) for part in self.glm_context)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Cut the last tokens off; once only a prefix is left, other prompts may follow it."""
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if self.get_seq_length() <= self.glm_prefix_length:  # type: ignore[attr-defined]
            self.glm_context = None

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()  # type: ignore[misc]
        self.glm_context = None

    def _select(self, rows: Any) -> None:
        if self.glm_context is not None:
            if isinstance(rows, Tensor):
                rows = rows.to(self.glm_context[0].device)
            self.glm_context = tuple(part[rows] for part in self.glm_context)


class ChatGLMCache(ContextKeeper, DynamicCache):
    """The cache that the model makes when none is given."""


class ChatGLMStaticCache(ContextKeeper, StaticCache):
    """A static cache that the model has filled."""


class ChatGLMQuantizedCache(ContextKeeper, QuantizedCache):
    """A quantised cache that the model has filled."""


@cache
def _keeping_class(kind: Any) -> type[Cache]:
    """Return the subclass of this kind of cache that keeps the context."""
    for keeping in (ChatGLMCache, ChatGLMStaticCache, ChatGLMQuantizedCache):
        if kind is keeping.__bases__[1]:
            return keeping
    return type(f"ChatGLM{kind.__name__}", (ContextKeeper, kind), {})


def remember_context(past_key_values: Cache, context: Context, *, prefix_length: int = 0) -> None:
    """Keep the rows' context in a cache; another program filled prefix_length columns before it.

    A cache cannot change its class while a graph is traced; the next call outside changes it.
    """
    if not (isinstance(past_key_values, ContextKeeper) or torch.compiler.is_compiling()):
        kind: Any = type(past_key_values)
        past_key_values.__class__ = _keeping_class(kind)
    kept: Any = past_key_values
    kept.glm_context, kept.glm_prefix_length = tuple(context), prefix_length


def remembered_context(past_key_values: Cache | None) -> Context | None:
    """Return the context of a cache's rows; None if there is no cache or another program's."""
    kept = getattr(past_key_values, "glm_context", None)
    if kept is None or past_key_values is None:
        return None
    if not isinstance(past_key_values, ContextKeeper):  # filled by a compiled graph
        prefix_length = getattr(past_key_values, "glm_prefix_length", 0)
        remember_context(past_key_values, Context(*kept), prefix_length=prefix_length)
    return Context(*kept)


def is_filled(past_key_values: Cache | None) -> bool:
    """Return whether a cache holds tokens, or may: a static one counts them on the device."""
    if past_key_values is None:
        return False
    length = past_key_values.get_seq_length()
    return isinstance(length, Tensor) or length > 0


def refuse_filled(past_key_values: Cache | None) -> None:
    """Refuse a filled cache where gradient checkpointing would leave it out."""
    if is_filled(past_key_values):
        raise ValueError(
            "past_key_values is filled, as by peft's PrefixTuning, but gradient checkpointing "
            "leaves caches out; turn one of the two off: gradient_checkpointing=False."
        )


class Placement(NamedTuple):
    """Where the tokens of a call are."""

    positions: Tensor  # (B, 2, S)
    visible: Tensor | None  # bool (B, 1, S, C), True for visible; None: all keys are
    found: Context | None  # the context, if this call's tokens were searched for it


def place_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    past_key_values: Cache | None,
    find: Callable[[Tensor, Tensor | None], Context],
) -> Placement:
    """Return the positions of input_ids (B, S), unless given, and the keys that they see.

    attention_mask is a padding mask (B, cached + S) or a full one. A cache given is made to
    remember the context, which `find` finds in tokens and their padding mask.
    """
    is_full = is_full_mask(attention_mask)
    if is_full and positions is not None:
        return Placement(positions, attention_mask, None)
    mask = None if is_full else attention_mask
    num_queries = num_keys = input_ids.shape[1]
    past = 0
    if past_key_values is not None:
        past = int(past_key_values.get_seq_length())  # a static cache counts in a tensor
        num_keys = past_key_values.get_mask_sizes(num_queries, 0)[0]
    if past and mask is not None and mask.shape[1] < past + num_queries:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {past} cached tokens and "
            f"{num_queries} of this call; give one column for each."
        )
    context = found = None
    if past == 0 or positions is None:
        remembered = remembered_context(past_key_values)
        if past and remembered is not None:
            _check_rows(remembered, len(input_ids))
            context = remembered
        else:
            context = find(input_ids, mask_of_call(mask, num_queries) if past else mask)
            found = None if is_full or remembered is not None else context
            if past:
                context = _context_after(context, past, num_queries)
            if past_key_values is not None:
                remember_context(past_key_values, context, prefix_length=past)
        if positions is None:
            positions = position_ids(context, past, num_queries)
    if is_full:
        return Placement(positions, attention_mask, found)
    if past > 0 and num_queries == 1 and mask is None and num_keys == past + 1:
        return Placement(positions, None, found)
    # Without a context: the second channel counts from <sop> on, all that is cached is visible.
    end = past + (positions[:, 1] == 0).sum(dim=1) if context is None else context.end
    return Placement(positions, visible_keys(end, mask, past, num_queries, num_keys), found)


def _context_after(context: Context, num_cached: int, num_columns: int) -> Context:
    """Return the context of rows that continue another program's cache (peft's PrefixTuning).

    Its keys and values are a prefix to whole prompts: every token sees them, and positions do not
    count them. `context` is that of this call's num_columns columns.
    """
    if bool((context.end == num_columns).any()):
        raise ValueError(
            "past_key_values was filled by another program, and a row of input_ids has no <sop>, "
            "so the positions of the new tokens are unknown; give position_ids (B, 2, S)."
        )
    return context.shift(num_cached)


def _check_rows(context: Context, num_rows: int) -> None:
    """Refuse a cache of more or fewer rows than the tokens that continue it."""
    if context.end.shape[0] != num_rows:
        raise ValueError(
            f"past_key_values holds {context.end.shape[0]} row(s) for {num_rows} of input_ids; "
            "move its rows by its own methods (reorder_cache, batch_select_indices, "
            "batch_repeat_interleave), or give position_ids (B, 2, S)."
        )
