"""Sources of completions: what any of them offers, and the engine in this process as one.

A source takes prompts with a seed each and yields completions as they finish.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.engine import Engine
from ptuning.engine.prefixes import PrefixMix, SharedPrefix, mix_prefixes
from ptuning.engine.request import Request, Sampling
from ptuning.model.chatglm import ChatGLMForConditionalGeneration


class Ask(NamedTuple):
    """A prompt to complete, the number of its request, and the seed of its sampling."""

    request: int
    prompt: str
    seed: int


class Completion(NamedTuple):
    """A completion; text None is a reply that was none. Counts are in tokens.

    logprobs: the log-probabilities of the most probable first tokens (the first that are not
    blank), None if they were not asked for or not given.
    """

    text: str | None
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: dict[str, float] | None = None


class Source(Protocol):
    """What completes prompts. repeats: equal prompts and seeds give equal completions."""

    name: str
    kind: str
    repeats: bool
    context_length: int | None  # None: unknown
    num_retries: int

    def num_tokens(self, prompt: str) -> int | None:
        """Return the length of a prompt; None if the tokenizer is unknown."""

    def complete(
        self, asks: Sequence[Ask], sampling: Sampling, max_new_tokens: int
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (request, completion) as completions finish."""


class EngineSource:
    """A loaded model, with its prefix if it has one; prompts share a batch of max_rows."""

    kind = "engine"
    repeats = True
    num_retries = 0

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        *,
        name: str,
        max_rows: int,
    ) -> None:
        self.name = name
        self.context_length: int | None = model.config.max_sequence_length
        self._model, self._tokenizer, self._max_rows = model.eval(), tokenizer, max_rows
        with torch.no_grad():
            key_values = model.transformer.prefix_for(True)
        self._mix: PrefixMix = ()
        if key_values is not None:
            self._mix = mix_prefixes([(SharedPrefix(key_values), 1.0)])

    def num_tokens(self, prompt: str) -> int | None:
        """Return the length of a prompt, [gMASK] <sop> included."""
        return len(self._tokenizer(prompt)["input_ids"])

    def complete(
        self, asks: Sequence[Ask], sampling: Sampling, max_new_tokens: int
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (request, completion) as rows finish."""
        engine = Engine(self._model, max_rows=self._max_rows)
        requests = {}
        for ask in asks:
            ids = self._tokenizer(ask.prompt)["input_ids"]
            seeded = replace(sampling, seed=ask.seed)
            requests[engine.add(Request(ids, max_new_tokens, self._mix, seeded))] = ask.request
        while not engine.is_idle:
            for row in engine.step():
                if row.finish_reason is not None:
                    text = str(self._tokenizer.decode(row.answer, skip_special_tokens=True))
                    counts = (len(row.prompt), len(row.answer))
                    yield requests[row], Completion(text, row.finish_reason, *counts)
