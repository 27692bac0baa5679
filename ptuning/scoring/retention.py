"""What tuning made the base forget: its answers to general prompts, and what is left of them.

The loss is that of the base's own greedy answers under teacher forcing: low for the base, which
wrote them, and higher the more the tuned model has forgotten. The base answers first; only its
answers and its likeliest next tokens are kept, so the two models need not share memory.
Shapes: B batch, S tokens, T tokens of an answer, N scored tokens of a batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ptuning.data.general_prompts import GeneralPrompts
from ptuning.data.prompts import Example
from ptuning.data.tokenization import IGNORED_LABEL, pad_right, to_generation_batch
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.engine import Decoding, generate_answers
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.positions import FlatLayout
from ptuning.output import Progress, signed

MAX_SOURCE_LENGTH = 512  # tokens of a general prompt
MAX_NEW_TOKENS = 64
KEPT_TOKENS = 32  # likeliest next tokens of the base; the others count as one in the divergence
BATCH_ROWS = 8  # rows scored at a time: 8 x 64 x V logits
MUCH_FORGOTTEN = 0.3  # nats per token; beyond, few answers stay the same (docs/forgetting.md)
ADVICE = (
    "Tuning changed most answers outside the task. To keep more of the base, mix in general rows "
    "(--mix) or train a prefix with --preset gentle: docs/forgetting.md."
)


@dataclass(frozen=True)
class RetentionRow:
    """One general prompt with both answers; losses and divergence in nats, summed over tokens.

    The tokens are those of the base's answer with its <eop>. The divergence is that of the tuned
    model's next-token distributions from the base's.
    """

    prompt: str
    base: str
    tuned: str
    num_tokens: int
    base_loss: float
    tuned_loss: float
    divergence: float

    @property
    def change(self) -> float:
        """Loss per token, tuned minus base; positive means forgotten."""
        return (self.tuned_loss - self.base_loss) / self.num_tokens

    @property
    def is_same(self) -> bool:
        """Whether both models give the same text."""
        return self.base == self.tuned


@dataclass(frozen=True)
class Retention:
    """Results over all general prompts; figures are means over tokens, in nats."""

    source: str  # the file of the prompts
    rows: Sequence[RetentionRow]

    @property
    def num_tokens(self) -> int:
        """Tokens of the base's answers."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def base_loss(self) -> float:
        """Loss of the base on its own answers."""
        return sum(row.base_loss for row in self.rows) / self.num_tokens

    @property
    def tuned_loss(self) -> float:
        """Loss of the tuned model on the base's answers."""
        return sum(row.tuned_loss for row in self.rows) / self.num_tokens

    @property
    def change(self) -> float:
        """Loss of the tuned model minus that of the base; positive means forgotten."""
        return self.tuned_loss - self.base_loss

    @property
    def divergence(self) -> float:
        """Divergence of the tuned model's next-token distribution from the base's."""
        return sum(row.divergence for row in self.rows) / self.num_tokens

    @property
    def num_same(self) -> int:
        """Number of prompts that both models answer with the same text."""
        return sum(row.is_same for row in self.rows)

    def by_name(self) -> dict[str, float]:
        """Return the figures by their names in predict_results.json."""
        return {
            "retention_prompts": len(self.rows),
            "retention_base_loss": round(self.base_loss, 4),
            "retention_tuned_loss": round(self.tuned_loss, 4),
            "retention_loss_change": round(self.change, 4),
            "retention_divergence": round(self.divergence, 4),
            "retention_same_answers": self.num_same,
        }

    def line(self) -> str:
        """Return a one-line summary; where much was forgotten, a second line gives advice."""
        text = (
            f"Forgetting: {self.num_same} of {len(self.rows)} general prompts answered as before "
            f"tuning; loss on the base's answers from {self.base_loss:.3f} to "
            f"{self.tuned_loss:.3f} ({signed(self.change, 3)})"
        )
        return f"{text}\n{ADVICE}" if self.change >= MUCH_FORGOTTEN else text


class TokenScores(NamedTuple):
    """The base's scores of one answer's T tokens, on the CPU."""

    losses: Tensor  # (T,), nats
    likeliest: Tensor  # (T, KEPT_TOKENS), token ids
    log_probabilities: Tensor  # (T, KEPT_TOKENS)


@dataclass(frozen=True)
class BaseAnswers:
    """The base's greedy answers as text and token ids (with <eop> if reached), and their scores."""

    texts: list[str]
    token_ids: list[list[int]]
    scores: list[TokenScores]


