"""The web page's logic without Gradio: one question to one or two models, side by side.

A visitor is one open page. A visitor's new question stops the one in progress.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

from ptuning.apicalls.cards import Cards
from ptuning.apicalls.verdicts import REASONS, to_shown_call
from ptuning.serve.session import BASE_NAME, BASE_NEW_TOKENS, Session
from ptuning.serve.text_stream import CANCEL_CHECK_S, Answer

Turns = tuple[tuple[str, str], ...]  # question and answer, oldest first
Panes = tuple[Turns, Turns]  # of the model and of the one it is compared with
EMPTY: Panes = ((), ())
ENDINGS = {
    "length": "达到长度上限 length limit",
    "cancelled": "已停止 stopped",
}
PAIR_SIGN = "#"  # ADGEN's form: `类型#裤*版型#宽松`
LIST_SIGN = "*"
MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])")  # where HTML begins a tag or a character


class TalkState(NamedTuple):
    """The conversations so far, a status line, and whether the answers are complete."""

    panes: Panes
    status: str
    finished: bool


class WebTalk:
    """Questions from any number of visitors to one session."""

    def __init__(
        self,
        session: Session,
        cards: Cards | None = None,
        to_prompt: Callable[[str], str] = str,
    ) -> None:
        """Ask session, every question by to_prompt.

        API calls in answers are checked against cards and never executed.
        """
        self.session, self.cards, self.to_prompt = session, cards, to_prompt
        self._running: dict[str, threading.Event] = {}  # visitor -> cancels the question
        self._lock = threading.Lock()

    @property
    def models(self) -> list[str]:
        """The names to choose from, the untouched base last."""
        return [*self.session.prefixes, BASE_NAME]

    def is_trained_on_chats(self, model: str) -> bool:
        """Return whether a model was trained with earlier turns: the base was, a prefix may be."""
        settings = self.session.settings_of(model)
        if model == BASE_NAME and not settings:
            return True
        return bool(settings.get("history_column") or settings.get("multi_turn"))

    def trained_length(self, model: str) -> int:
        """Return the longest answer a model was trained to give, in tokens."""
        settings = self.session.settings_of(model)
        return int(settings.get("max_target_length") or BASE_NEW_TOKENS)

    def stop(self, visitor: str) -> None:
        """Stop a visitor's question, if one is in progress."""
        with self._lock:
            cancel = self._running.pop(visitor, None)
        if cancel is not None:
            cancel.set()

    def ask(
        self,
        visitor: str,
        panes: Panes,
        question: str,
        models: Sequence[str],
        *,
        send_history: bool = False,
        **options: Any,
    ) -> Iterator[TalkState]:
        """Ask one or two models and yield the conversations as they grow.

        The models answer in one batch, with the fields of `ChatOptions`; the second one continues
        the second pane.
        """
        self.stop(visitor)
        cancel, changed = threading.Event(), threading.Event()
        with self._lock:
            self._running[visitor] = cancel
        started_s = time.monotonic()
        try:
            with ExitStack() as open_answers:
                answers = [
                    open_answers.enter_context(
                        self.session.chat(
                            self.to_prompt(question),
                            turns if send_history else (),
                            model,
                            cancel=cancel,
                            on_progress=lambda finished: changed.set(),
                            **options,
                        )
                    )
                    for model, turns in zip(models, panes, strict=False)
                ]
                for finished in _follow(answers, changed):
                    status = _describe(models, answers, time.monotonic() - started_s)
                    yield TalkState(_append(panes, question, answers), status, finished)
        finally:
            with self._lock:
                if self._running.get(visitor) is cancel:
                    del self._running[visitor]


