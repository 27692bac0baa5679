"""What a session in a process of its own and its front tell each other, pickled, over a pipe."""

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

from ptuning.engine.request import FinishReason, Request
from ptuning.engine.sampling import TokenLogprob
from ptuning.serve.session import Load, Weighted
from ptuning.tunings.artefact import TunedInfo

# From the front


class Start(NamedTuple):
    """Decode a request under a number of its own."""

    number: int
    request: Request
    prefixes: Weighted


class Stop(NamedTuple):
    """Stop computing it."""

    number: int


class AddPrefix(NamedTuple):
    """Load a prefix; answered by a Result of the same number."""

    number: int
    name: str
    path: str
    allow_other_base: bool


class RemovePrefix(NamedTuple):
    """Forget a prefix."""

    name: str


class Close(NamedTuple):
    """Stop everything and end."""


# From the process with the model


class Loaded(NamedTuple):
    """The model is there: tokens that a row may have, and how the model was tuned."""

    context_length: int
    tuned: TunedInfo | None


class Result(NamedTuple):
    """What a call returned, or the error that it raised."""

    number: int
    value: Any
    error: Exception | None = None


class RowProgress(NamedTuple):
    """What is new of one request."""

    number: int
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob]
    finish_reason: FinishReason | None
    error: str | None = None


class Progress(NamedTuple):
    """What one decoding step did."""

    rows: Sequence[RowProgress]
    load: Load


def portable(error: Exception) -> Exception:
    """Return an error that arrives as it is sent; one that cannot be pickled keeps its words."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (what pickling raises is anyone's choice)
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return error
    kind = next(
        (kind for kind in (ValueError, FileNotFoundError, OSError) if isinstance(error, kind)),
        RuntimeError,
    )
    return kind(str(error))
