"""Key/value caches that keep their rows' context, from which 2-D positions follow.

transformers' caches hold keys and values only, and reorder, repeat and select rows (for beams and
samples) by their own methods. A cache that the model fills changes its class to one of these, whose
methods move the context too.
Shapes: B rows.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache

from ptuning.model.positions import Context


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
    """Tell whether a cache holds tokens, or may: a static one counts them on the device."""
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


def context_after(context: Context, num_cached: int, num_columns: int) -> Context:
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


def check_rows(context: Context, num_rows: int) -> None:
    """Refuse a cache of more or fewer rows than the tokens that continue it."""
    if context.end.shape[0] != num_rows:
        raise ValueError(
            f"past_key_values holds {context.end.shape[0]} row(s) for {num_rows} of input_ids; "
            "move its rows by its own methods (reorder_cache, batch_select_indices, "
            "batch_repeat_interleave), or give position_ids (B, 2, S)."
        )
