"""One request to the decoding engine, and the row of the batch that it becomes."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

from ptuning.engine.prefixes import PrefixMix

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How one row samples its tokens; temperature 0 is greedy decoding.

    top_p keeps the smallest set of most probable tokens whose probabilities sum to at least top_p,
    top_k the k most probable (0: all). repetition_penalty above 1 makes tokens of prompt and answer
    less likely. seed None picks a random seed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature is {self.temperature}; use 0 (greedy) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; use more than 0, and 1 at most.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; use 0 (all tokens) or more.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; use 1 (none) or another number "
                "above 0."
            )


GREEDY = Sampling()


class TokenLogprob(NamedTuple):
    """A chosen token's log-probability and the likeliest tokens', before temperature and cuts."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Request:
    """A prompt of token ids that ends in [gMASK] <sop>, and how to answer it.

    prefixes are those it attends to, none for the base. end_ids end the answer; None is the
    model's <eop>. num_logprobs asks for log-probabilities of the chosen token and of that many of
    the likeliest; None for none at all.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    prefixes: PrefixMix = ()
    sampling: Sampling = GREEDY
    end_ids: frozenset[int] | None = None
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be decoded."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; use 1 or more.")


class Row:
    """A request being answered: its tokens so far and the position of the next.

    `answer` and `logprobs` are only appended to, without the end token, so other threads may read
    them; finish_reason is set after the last of them.
    """

    def __init__(self, request: Request, end_ids: frozenset[int]) -> None:
        self.request = request
        self.prompt = list(request.prompt)
        self.end_ids = end_ids
        self.random = random.Random(request.sampling.seed)
        self.answer: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.first_position = 0  # first-channel position of every answer token
        self.context_end = 0  # column of <sop>

    @property
    def length(self) -> int:
        """Columns in use: prompt and answer, but for the newest token, which has no key yet."""
        return len(self.prompt) + max(len(self.answer) - 1, 0)

    @property
    def max_length(self) -> int:
        """Columns it can ever need."""
        return len(self.prompt) + self.request.max_new_tokens

    def tokens(self) -> Iterable[int]:
        """Every token of prompt and answer."""
        return chain(self.prompt, self.answer)

    def add_token(self, token: int, logprob: TokenLogprob | None) -> None:
        """Append the chosen token, or finish."""
        if token in self.end_ids:
            self.finish_reason = "stop"
            return
        if logprob is not None:
            self.logprobs.append(logprob)
        self.answer.append(token)
        if len(self.answer) >= self.request.max_new_tokens:
            self.finish_reason = "length"
