"""Continuous batching: waiting rows are admitted and finished ones evicted at any step.

One engine serves evaluation and chat. Each row has its own prefixes, sampling and limits. Linear
layers see no padding: a prefill concatenates prompts, and a step is one token in each row. An
engine belongs to one thread.
Shapes: R rows, B batch, S tokens of the longest prompt, E hidden size, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ptuning.engine.graph import GraphedSteps
from ptuning.engine.prefill import prefill
from ptuning.engine.prefixes import (
    BatchPrefixes,
    PrefixCache,
    PrefixMix,
    SharedPrefix,
    mix_prefixes,
)
from ptuning.engine.request import Request, Row
from ptuning.engine.sampling import choose_tokens, logprobs_of
from ptuning.engine.slots import Slots
from ptuning.engine.step import decode_step
from ptuning.model.chatglm import ChatGLMForConditionalGeneration

ADMIT_RATIO = 4  # prefill once the rows to admit are a quarter of those decoding: larger batches
MAX_PREFILL_TOKENS = 16384  # with padding: 8 rows of ChatGLM-6B's full context
MAX_PREFILL_TOKENS_CPU = 1024  # products are at full speed, and malloc can reuse every tensor
WINDOW_BATCHES = 8  # transformers' generate sorts this many batches by length: near the given order


class Engine:
    """Decodes at most `max_rows` rows at a time; the others wait in order."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        *,
        max_rows: int,
        max_prefill_delay: int | None = None,
        use_graphs: bool = True,
    ) -> None:
        """Take an eval-mode model.

        Rows that could be admitted wait at most max_prefill_delay steps for others; None waits
        until they are a quarter of those decoding. use_graphs: on CUDA, replay CUDA graphs.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; use 1 or more.")
        self.model = model
        self.max_rows = max_rows
        self.max_prefill_delay = max_prefill_delay
        self._steps_waited = 0
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # row i decodes in slot i
        self.slots = Slots(model)
        self.prefix_cache = PrefixCache(model.transformer.final_layernorm.weight.device)
        self.graphed: GraphedSteps | None = None
        if use_graphs and model.device.type == "cuda":
            self.graphed = GraphedSteps(model.transformer)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.rows and not self.waiting

    def add(self, request: Request) -> Row:
        """Queue a request, which is admitted in one of the next steps."""
        row = self.new_row(request)
        self.add_row(row)
        return row

    def new_row(self, request: Request) -> Row:
        """Return the row of a request without queueing it; any thread may do this."""
        end = cast(int, self.model.config.eos_token_id)
        return Row(request, frozenset({end}) if request.end_ids is None else request.end_ids)

    def add_row(self, row: Row) -> None:
        """Queue a new row."""
        self.waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Evict a row, waiting or decoding; a finished one stays as it is."""
        if row.finish_reason is not None:
            return
        row.finish_reason = "cancelled"
        if row in self.waiting:
            self.waiting.remove(row)
        self._evict_finished()

    def cancel_all(self) -> None:
        """Evict all rows and free their memory."""
        for row in (*self.rows, *self.waiting):
            row.finish_reason = "cancelled"
        self.waiting.clear()
        self.rows.clear()
        self.release()

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Admit waiting rows once enough fit or have waited, else decode; return the advanced rows.

        Each of them got a token or its finish_reason; finished ones are evicted.
        """
        num_admitted = self._count_admitted()
        if num_admitted:
            advanced = [self.waiting.popleft() for _ in range(num_admitted)]
            on_cpu = self.model.device.type == "cpu"
            max_tokens = MAX_PREFILL_TOKENS_CPU if on_cpu else MAX_PREFILL_TOKENS
            for group in _split_by_tokens(advanced, max_tokens):
                self._admit(group)
        elif self.rows:
            advanced = list(self.rows)
            self._reserve(advanced, max(row.length for row in advanced) + 1)
            self._choose(advanced, self._decode(advanced))
        else:
            advanced = []
        self._evict_finished()
        return advanced

    def _count_admitted(self) -> int:
        """Return how many waiting rows to admit now: as many as fit, or none yet."""
        fitting = min(self.max_rows - len(self.rows), len(self.waiting))
        if not fitting:
            return 0
        self._steps_waited += 1
        delay = self.max_prefill_delay
        is_late = delay is not None and self._steps_waited > delay
        if fitting * ADMIT_RATIO < len(self.rows) and not is_late:
            return 0
        self._steps_waited = 0
        return fitting

    def _admit(self, rows: list[Row]) -> None:
        """Prefill new rows and choose their first tokens."""
        prompts = [row.prompt for row in rows]
        staying = [row.request.prefixes for row in self.rows]
        prefixes = self._lookup_prefixes(rows, staying)
        found = prefill(self.model.transformer, prompts, prefixes)
        first_slot = len(self.rows)
        self._reserve([*self.rows, *rows], max(map(len, prompts)))
        self.slots.write(first_slot, found.cache, found.spans)
        ends, positions = found.context.end.tolist(), found.context.mask_position.tolist()
        for row, end, position in zip(rows, ends, positions, strict=True):
            row.context_end, row.first_position = end, position
        self.rows += rows
        self._choose(rows, found.last_states)

    def _decode(self, rows: Sequence[Row]) -> Tensor:
        """Return the final states (R, E) of every row's newest token."""
        if self.graphed is not None:
            return self.graphed.step(rows, self.slots, self.prefix_cache)
        return decode_step(self.model.transformer, rows, self.slots, self._lookup_prefixes(rows))

    def _lookup_prefixes(
        self, rows: Sequence[Row], staying: Sequence[PrefixMix] = ()
    ) -> BatchPrefixes | None:
        return self.prefix_cache.lookup([row.request.prefixes for row in rows], staying=staying)

    def _reserve(self, rows: Sequence[Row], columns: int) -> None:
        max_columns = max(row.max_length for row in rows)
        self.slots.reserve(len(rows), columns, max_rows=self.max_rows, max_columns=max_columns)

    def _choose(self, rows: Sequence[Row], hidden: Tensor) -> None:
        """Give each row its next token, from final hidden states (R, E)."""
        logits = self.model.lm_head(hidden)  # (R, V)
        chosen = choose_tokens(logits, rows)
        logprobs = logprobs_of(logits, rows, chosen)
        for row, token, logprob in zip(rows, chosen, logprobs, strict=True):
            row.add_token(token, logprob)

    def _evict_finished(self) -> None:
        """Remove finished rows, close the gaps they leave, and free unused memory."""
        for slot in range(len(self.rows) - 1, -1, -1):
            if self.rows[slot].finish_reason is None:
                continue
            last = self.rows.pop()
            if slot < len(self.rows):
                self.slots.move(len(self.rows), slot, last.length)
                self.rows[slot] = last
        if self.is_idle:
            # Graphs are valid only for these slots, and are worth the little memory of both.
            if self.graphed is None or self.slots.num_bytes > self.slots.small_bytes:
                self.release()
        elif not self.waiting:
            self.slots.shrink(len(self.rows), max(row.length for row in self.rows))

    def release(self) -> None:
        """Free all memory kept for later requests; decoding rows are not affected."""
        self.prefix_cache.clear()
        if self.graphed is not None:
            self.graphed.clear()
        if self.is_idle:
            self.slots.shrink(0, 0)


