"""Decoding many rows at once: finished rows leave the batch, waiting rows join, at any time.

One engine serves evaluation and chat. Each row has its own prefixes, sampling and limits; keys and
values live in slots (`engine_slots`), a prefix is held once for all its rows (`shared_prefix`).
Nothing is padded: prompts are packed (`engine_prefill`), and a step is one token in each row
(`engine_step`). An engine belongs to one thread.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ptuning.engine.graph import GraphedSteps
from ptuning.engine.prefill import read_prompts
from ptuning.engine.prefixes import PrefixRows, SeenPrefixes
from ptuning.engine.request import Request, Row, split_by_size
from ptuning.engine.sampling import choose_tokens, logprobs_of
from ptuning.engine.shared_prefix import SharedPrefix, Shares, mix_prefixes
from ptuning.engine.slots import Slots
from ptuning.engine.step import decode_step
from ptuning.model.chatglm import ChatGLMForConditionalGeneration

JOIN_SHARE = 4  # rows join when a quarter as many as decode can: prompts are read together
MOST_CELLS = 16384  # padded tokens in one pass over prompts: 8 rows of ChatGLM-6B's full context
MOST_CELLS_CPU = 1024  # products are at full speed, and nothing is too large for malloc to reuse


class Engine:
    """Decodes at most `max_rows` rows at a time; the others wait in order."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        *,
        max_rows: int,
        patience: int | None = None,
        record_steps: bool = True,
    ) -> None:
        """Take an eval-mode model.

        A row that could join waits for others to join with, at most patience steps; None waits for
        a quarter of the rows that decode. record_steps: on CUDA, replay steps as CUDA graphs.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; use 1 or more.")
        self.model = model
        self.max_rows = max_rows
        self.patience = patience
        self._steps_waited = 0
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # row i decodes in slot i
        self.slots = Slots(model)
        self.seen_prefixes = SeenPrefixes(model.transformer.final_layernorm.weight.device)
        self.graphed: GraphedSteps | None = None
        if record_steps and model.device.type == "cuda":
            self.graphed = GraphedSteps(model.transformer)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.rows and not self.waiting

    def add(self, request: Request) -> Row:
        """Queue a request; its row joins the batch in one of the next steps."""
        row = self.new_row(request)
        self.add_row(row)
        return row

    def new_row(self, request: Request) -> Row:
        """Return the row of a request that is not queued yet; any thread may do this."""
        end = cast(int, self.model.config.eos_token_id)
        return Row(request, frozenset({end}) if request.end_ids is None else request.end_ids)

    def add_row(self, row: Row) -> None:
        """Queue a new row."""
        self.waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Take a row out, wherever it is; a finished one stays as it is."""
        if row.finish_reason is not None:
            return
        row.finish_reason = "cancelled"
        if row in self.waiting:
            self.waiting.remove(row)
        self._leave()

    def cancel_all(self) -> None:
        """Take every row out and give the memory back."""
        for row in (*self.rows, *self.waiting):
            row.finish_reason = "cancelled"
        self.waiting.clear()
        self.rows.clear()
        self.release()

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Read waiting prompts if there is room, else decode; return the rows that moved on.

        Each got a token or its finish_reason, and finished ones have left.
        """
        joining = self._count_joining()
        if joining:
            moved = [self.waiting.popleft() for _ in range(joining)]
            on_cpu = self.model.device.type == "cpu"
            for group in split_by_size(moved, most_cells=MOST_CELLS_CPU if on_cpu else MOST_CELLS):
                self._join(group)
        elif self.rows:
            moved = list(self.rows)
            self._make_room(moved, max(row.length for row in moved) + 1)
            self._choose(moved, self._decode(moved))
        else:
            moved = []
        self._leave()
        return moved

    def _count_joining(self) -> int:
        """Return how many waiting rows join now: as many as fit, or none yet."""
        fitting = min(self.max_rows - len(self.rows), len(self.waiting))
        if not fitting:
            return 0
        self._steps_waited += 1
        is_late = self.patience is not None and self._steps_waited > self.patience
        if fitting * JOIN_SHARE < len(self.rows) and not is_late:
            return 0
        self._steps_waited = 0
        return fitting

    def _join(self, rows: list[Row]) -> None:
        """Read the prompts of new rows and choose their first tokens."""
        prompts = [row.prompt for row in rows]
        staying = [row.request.shares for row in self.rows]
        prefixes = self._prefixes_of(rows, staying=staying)
        read = read_prompts(self.model.transformer, prompts, prefixes)
        width = max(len(prompt) for prompt in prompts)
        first_slot = len(self.rows)
        self._make_room([*self.rows, *rows], width)
        self.slots.fill(first_slot, read.cache, read.spans)
        for row, end, position in zip(
            rows, read.context.end.tolist(), read.context.mask_position.tolist(), strict=True
        ):
            row.context_end, row.first_position = end, position
        self.rows += rows
        self._choose(rows, read.last_states)

    def _decode(self, rows: Sequence[Row]) -> Tensor:
        """Return the final states (rows, E) of every row's newest token."""
        if self.graphed is not None:
            return self.graphed.step(rows, self.slots, self.seen_prefixes)
        return decode_step(self.model.transformer, rows, self.slots, self._prefixes_of(rows))

    def _prefixes_of(
        self, rows: Sequence[Row], *, staying: Sequence[Shares] = ()
    ) -> PrefixRows | None:
        return self.seen_prefixes.of([row.request.shares for row in rows], staying=staying)

    def _make_room(self, rows: Sequence[Row], columns: int) -> None:
        self.slots.make_room(
            len(rows),
            columns,
            most_rows=self.max_rows,
            most_columns=max(row.longest for row in rows),
        )

    def _choose(self, rows: Sequence[Row], hidden: Tensor) -> None:
        """Give each row its next token, from final hidden states (rows, E)."""
        logits = self.model.lm_head(hidden)  # (rows, V)
        chosen = choose_tokens(logits, rows)
        for row, token, logprob in zip(
            rows, chosen, logprobs_of(logits, rows, chosen), strict=True
        ):
            row.take(token, logprob)

    def _leave(self) -> None:
        """Take finished rows out, close the gaps they leave, and give idle memory back."""
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
            self.slots.give_back(len(self.rows), max(row.length for row in self.rows))

    def release(self) -> None:
        """Give back all memory that is kept for what may come; rows decode on as before."""
        self.seen_prefixes.forget()
        if self.graphed is not None:
            self.graphed.forget()
        if self.is_idle:
            self.slots.give_back(0, 0)


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
        shares = () if key_values is None else mix_prefixes([(SharedPrefix(key_values), 1.0)])
        self._index_of = {
            self.add(Request(prompt, max_new_tokens, shares)): index
            for index, prompt in enumerate(prompts)
        }
        longest = max((row.longest for row in self._index_of), default=0)
        self.slots = Slots(model, self.max_rows if prompts else 0, longest)

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Yield (prompt index, answer tokens without <eop>) as rows finish."""
        while not self.is_idle:
            for row in self.step():
                if row.finish_reason is not None:
                    yield self._index_of[row], row.answer
