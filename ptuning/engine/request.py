"""One request to the decoding engine, and the row it becomes."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from ptuning.engine.sampling import GREEDY, Sampling, TokenLogprob
from ptuning.engine.shared_prefix import Shares

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """What to answer and how.

    prompt is token ids that end in [gMASK] <sop>; shares the prefixes to see, none for the base.
    end_ids end the answer, None means the model's <eop>. num_logprobs asks for log-probabilities of
    the chosen token and so many of the likeliest; None for none at all.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    shares: Shares = ()
    sampling: Sampling = GREEDY
    end_ids: frozenset[int] | None = None
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be decoded."""
        if not self.prompt:
            raise ValueError("the prompt has no tokens; it ends with [gMASK] <sop> at least.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; use 1 or more.")
        if self.num_logprobs is not None and self.num_logprobs < 0:
            raise ValueError(
                f"num_logprobs is {self.num_logprobs}; use 0 or more, or leave it out."
            )


class Row:
    """One request on its way: its answer so far and where its next token stands.

    `answer` and `logprobs` only ever grow, the end token left out, so another thread may read them;
    finish_reason is set after the last of them.
    """

    def __init__(self, request: Request, end_ids: frozenset[int]) -> None:
        self.request = request
        self.prompt = list(request.prompt)
        self.end_ids = end_ids
        self.sampling = request.sampling
        self.num_logprobs = request.num_logprobs
        self.random = random.Random(request.sampling.seed)
        self.answer: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.first_position = 0  # first-channel position of every answer token
        self.context_end = 0  # column of <sop>

    @property
    def length(self) -> int:
        """Columns in use: the prompt and the answer, whose newest token has no key yet."""
        return len(self.prompt) + max(len(self.answer) - 1, 0)

    @property
    def longest(self) -> int:
        """Columns it can ever need."""
        return len(self.prompt) + self.request.max_new_tokens

    def tokens(self) -> Iterable[int]:
        """Every token of prompt and answer."""
        return chain(self.prompt, self.answer)

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """Append the chosen token, or end."""
        if token in self.end_ids:
            self.finish_reason = "stop"
            return
        if logprob is not None:
            self.logprobs.append(logprob)
        self.answer.append(token)
        if len(self.answer) >= self.request.max_new_tokens:
            self.finish_reason = "length"


def split_by_size(rows: Sequence[Row], *, most_cells: int) -> Iterator[list[Row]]:
    """Yield rows in groups of at most most_cells tokens, padding counted, or of one row.

    Rows come longest first, so that prompts of like length share a pass.
    """
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.prompt)):
        if group and (len(group) + 1) * len(group[0].prompt) > most_cells:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
