"""Self-Instruct for API cards: questions that one API answers, each with its call.

A request shows the document of one card, with questions that it already has. A card that has enough
questions, or gets no new ones, is not asked about any more.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ptuning.apicalls.calls import find_calls
from ptuning.apicalls.cards import Card, Cards
from ptuning.apicalls.pairs import identifying_texts
from ptuning.completions.source import Completion, Source
from ptuning.data.conversion import ContractRow
from ptuning.instruct.blocks import Task
from ptuning.instruct.collect import Collector, Settings
from ptuning.instruct.filters import blocked_pattern, fault_of
from ptuning.instruct.templates import API_EN, API_ZH

MAX_IDLE = 8  # requests in a row about one card that add no question


class CardWriter(Collector):
    """One run; the numbers of a card's requests are its index plus multiples of len(cards)."""

    templates = {one.name: one for one in (API_ZH, API_EN)}  # noqa: RUF012
    max_idle = float("inf")  # counted for each card

    def __init__(
        self, settings: Settings, cards: Cards, per_card: int, source: Source, out: Path
    ) -> None:
        """Read what an earlier run of the same command has saved; ValueError for another one's."""
        self.cards, self.per_card = cards, per_card
        self._tasks = [
            [Task(question, "", card.api_call) for question in card.fields.get("questions", [])]
            for card in cards
        ]
        self._names = [blocked_pattern(_telling_names(card)) for card in cards]
        self._asked: Counter[int] = Counter()
        self._idle: Counter[int] = Counter()
        self.kept: Counter[int] = Counter()
        super().__init__(settings, [task for own in self._tasks for task in own], source, out)

    def _wave(self, num_rows: int, size: int) -> list[int]:
        wanted = [index for index in range(len(self.cards)) if self._is_open(index)]
        wanted.sort(key=self._asked.__getitem__)
        return [index + self._asked[index] * len(self.cards) for index in wanted[:size]]

    def _is_open(self, index: int) -> bool:
        callable_card = self.cards[index].call is not None
        return callable_card and self.kept[index] < self.per_card and self._idle[index] < MAX_IDLE

    def _context(self, request: int) -> tuple[Sequence[Task], Sequence[str]]:
        index = request % len(self.cards)
        return self._tasks[index], [self.cards[index].document]

    def _has_enough(self, request: int, num_rows: int) -> bool:
        return self.kept[request % len(self.cards)] == self.per_card

    def _fault(self, request: int, task: Task) -> str | None:
        """Refuse a question that names the API, and an output that does not call it."""
        index = request % len(self.cards)
        question = task._replace(output=task.instruction)  # a call is of no language
        if index not in self.cards.matching(find_calls(task.output).calls):
            return "not_its_call"
        return fault_of(question, self.template, self._names[index])

    def _take(self, request: int, completions: Sequence[Completion], num_rows: int) -> None:
        index, before = request % len(self.cards), len(self.rows)
        super()._take(request, completions, num_rows)
        self._asked[index] += 1
        self._idle[index] = 0 if len(self.rows) > before else self._idle[index] + 1

    def _to_row(
        self, request: int, number: int, task: Task, scores: npt.NDArray[np.floating]
    ) -> ContractRow:
        index = request % len(self.cards)
        self.kept[index] += 1
        self._tasks[index].append(task)
        return super()._to_row(request, number, task, scores)


def _telling_names(card: Card) -> list[str]:
    """Return what gives an API away in a question; a plain word such as weather does not."""
    callee = "" if card.call is None else card.call.callee
    names = (callee, callee.rpartition(".")[2], str(card.fields["api_name"]))
    return [name for name in names if name and not name.isalpha()] + identifying_texts(card)
