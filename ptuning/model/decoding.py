"""Answer many prompts in left-padded batches, longest together, results in a small window of order.

Shapes: B batch, S tokens of the longest prompt in a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ptuning.model.chatglm import ChatGLMForConditionalGeneration

WINDOW_BATCHES = (
    8  # prompts are sorted by length inside so many batches, so results stay near their order
)


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
    """Yield (prompt index, answer tokens without <eop> and padding) as batches finish.

    Prompts end with [gMASK] <sop>; `pad` makes left-padded input_ids and attention_mask (B, S) of
    them. Indices come in windows of WINDOW_BATCHES batches.
    """
    was_training = model.training
    model.eval()
    config = decoding.to_generation_config(model)
    window = batch_size * WINDOW_BATCHES
    try:
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
    finally:
        model.train(was_training)


def until_end(answer: list[int], model: ChatGLMForConditionalGeneration) -> list[int]:
    """Return the tokens before the first <eop> (and before the padding that follows it)."""
    end = model.config.eos_token_id
    return answer[: answer.index(end)] if end in answer else answer