class RetentionRun:
    """One set of general prompts."""

    def __init__(
        self, general: GeneralPrompts, tokenizer: ChatGLMTokenizer, *, batch_size: int
    ) -> None:
        """Encode the prompts as they are, without the task's prefix text."""
        self.source, self.prompts = general
        self.tokenizer, self.batch_size = tokenizer, batch_size
        examples = [Example(prompt, "", prompt) for prompt in self.prompts]
        self.prompt_ids, _ = to_generation_batch(
            tokenizer, examples, max_source_length=MAX_SOURCE_LENGTH
        )

    def ask_base(self, base: ChatGLMForConditionalGeneration) -> BaseAnswers:
        """Answer every prompt with the untouched base and score its answers."""
        answers = self._answer(base, "the base")
        end = self.tokenizer.eop_token_id
        token_ids = [ids if len(ids) == MAX_NEW_TOKENS else [*ids, end] for ids in answers]
        scores: list[TokenScores] = []
        for log_probabilities, losses in self._scored(base, token_ids):
            kept = log_probabilities.topk(min(KEPT_TOKENS, log_probabilities.shape[1]))
            scores.append(TokenScores(losses.cpu(), kept.indices.cpu(), kept.values.cpu()))
        return BaseAnswers(self._texts(answers), token_ids, scores)

    def compare(self, tuned: ChatGLMForConditionalGeneration, base: BaseAnswers) -> Retention:
        """Answer the prompts and score the base's answers with the tuned model."""
        texts = self._texts(self._answer(tuned, "the tuned model"))
        rows = [
            RetentionRow(
                prompt=self.prompts[index],
                base=base.texts[index],
                tuned=texts[index],
                num_tokens=len(losses),
                base_loss=float(base.scores[index].losses.sum()),
                tuned_loss=float(losses.sum()),
                divergence=float(divergence(base.scores[index], log_probabilities.cpu()).sum()),
            )
            for index, (log_probabilities, losses) in enumerate(self._scored(tuned, base.token_ids))
        ]
        return Retention(str(self.source), rows)

    def _answer(self, model: ChatGLMForConditionalGeneration, name: str) -> list[list[int]]:
        """Return the greedy answers without <eop>, in prompt order."""
        answers: list[list[int]] = [[] for _ in self.prompts]
        title = f"answering general prompts with {name}"
        with Progress(len(self.prompts), title, unit="prompt") as progress:
            for index, ids in generate_answers(
                model,
                self.prompt_ids,
                batch_size=self.batch_size,
                decoding=Decoding(max_new_tokens=MAX_NEW_TOKENS),
            ):
                answers[index] = ids
                progress.update()
        return answers

    def _texts(self, answers: Sequence[list[int]]) -> list[str]:
        decode = self.tokenizer.decode
        return [str(decode(ids, skip_special_tokens=True)) for ids in answers]

    @torch.no_grad()
    def _scored(
        self, model: ChatGLMForConditionalGeneration, token_ids: Sequence[list[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the log-probabilities (T, V) and losses (T,) of each answer, in order."""
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(token_ids), BATCH_ROWS):
                yield from self._scored_batch(model, token_ids, slice(start, start + BATCH_ROWS))
        finally:
            model.train(was_training)

    def _scored_batch(
        self, model: ChatGLMForConditionalGeneration, token_ids: Sequence[list[int]], part: slice
    ) -> Iterator[tuple[Tensor, Tensor]]:
        answers = token_ids[part]
        rows = [
            {"input_ids": [*prompt, *answer], "labels": [IGNORED_LABEL] * len(prompt) + answer}
            for prompt, answer in zip(self.prompt_ids[part], answers, strict=True)
        ]
        padded = pad_right(rows, pad_id=self.tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in padded.items()}
        input_ids, lengths = batch["input_ids"], [len(answer) for answer in answers]
        shape = (len(input_ids), input_ids.shape[1])
        hidden_states = model.transformer(
            input_ids,
            attention_mask=batch["attention_mask"],
            use_cache=False,
            layout=FlatLayout(shape, batch["tokens"], batch["needed"]),
        ).last_hidden_state  # (1, N, E)
        logits = model.lm_head(hidden_states[0])  # (N, V)
        targets = batch["targets"].split(lengths)
        for row_logits, row_targets in zip(logits.split(lengths), targets, strict=True):
            log_probabilities = row_logits.float().log_softmax(-1)
            yield log_probabilities, -log_probabilities.gather(1, row_targets[:, None])[:, 0]


def divergence(base: TokenScores, tuned: Tensor) -> Tensor:
    """Return KL(base || tuned) at each token (T,), in nats, given tuned log-probabilities (T, V).

    The tokens that were not kept count as one event, which gives a slight underestimate.
    """
    kept = base.log_probabilities.double()
    tuned_kept = tuned.double().gather(1, base.likeliest)
    rest = (1 - kept.exp().sum(1)).clamp(min=1e-9)
    tuned_rest = (1 - tuned_kept.exp().sum(1)).clamp(min=1e-9)
    likeliest = (kept.exp() * (kept - tuned_kept)).sum(1)
    return (likeliest + rest * (rest / tuned_rest).log()).clamp(min=0)
