"""Step 4 of 5, by a model here: instruction-following difficulty (IFD), and likeness by states.

IFD is the mean loss of the answer's tokens, `<eop>` with them, divided by the same without the
prompt (Li et al. 2023, https://arxiv.org/abs/2308.12032). A row's state is the mean of its tokens'
final hidden states less the mean of all rows, without which half of Alpaca's rows are alike, scaled
to length 1 (after Ivison et al. 2025, https://arxiv.org/abs/2503.01807, who weight tokens by
position). Rows are laid end to end without padding. A prefix takes part if the model has one.
Shapes: T tokens of a batch, N with a target, B and R rows, S target rows, E hidden size.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ptuning.data.prompts import TextRow
from ptuning.data.tokenization import (
    IGNORED_LABEL,
    TokenizedExample,
    form_batches,
    pad_right,
    to_whole_rows,
)
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import base_fingerprint
from ptuning.model.loss import token_losses
from ptuning.model.positions import FlatLayout

CPU_BATCH_TOKENS = 2048  # measured: 512 is 5 to 40 % slower, 4,096 no faster
GPU_BATCH_TOKENS = 8192  # estimated: 0.27 GB for ChatGLM-6B's widest activations in float16
BLOCK_ROWS = 4096  # encoded at once: a token id takes up to 40 bytes in a list
MEAN_ROWS = 1000  # whose mean state stands for that of all rows


class Base:
    """A frozen model that scores rows; num_cut counts those longer than its max_sequence_length."""

    def __init__(self, model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        on_cpu = model.device.type == "cpu"
        self.batch_tokens = CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS
        self.num_cut = 0
        self._mean: Tensor | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of the model and its prefix."""
        encoder = self.model.prefix_encoder
        parts = [] if encoder is None else list(encoder.state_dict().values())
        values = b"".join(part.float().cpu().numpy().tobytes() for part in parts)
        return base_fingerprint(self.model) + hashlib.sha256(values).hexdigest()[:16]

    def ifd(self, rows: Sequence[TextRow]) -> Iterator[tuple[int, float]]:
        """Yield (index, IFD), of a block of rows the longest first; nan without a loss alone."""
        for indices, batch in self._batches(rows, lambda row: 2 * len(row.input_ids)):
            losses = mean_losses(self.model, [*batch, *map(without_prompt, batch)])
            for index, loss, alone in zip(indices, losses, losses[len(batch) :], strict=False):
                yield index, loss / alone if alone and math.isfinite(alone) else math.nan

    def centre_on(self, rows: Sequence[TextRow]) -> None:
        """Subtract the mean state of MEAN_ROWS of these rows, evenly spaced, from all states."""
        self._mean = None
        sample = rows[:: -(-len(rows) // MEAN_ROWS)]
        self._mean = torch.cat([states for _, states in self._states(sample)]).mean(dim=0)  # (E,)

    def states(self, rows: Sequence[TextRow]) -> Tensor:
        """Return the states (R, E) of rows, in order."""
        parts = list(self._states(rows))
        order = torch.tensor([index for indices, _ in parts for index in indices])
        return torch.cat([states for _, states in parts])[order.argsort()]

    def nearness(self, rows: Sequence[TextRow], targets: Tensor) -> Iterator[tuple[int, float]]:
        """Yield (index, highest cosine to one of the targets' states (S, E)), in `ifd`'s order."""
        for indices, states in self._states(rows):
            near = states @ targets.T  # (B, S)
            yield from zip(indices, near.amax(dim=1).tolist(), strict=True)

    def _states(self, rows: Sequence[TextRow]) -> Iterator[tuple[list[int], Tensor]]:
        for indices, batch in self._batches(rows, lambda row: len(row.input_ids)):
            states = mean_states(self.model, batch)
            if self._mean is not None:
                states = functional.normalize(states - self._mean, dim=1)
            yield indices, states  # (B, E)

    def _batches(
        self, rows: Sequence[TextRow], size: Callable[[TokenizedExample], int]
    ) -> Iterator[tuple[list[int], list[TokenizedExample]]]:
        """Yield batches of at most batch_tokens by size, or of a single row, and their indices."""
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            encoded = to_whole_rows(self.tokenizer, block, self.model.config.max_sequence_length)
            for places in form_batches(list(map(size, encoded)), self.batch_tokens):
                batch = [encoded[place] for place in places]
                self.num_cut += sum(row.prompt_cut or row.answer_cut for row in batch)
                yield [start + place for place in places], batch


def without_prompt(row: TokenizedExample) -> TokenizedExample:
    """Return `[gMASK] <sop> answer <eop>` of a row."""
    return row._replace(input_ids=row.input_ids[row.context_length - 1 :], context_length=1)


@torch.no_grad()
def mean_losses(
    model: ChatGLMForConditionalGeneration, batch: Sequence[TokenizedExample]
) -> list[float]:
    """Return each row's mean loss, in nats, over the tokens after `<sop>`."""
    states, targets = _forward(model, batch, only_targets=True)
    losses = token_losses(states, model.lm_head, targets).cpu()  # (N,)
    counts = [len(row.input_ids) - row.context_length - 1 for row in batch]
    return [float(part.mean()) for part in losses.split(counts)]


@torch.no_grad()
def mean_states(
    model: ChatGLMForConditionalGeneration, batch: Sequence[TokenizedExample]
) -> Tensor:
    """Return each row's mean state (B, E), float32, scaled to length 1, on the CPU."""
    states, _ = _forward(model, batch, only_targets=False)
    parts = states.split([len(row.input_ids) for row in batch])
    means = torch.stack([part.mean(dim=0, dtype=torch.float32) for part in parts])  # (B, E)
    return functional.normalize(means, dim=1).cpu()


def _forward(
    model: ChatGLMForConditionalGeneration, batch: Sequence[TokenizedExample], *, only_targets: bool
) -> tuple[Tensor, Tensor]:
    """Return the final states (T, E), or of those with a target (N, E), and the targets (N,)."""
    ids_and_sop = [(row.input_ids, row.context_length) for row in batch]
    rows = [
        {"input_ids": ids, "labels": [IGNORED_LABEL] * (sop + 1) + ids[sop + 1 :]}
        for ids, sop in ids_and_sop
    ]
    padded = pad_right(rows, pad_id=0)  # any id: padding is skipped
    inputs = {name: tensor.to(model.device) for name, tensor in padded.items()}
    shape = (len(batch), padded["input_ids"].shape[1])
    needed = inputs["needed"] if only_targets else None
    states = model.transformer(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
        layout=FlatLayout(shape, inputs["tokens"], needed),
    ).last_hidden_state[0]
    return states, inputs["targets"]