def _follow(answers: Sequence[Answer], changed: threading.Event) -> Iterator[bool]:
    """Yield whether all answers are complete, once at the start and whenever there is more text."""
    num_shown = -1
    finished = False
    while not finished:
        changed.clear()
        for answer in answers:
            answer.poll()
        finished = all(answer.finish_reason is not None for answer in answers)
        num_characters = sum(len(answer.text) for answer in answers)
        if finished or num_characters != num_shown:
            num_shown = num_characters
            yield finished
        else:
            changed.wait(CANCEL_CHECK_S)


def _append(panes: Panes, question: str, answers: Sequence[Answer]) -> Panes:
    first, second = panes
    first = (*first, (question, answers[0].text))
    if len(answers) > 1:
        second = (*second, (question, answers[1].text))
    return first, second


def _describe(models: Sequence[str], answers: Sequence[Answer], seconds: float) -> str:
    """Return the status line: tokens and ending of each answer, the time, and notices."""
    parts = []
    for model, answer in zip(models, answers, strict=True):
        ending = ENDINGS.get(answer.finish_reason or "")
        count = f"{model}: {answer.usage.completion_tokens} tokens"
        parts.append(f"{count} ({ending})" if ending else count)
    notices = dict.fromkeys(answer.notice for answer in answers if answer.notice is not None)
    return " · ".join([*parts, f"{seconds:.1f} s", *notices])


def take_back(panes: Panes, *, compare: bool) -> tuple[Panes, str]:
    """Return the conversations without their last question, and that question; "" if none.

    The second pane loses its last turn only if it is shown and its last question is the same.
    """
    first, second = panes
    if not first:
        return panes, ""
    question = first[-1][0]
    if compare and second and second[-1][0] == question:
        second = second[:-1]
    return (first[:-1], second), question


def to_messages(
    turns: Turns, cards: Cards | None = None, *, finished: bool = True
) -> list[dict[str, Any]]:
    """Return turns as the page shows them; an answer without text yet is an ellipsis.

    With cards an API call is shown again under its answer, titled with its verdict; not while the
    last answer is unfinished.

    >>> to_messages((("你好", "您好"),))
    [{'role': 'user', 'content': '你好'}, {'role': 'assistant', 'content': '您好'}]
    """
    messages: list[dict[str, Any]] = []
    for index, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": _escape(question)})
        messages.append({"role": "assistant", "content": _escape(answer) or "…"})
        is_whole = finished or index < len(turns) - 1
        if cards is not None and is_whole and (shown := _describe_call(answer, cards)):
            title, call = map(_escape, shown)
            messages.append({"role": "assistant", "content": call, "metadata": {"title": title}})
    return messages


@lru_cache(maxsize=256)  # earlier answers are shown again with every piece of a new one
def _describe_call(answer: str, cards: Cards) -> tuple[str, str] | None:
    """Return the verdict on an answer's API call, and the call; None if there is none."""
    shown = to_shown_call(answer, cards)
    if shown is None:
        return None
    title = f"✓ API 调用有效 valid API call: {', '.join(shown.cards)}"
    if shown.reason is not None:
        title = f"✗ API 调用无效 invalid API call: {REASONS[shown.reason]}"
    return title, shown.call or "—"


def _escape(text: str) -> str:
    """Escape markup, which the page would interpret even with Markdown off.

    >>> _escape("1 < 2 && <<<code>>>: <img src='https://example.org'>")
    "1 < 2 && <<&lt;code>>>: &lt;img src='https://example.org'>"
    """
    return MARKUP.sub(lambda sign: "&lt;" if sign[0] == "<" else "&amp;", text)


def parse_attributes(text: str) -> list[tuple[str, str]] | None:
    """Return keys and values in order, or None if the text has another form.

    As in ADGEN, a key may occur twice; a value may contain `#`.

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
    """Return a table of attributes as text; rows without key or value are skipped.

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
                f"the attribute {key} = {value} contains a sign that separates attributes; use no "
                f"{LIST_SIGN} in it and no {PAIR_SIGN} in its name."
            )
        pairs.append(f"{key}{PAIR_SIGN}{value}")
    return LIST_SIGN.join(pairs)