def _split_by_tokens(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Yield groups of at most max_tokens prompt tokens with padding, or of one row.

    Longest first, so that prompts of similar length share a prefill.
    """
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.prompt)):
        if group and (len(group) + 1) * len(group[0].prompt) > max_tokens:
            yield group
            group = []
        group.append(row)
    yield group


class GreedyEngine(Engine):
    """Answers a known list of prompts greedily, all with the model's own prefix or with none."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        prompts: Sequence[Sequence[int]],
        *,
        max_rows: int,
        max_new_tokens: int,
        use_prefix: bool = True,
    ) -> None:
        """Take prompts of token ids, each ending in [gMASK] <sop>."""
        super().__init__(model, max_rows=max(1, min(max_rows, len(prompts))))
        with torch.no_grad():
            key_values = model.transformer.prefix_for(use_prefix)
        mix = () if key_values is None else mix_prefixes([(SharedPrefix(key_values), 1.0)])
        self._index_of = {
            self.add(Request(prompt, max_new_tokens, mix)): index
            for index, prompt in enumerate(prompts)
        }
        longest = max((row.max_length for row in self._index_of), default=0)
        self.slots = Slots(model, self.max_rows if prompts else 0, longest)

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Yield (prompt index, answer tokens without <eop>) as rows finish."""
        while not self.is_idle:
            for row in self.step():
                if row.finish_reason is not None:
                    yield self._index_of[row], row.answer


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
        """Return the same for transformers, with the model's token ids."""
        config = model.config
        # transformers warns about sampling values that have no effect.
        sampling = {"top_p": self.top_p, "temperature": self.temperature} if self.do_sample else {}
        if self.max_length is not None:
            limit = {"max_length": self.max_length}
        else:
            limit = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        return GenerationConfig(
            do_sample=self.do_sample,
            num_beams=self.num_beams,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            **limit,
            **sampling,
        )


PUBLISHED_SAMPLING = Decoding(
    max_new_tokens=None, max_length=512, do_sample=True, top_p=0.7, temperature=0.95
)  # the published evaluation


@torch.no_grad()
def generate_answers(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    decoding: Decoding,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (prompt index, answer tokens without <eop>) as rows finish, near their order.

    Prompts end with [gMASK] <sop>. Greedy answers come from GreedyEngine, `batch_size` rows at a
    time; sampling and beams from transformers' generate.
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
            )
            yield from engine.run()
            return
        window = batch_size * WINDOW_BATCHES
        for start in range(0, len(prompts), window):
            indices = range(start, min(start + window, len(prompts)))
            by_length = sorted(indices, key=lambda index: -len(prompts[index]))
            for first in range(0, len(by_length), batch_size):
                batch = by_length[first : first + batch_size]
                answers = _generate_batch(model, [prompts[i] for i in batch], decoding)
                yield from zip(batch, answers, strict=True)
    finally:
        model.train(was_training)


def _generate_batch(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
) -> list[list[int]]:
    """Return the answers of transformers' generate, each without <eop> and what follows it."""
    pad_id, end = cast(int, model.config.pad_token_id), cast(int, model.config.eos_token_id)
    ids = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
    ones = [torch.ones_like(prompt) for prompt in ids]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left")
    output = model.generate(
        input_ids=input_ids.to(model.device),  # (B, S)
        attention_mask=pad_sequence(ones, batch_first=True, padding_side="left").to(model.device),
        generation_config=decoding.to_generation_config(model),
    )
    answers: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in answers]
