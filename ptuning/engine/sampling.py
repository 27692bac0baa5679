"""Choose each row's next token: the likeliest, or a random draw.

A row with a temperature draws one random number per token from its own generator, so its answer
depends on its seed and not on the other rows. Order as in transformers: repetition penalty,
temperature, top_k, top_p.
Shapes: R rows, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.engine.request import Row, TokenLogprob


def choose_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Return the next token of each row, given logits (R, V)."""
    chosen = logits.argmax(dim=-1).tolist()
    options = [row.request.sampling for row in rows]
    special = [
        index
        for index, sampling in enumerate(options)
        if sampling.temperature > 0.0 or sampling.repetition_penalty != 1.0
    ]
    if not special:
        return chosen
    scores = logits[special].float()  # (special rows, V)
    for place, index in enumerate(special):
        penalty = options[index].repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(rows[index].tokens())), device=scores.device)
            old = scores[place, seen]
            scores[place, seen] = torch.where(old < 0, old * penalty, old / penalty)
    likeliest = scores.argmax(dim=-1).tolist()
    for place, index in enumerate(special):
        chosen[index] = likeliest[place]
    drawing = [place for place, index in enumerate(special) if options[index].temperature > 0.0]
    if drawing:
        drawn = _draw(scores[drawing], [rows[special[place]] for place in drawing])
        for place, token in zip(drawing, drawn, strict=True):
            chosen[special[place]] = token
    return chosen


def _draw(scores: Tensor, rows: Sequence[Row]) -> list[int]:
    """Draw one token per row: the place of its random number in the cumulated probabilities."""
    dtype = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
    options = [row.request.sampling for row in rows]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=scores.device).unsqueeze(1)  # (R, 1)

    best = scores.amax(dim=-1, keepdim=True)
    # Relative to the best score, so that a tiny temperature cannot overflow.
    scaled = (scores - best).to(dtype) / column([one.temperature for one in options])  # (R, V)
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    vocabulary = ordered.shape[-1]
    ranks = torch.arange(vocabulary, device=scores.device)
    kept = ranks < column([float(one.top_k or vocabulary) for one in options])
    probabilities = ordered.masked_fill(~kept, -math.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept &= before < column([one.top_p for one in options])
    kept[:, 0] = True
    cumulated = probabilities.masked_fill(~kept, 0.0).cumsum(dim=-1)
    draws = column([row.random.random() for row in rows]) * cumulated[:, -1:]
    drawn = (cumulated <= draws).sum(dim=-1, keepdim=True)
    last = kept.sum(dim=-1, keepdim=True) - 1  # where rounding pushed a draw past the end
    return ids.gather(1, torch.minimum(drawn, last)).squeeze(1).tolist()  # (R,)


def logprobs_of(
    logits: Tensor, rows: Sequence[Row], chosen: Sequence[int]
) -> list[TokenLogprob | None]:
    """Return the log-probabilities of the rows that ask for them, None for the others."""
    found: list[TokenLogprob | None] = [None] * len(rows)
    counts = {
        index: row.request.num_logprobs
        for index, row in enumerate(rows)
        if row.request.num_logprobs is not None
    }
    if not counts:
        return found
    logprobs = logits[list(counts)].float().log_softmax(dim=-1)  # (rows asking, V)
    values, ids = logprobs.topk(min(max(counts.values()), logprobs.shape[-1]), dim=-1)
    for place, (index, count) in enumerate(counts.items()):
        top = zip(ids[place, :count].tolist(), values[place, :count].tolist(), strict=True)
        found[index] = TokenLogprob(chosen[index], float(logprobs[place, chosen[index]]), list(top))
    return found
