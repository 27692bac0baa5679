"""What the page does, without the page: one question to one or two models, answered side by side.

A visitor is one open page. It has one question under way at most: a new one stops the old.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from ptuning.serve.session import BASE_NAME, BASE_NEW_TOKENS, Session
from ptuning.serve.text_stream import CANCEL_CHECK_S, Answer

Turns = tuple[tuple[str, str], ...]  # question and answer, oldest first
Panes = tuple[Turns, Turns]  # the model, and what it is compared with
EMPTY: Panes = ((), ())
ENDINGS = {
    "length": "达到长度上限 length limit",
    "cancelled": "已停止 stopped",
}
PAIR_SIGN = "#"  # ADGEN's form: `类型#裤*版型#宽松`
LIST_SIGN = "*"


class Options(NamedTuple):
    """How answers are made; temperature 0 is greedy, max_new_tokens None is as trained."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    send_history: bool = False


class Progress(NamedTuple):
    """The conversations so far, a line about the answers, and whether they are complete."""

    panes: Panes
    status: str
    finished: bool


class WebTalk:
    """Questions from any number of open pages to one session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._running: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    @property
    def models(self) -> list[str]:
        """The names that can be picked, the untouched base last."""
        return [*self.session.prefixes, BASE_NAME]

    def is_trained_on_chats(self, model: str) -> bool:
        """Tell whether a model has seen earlier turns: the base has, a prefix may have."""
        settings = self.session.settings_of(model)
        if model == BASE_NAME and not settings:
            return True
        return bool(settings.get("history_column") or settings.get("multi_turn"))

    def trained_length(self, model: str) -> int:
        """Return the longest answer a model was trained to give, in tokens."""
        settings = self.session.settings_of(model)
        return int(settings.get("max_target_length") or BASE_NEW_TOKENS)

    def stop(self, visitor: str) -> None:
        """Stop what a visitor's page is waiting for, if anything."""
        with self._lock:
            cancel = self._running.pop(visitor, None)
        if cancel is not None:
            cancel.set()

    def ask(
        self, visitor: str, panes: Panes, question: str, models: Sequence[str], options: Options
    ) -> Iterator[Progress]:
        """Put a question to one or two models and yield the conversations as they grow.

        All models answer in one batch; the second one's turns are those of the second pane.
        """
        self.stop(visitor)
        cancel, changed = threading.Event(), threading.Event()
        with self._lock:
            self._running[visitor] = cancel
        started_s = time.monotonic()
        try:
            with ExitStack() as under_way:
                answers = [
                    under_way.enter_context(
                        self.session.chat(
                            question,
                            turns if options.send_history else (),
                            model,
                            cancel=cancel,
                            max_new_tokens=options.max_new_tokens,
                            on_progress=lambda finished: changed.set(),
                            temperature=options.temperature,
                            top_p=options.top_p,
                        )
                    )
                    for model, turns in zip(models, panes, strict=False)
                ]
                for finished in _follow(answers, changed):
                    status = _describe(models, answers, time.monotonic() - started_s)
                    yield Progress(_append(panes, question, answers), status, finished)
        finally:
            with self._lock:
                if self._running.get(visitor) is cancel:
                    del self._running[visitor]


def take_back(panes: Panes, *, compare: bool) -> tuple[Panes, str]:
    """Return the conversations without their last question, and that question; "" if none.

    The second pane loses its last turn only where it is shown and was asked the same.
    """
    first, second = panes
    if not first:
        return panes, ""
    question = first[-1][0]
    if compare and second and second[-1][0] == question:
        second = second[:-1]
    return (first[:-1], second), question


def to_messages(turns: Turns) -> list[dict[str, str]]:
    """Return turns as the page shows them; an answer without text yet shows a sign of life.

    >>> to_messages((("你好", "您好"),))
    [{'role': 'user', 'content': '你好'}, {'role': 'assistant', 'content': '您好'}]
    """
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer or "…"})
    return messages


def _follow(answers: Sequence[Answer], changed: threading.Event) -> Iterator[bool]:
    """Yield whether all is said, each time there is more text and once at the start."""
    num_shown = -1
    while True:
        changed.clear()
        for answer in answers:
            answer.poll()
        finished = all(answer.finish_reason is not None for answer in answers)
        num_characters = sum(len(answer.text) for answer in answers)
        if finished or num_characters != num_shown:
            num_shown = num_characters
            yield finished
        if finished:
            return
        changed.wait(CANCEL_CHECK_S)


def _append(panes: Panes, question: str, answers: Sequence[Answer]) -> Panes:
    texts: list[str | None] = [answer.text for answer in answers]
    first, second = (
        turns if text is None else (*turns, (question, text))
        for turns, text in zip(panes, [*texts, None][:2], strict=True)
    )
    return first, second


def _describe(models: Sequence[str], answers: Sequence[Answer], seconds: float) -> str:
    """Return the line under the conversation: tokens of each answer, how it ended, the time."""
    parts = []
    for model, answer in zip(models, answers, strict=True):
        ending = ENDINGS.get(answer.finish_reason or "")
        count = f"{model}: {answer.usage.completion_tokens} tokens"
        parts.append(f"{count} ({ending})" if ending else count)
    notices = dict.fromkeys(answer.notice for answer in answers if answer.notice is not None)
    return " · ".join([*parts, f"{seconds:.1f} s", *notices])


def parse_attributes(text: str) -> list[tuple[str, str]] | None:
    """Return keys and values in their order; None where the text is not in this form.

    A key may come twice, as in ADGEN; a value may hold `#`.

    >>> parse_attributes("类型#裤*版型#宽松")
    [('类型', '裤'), ('版型', '宽松')]
    >>> parse_attributes("你好") is None
    True
    """
    rows = []
    for part in text.strip().split(LIST_SIGN):
        key, sign, value = (word.strip() for word in part.partition(PAIR_SIGN))
        if not (key and sign and value):
            return None
        rows.append((key, value))
    return rows


def join_attributes(rows: Sequence[Sequence[object]]) -> str:
    """Return the string of a table; rows that miss their key or value are left out.

    >>> join_attributes([("类型", "裤"), ("", ""), ("版型", "宽松")])
    '类型#裤*版型#宽松'
    """
    pairs = []
    for row in rows:
        key, value = ("" if cell is None else str(cell).strip() for cell in (*row, "", "")[:2])
        if not (key and value):
            continue
        if LIST_SIGN in key + value or PAIR_SIGN in key:
            raise ValueError(
                f"the attribute {key} = {value} holds a sign that separates attributes; use "
                f"neither {LIST_SIGN} in it nor {PAIR_SIGN} in its name."
            )
        pairs.append(f"{key}{PAIR_SIGN}{value}")
    return LIST_SIGN.join(pairs)
