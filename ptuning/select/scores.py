"""Scores of rows under the frozen base: instruction-following difficulty (IFD) and pooled states.

IFD is the mean loss of the answer's tokens given the prompt, divided by that of the same tokens
without the prompt; below 1 the prompt helps. `<eop>` is counted, `<sop>` is not. A row's pooled
state is the mean of its tokens' final hidden states, scaled to length 1.
Any prefix is left out. Rows are laid end to end without padding; one call of the model gives both
losses of a batch, and the pooled states too.
Sources: IFD, Li et al. 2023, https://arxiv.org/abs/2308.12032; pooled states, Ivison et al. 2025,
https://arxiv.org/abs/2503.01807 (they weight tokens by position, because theirs is a causal model).
Shapes: T tokens of a batch, N with a target, B and R rows, S target rows, E hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ptuning.data.prompts import SHORTEST, RowFormat, TextRow, to_example
from ptuning.data.tokenization import IGNORED_LABEL, TokenizedExample, pad_right, to_training_batch
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.loss import token_losses
from ptuning.model.positions import FlatLayout

CPU_BATCH_TOKENS = 2048  # measured: 512 is 5 to 40 % slower, 4,096 no faster
GPU_BATCH_TOKENS = 8192  # estimated: 0.27 GB for ChatGLM-6B's widest activations in float16
BLOCK_ROWS = 4096  # encoded at once: a token id takes up to 40 bytes in a list


class RowScores(NamedTuple):
    """One row's scores. Losses are means over the answer's tokens, in nats; nan if not wanted."""

    loss: float  # given the prompt
    loss_alone: float  # without the prompt
    pooled: Tensor | None  # (E,) float32 on the CPU, of length 1; None if not wanted
    is_cut: bool  # the row was longer than the model's max_sequence_length

    @property
    def ifd(self) -> float:
        """Return loss / loss_alone; nan where that is not a number."""
        if not self.loss_alone or not math.isfinite(self.loss_alone):
            return math.nan
        return self.loss / self.loss_alone


def score_rows(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    rows: Sequence[TextRow],
    *,
    wants_loss: bool,
    wants_pooled: bool,
    batch_tokens: int | None = None,
) -> Iterator[tuple[list[int], list[RowScores]]]:
    """Yield batch by batch the indices of its rows and their scores.

    Rows are taken BLOCK_ROWS at a time, of these the longest first. A batch has at most
    batch_tokens tokens, those of both losses counted, or a single row; None chooses by the device.
    """
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(model.device)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        encoded = encode_rows(tokenizer, block, model.config.max_sequence_length)
        sizes = [num_tokens(row, wants_loss=wants_loss) for row in encoded]
        for places in form_batches(sizes, batch_tokens):
            batch = [encoded[place] for place in places]
            scores = score_batch(model, batch, wants_loss=wants_loss, wants_pooled=wants_pooled)
            yield [start + place for place in places], scores


def default_batch_tokens(device: torch.device) -> int:
    """Return the tokens of a batch on a device."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS


def encode_rows(
    tokenizer: ChatGLMTokenizer, rows: Sequence[TextRow], max_tokens: int
) -> list[TokenizedExample]:
    """Encode rows, `prompt [gMASK] <sop> answer <eop>`, at most max_tokens tokens each.

    The answer is cut to what fits; a prompt that leaves no room for one is cut as in training.
    """
    encoded = to_training_batch(
        tokenizer,
        [to_example(row, RowFormat()) for row in rows],
        max_source_length=max_tokens - SHORTEST,
        max_target_length=max_tokens,
    )
    return [
        row._replace(
            input_ids=row.input_ids[:max_tokens],
            answer_cut=row.answer_cut or len(row.input_ids) > max_tokens,
        )
        for row in encoded
    ]


def num_tokens(row: TokenizedExample, *, wants_loss: bool) -> int:
    """Return the tokens of a row, in one pass or both."""
    num_tokens = len(row.input_ids)
    return 2 * num_tokens - row.context_length + 1 if wants_loss else num_tokens


def form_batches(sizes: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, largest first, of at most batch_tokens in all or a single index.

    >>> list(form_batches([2, 9, 3, 2], batch_tokens=5))
    [[1], [2, 0], [3]]
    """
    batch: list[int] = []
    room = batch_tokens
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if batch and sizes[index] > room:
            yield batch
            batch, room = [], batch_tokens
        batch.append(index)
        room -= sizes[index]
    if batch:
        yield batch


@torch.no_grad()
def score_batch(
    model: ChatGLMForConditionalGeneration,
    batch: Sequence[TokenizedExample],
    *,
    wants_loss: bool,
    wants_pooled: bool,
) -> list[RowScores]:
    """Return the scores of the rows of a batch, in order, by one call of the model."""
    sequences = [(row.input_ids, row.context_length) for row in batch]
    if wants_loss:  # `[gMASK] <sop> answer <eop>`
        sequences += [(row.input_ids[row.context_length - 1 :], 1) for row in batch]
    padded = pad_right(
        [
            {"input_ids": ids, "labels": [IGNORED_LABEL] * (sop + 1) + ids[sop + 1 :]}
            for ids, sop in sequences
        ],
        pad_id=0,  # any: padding is skipped
    )
    inputs = {name: tensor.to(model.device) for name, tensor in padded.items()}
    shape = (len(sequences), padded["input_ids"].shape[1])
    needed = None if wants_pooled else inputs["needed"]
    was_training = model.training
    model.eval()
    try:
        states = model.transformer(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            use_prefix=False,
            layout=FlatLayout(shape, inputs["tokens"], needed),
        ).last_hidden_state[0]  # (T, E), or (N, E)
    finally:
        model.train(was_training)

    losses = [math.nan] * (2 * len(batch))
    if wants_loss:
        answers = states[inputs["needed"]] if wants_pooled else states  # (N, E)
        by_token = token_losses(answers, model.lm_head, inputs["targets"]).cpu()  # (N,)
        counts = [len(ids) - sop - 1 for ids, sop in sequences]
        losses = [float(part.mean()) for part in by_token.split(counts)]
    pooled: Sequence[Tensor | None] = [None] * len(batch)
    if wants_pooled:
        parts = states.split([len(ids) for ids, _ in sequences])[: len(batch)]
        means = torch.stack([part.mean(dim=0, dtype=torch.float32) for part in parts])  # (B, E)
        pooled = functional.normalize(means, dim=1).cpu().unbind()
    return [
        RowScores(
            losses[index],
            losses[index + len(batch)],
            pooled[index],
            row.prompt_cut or row.answer_cut,
        )
        for index, row in enumerate(batch)
    ]


def centre(pooled: Tensor, mean: Tensor) -> Tensor:
    """Return pooled states (R, E) minus a mean (E,), scaled to length 1 again.

    Without that all rows of a kind look alike: with the nano model half of all pairs of Alpaca's
    rows have a cosine above 0.9, and minus the mean of all rows none.
    """
    return functional.normalize(pooled - mean, dim=1)


def cosine_to_targets(pooled: Tensor, targets: Tensor) -> Tensor:
    """Return the highest cosine (R,) of each pooled state (R, E) to the targets' (S, E)."""
    return (pooled @ targets.T).amax(dim=1)
