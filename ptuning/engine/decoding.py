"""Answer many prompts in left-padded batches, longest together, results in a small window of order.

Shapes: B batch, S tokens of the longest prompt in a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ptuning.engine.engine import GreedyEngine
from ptuning.model.chatglm import ChatGLMForConditionalGeneration

# Prompts are sorted by length inside so many batches, so results stay near their order.
WINDOW_BATCHES = 8


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen. Greedy unless do_sample or num_beams say otherwise.

    max_new_tokens counts answer tokens; max_length, when given, caps prompt and answer together
    instead.
    """

    max_new_tokens: int | None = 128
    max_length: int | None = None
    do_sample: bool = False
    num_beams: int = 1
    top_p: float = 1.0
    temperature: float = 1.0

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest one, with no limit on prompt and answer together."""
        return not self.do_sample and self.num_beams == 1 and self.max_length is None

    def to_generation_config(self, model: ChatGLMForConditionalGeneration) -> GenerationConfig:
        """Return transformers' form of it, with the model's token ids."""
        values: dict[str, Any] = {
            name: value for name, value in asdict(self).items() if value is not None
        }
        if self.max_length is not None:
            values.pop("max_new_tokens", None)
        if not self.do_sample:  # transformers warns about sampling values that have no effect
            values.pop("top_p")
            values.pop("temperature")
        config = model.config
        return GenerationConfig(
            **values,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )


PUBLISHED_SAMPLING = Decoding(
    max_new_tokens=None, max_length=512, do_sample=True, top_p=0.7, temperature=0.95
)  # the published evaluation


@torch.no_grad()
def generate_answers(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    *,
    pad: Callable[[Sequence[Sequence[int]]], Mapping[str, Tensor]],
    batch_size: int,
    decoding: Decoding,
    use_prefix: bool = True,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (prompt index, answer tokens without <eop>) as rows finish, near their order.

    Prompts end with [gMASK] <sop>. Greedy answers come from GreedyEngine, `batch_size` rows at a
    time; sampling and beams from transformers, for which `pad` makes left-padded input_ids and
    attention_mask (B, S) of token ids.
    """
    was_training = model.training
    model.eval()
    try:
        if decoding.is_greedy and decoding.max_new_tokens is not None:
            engine = GreedyEngine(
                model,
                prompts,
                max_rows=batch_size,
                max_new_tokens=decoding.max_new_tokens,
                use_prefix=use_prefix,
            )
            yield from engine.run()
        else:
            yield from _generate_batches(model, prompts, pad, batch_size, decoding, use_prefix)
    finally:
        model.train(was_training)


def _generate_batches(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    pad: Callable[[Sequence[Sequence[int]]], Mapping[str, Tensor]],
    batch_size: int,
    decoding: Decoding,
    use_prefix: bool,
) -> Iterator[tuple[int, list[int]]]:
    """Answer with transformers' generate, prompts of like length together."""
    config = decoding.to_generation_config(model)
    window = batch_size * WINDOW_BATCHES
    for start in range(0, len(prompts), window):
        rows = range(start, min(start + window, len(prompts)))
        by_length = sorted(rows, key=lambda row: -len(prompts[row]))
        for first in range(0, len(by_length), batch_size):
            batch = by_length[first : first + batch_size]
            inputs = pad([prompts[row] for row in batch])
            output = model.generate(
                **{name: value.to(model.device) for name, value in inputs.items()},
                generation_config=config,
                use_prefix=use_prefix,
            )
            answers = output[:, inputs["input_ids"].shape[1] :].tolist()
            yield from zip(batch, (until_end(a, model) for a in answers), strict=True)


def until_end(answer: list[int], model: ChatGLMForConditionalGeneration) -> list[int]:
    """Return the tokens before the first <eop> (and before the padding that follows it)."""
    end = model.config.eos_token_id
    return answer[: answer.index(end)] if end in answer else answer
