"""Key/value caches that keep their rows' context: 2-D positions follow from where it lies.

transformers' caches hold keys and values only, and move rows (beams, several samples) by methods of
their own. A cache that the model fills becomes one of a class whose methods move the context too.
Shapes: B rows.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache

from ptuning.model.positions import Context


class ContextKeeper:
    """Mixed into a cache's class: its context moves with its rows, and goes when they do."""

    # The fields of a Context: transformers exports plain tuples only.
    glm_context: tuple[Tensor, ...] | None = None
    glm_prefix_length = 0  # columns in front, filled by another program (peft's PrefixTuning)

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
        """Cut the last tokens off; a prefix left alone may precede other prompts."""
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
    """Return the class of this kind of cache that keeps the context."""
    for keeping in (ChatGLMCache, ChatGLMStaticCache, ChatGLMQuantizedCache):
        if kind is keeping.__bases__[1]:
            return keeping
    return type(f"ChatGLM{kind.__name__}", (ContextKeeper, kind), {})


def remember_context(past_key_values: Cache, context: Context, *, prefix_length: int = 0) -> None:
    """Let a cache keep the context of its rows, prefix_length columns of another program before it.

    The class of a cache cannot change while a graph is traced; the next call outside changes it.
    """
    if not (isinstance(past_key_values, ContextKeeper) or torch.compiler.is_compiling()):
        kind: Any = type(past_key_values)
        past_key_values.__class__ = _keeping_class(kind)
    kept: Any = past_key_values
    kept.glm_context, kept.glm_prefix_length = tuple(context), prefix_length


def remembered_context(past_key_values: Cache) -> Context | None:
    """Return the context of the rows in a cache; None where this model did not fill it."""
    kept = getattr(past_key_values, "glm_context", None)
    if kept is None:
        return None
    if not isinstance(past_key_values, ContextKeeper):  # filled by a compiled graph
        prefix_length = getattr(past_key_values, "glm_prefix_length", 0)
        remember_context(past_key_values, Context(*kept), prefix_length=prefix_length)
    return Context(*kept)
