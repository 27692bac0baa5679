"""Choosing each row's next token: the likeliest, or a draw of its own.

Every row that draws has its own random numbers, one for each token, so that what it says depends on
its seed and not on the rows beside it. Order as in transformers: repetition penalty, temperature,
top_k, top_p.
Shapes: R rows, V vocabulary.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one row chooses. temperature 0 is greedy: always the likeliest token.

    top_p keeps the fewest likeliest tokens whose probabilities reach it, top_k so many (0: all).
    repetition_penalty above 1 makes every token of prompt and answer less likely. seed None draws a
    new one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
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


class ChoosingRow(Protocol):
    """What choosing needs to know of a row."""

    sampling: Sampling
    num_logprobs: int | None  # None: not asked for; 0: of the chosen token alone
    random: random.Random

    def tokens(self) -> Iterable[int]:
        """Every token of prompt and answer."""


def choose_tokens(logits: Tensor, rows: Sequence[ChoosingRow]) -> list[int]:
    """Return the next token of each row, given logits (R, V)."""
    chosen = logits.argmax(dim=-1).tolist()
    special = [
        index
        for index, row in enumerate(rows)
        if row.sampling.temperature > 0.0 or row.sampling.repetition_penalty != 1.0
    ]
    if special:
        scores = logits[special].float()
        some = [rows[index] for index in special]
        for index, token in zip(special, _choose_by_options(scores, some), strict=True):
            chosen[index] = token
    return chosen


def logprobs_of(
    logits: Tensor, rows: Sequence[ChoosingRow], chosen: Sequence[int]
) -> list[TokenLogprob | None]:
    """Return the log-probabilities of the rows that ask for them, None for the others."""
    found: list[TokenLogprob | None] = [None] * len(rows)
    asking = [index for index, row in enumerate(rows) if row.num_logprobs is not None]
    if not asking:
        return found
    logprobs = logits[asking].float().log_softmax(dim=-1)  # (rows asking, V)
    most = max(rows[index].num_logprobs or 0 for index in asking)
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    for place, index in enumerate(asking):
        count = rows[index].num_logprobs or 0
        top = zip(ids[place, :count].tolist(), values[place, :count].tolist(), strict=True)
        found[index] = TokenLogprob(chosen[index], float(logprobs[place, chosen[index]]), list(top))
    return found


def _choose_by_options(scores: Tensor, rows: Sequence[ChoosingRow]) -> list[int]:
    """Choose from float32 scores (R, V), which are changed."""
    for place, row in enumerate(rows):
        penalty = row.sampling.repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(row.tokens())), device=scores.device)
            old = scores[place, seen]
            scores[place, seen] = torch.where(old < 0, old * penalty, old / penalty)
    chosen = scores.argmax(dim=-1).tolist()
    drawing = [place for place, row in enumerate(rows) if row.sampling.temperature > 0.0]
    if drawing:
        drawn = _draw(scores[drawing], [rows[place] for place in drawing])
        for place, token in zip(drawing, drawn, strict=True):
            chosen[place] = token
    return chosen


def _draw(scores: Tensor, rows: Sequence[ChoosingRow]) -> list[int]:
    """Draw one token per row: the place of its random number on the cumulated probabilities."""

    exact = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no more

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=exact, device=scores.device).unsqueeze(1)

    temperatures = column([row.sampling.temperature for row in rows])
    best = scores.amax(dim=-1, keepdim=True)
    # From the best score down, so that a tiny temperature cannot overflow.
    scaled = (scores - best).to(exact) / temperatures  # (R, V)
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(ordered.shape[-1], device=scores.device)
    all_of_them = ordered.shape[-1]
    kept = places < column([float(row.sampling.top_k or all_of_them) for row in rows])
    probabilities = ordered.masked_fill(~kept, -math.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept &= before < column([row.sampling.top_p for row in rows])
    kept[:, 0] = True
    cumulated = probabilities.masked_fill(~kept, 0.0).cumsum(dim=-1)
    draws = column([row.random.random() for row in rows]) * cumulated[:, -1:]
    drawn = (cumulated <= draws).sum(dim=-1, keepdim=True)
    last = kept.sum(dim=-1, keepdim=True) - 1  # a draw that rounding pushed past the end
    return ids.gather(1, torch.minimum(drawn, last)).squeeze(1).tolist()
