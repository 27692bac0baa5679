"""Scores by a judge behind an endpoint: 1 to 6, its expected grade where it tells the odds.

The expected value over the digits' probabilities separates rows that all get a 5 (G-Eval, Liu et
al. 2023, section 2, https://arxiv.org/abs/2303.16634). A reply that is no grade is missing.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from ptuning.completions.endpoint import EndpointSource
from ptuning.completions.source import Ask
from ptuning.data.prompts import TextRow
from ptuning.data.segmentation import language_of
from ptuning.engine.request import Sampling

GRADES = range(1, 7)
MAX_NEW_TOKENS = 4
MAX_UNGRADED = 20  # replies, before a judge that gives no grade is given up
SPEAKERS = {"en": ("User: ", "Assistant: "), "zh": ("用户：", "助手：")}
NUM_LOGPROBS = {"chat": 20, "completions": 5}  # the most that OpenAI's endpoints give
_GRADE = re.compile(r"\s*([1-6])\s*(?:分|[.。])?\s*")


def judge(source: EndpointSource, rows: Sequence[TextRow]) -> Iterator[tuple[int, float | None]]:
    """Yield (index, grade) of rows as the judge replies; None is missing.

    ValueError if none of the first replies is a grade: the others would hardly be better.
    """
    asks = [Ask(index, judge_prompt(row), 0) for index, row in enumerate(rows)]
    replies = source.complete(
        asks, Sampling(temperature=0.0), MAX_NEW_TOKENS, top_logprobs=NUM_LOGPROBS[source.kind]
    )
    has_grades = False
    for number, (index, reply) in enumerate(replies, 1):
        grade = grade_of(reply.text, reply.logprobs)
        has_grades = has_grades or grade is not None
        if number == MAX_UNGRADED and not has_grades:
            raise ValueError(
                f"--model {source.name} gave no grade in {number} replies, such as {reply.text!r}; "
                "a judge must reply with a number from 1 to 6: use another model, or --api."
            )
        yield index, grade


def judge_prompt(row: TextRow) -> str:
    """Return what the judge is asked, in the language of the answer, or else of the question."""
    language = language_of(row.response) or language_of(row.prompt) or "zh"
    user, assistant = SPEAKERS[language]
    turns = [f"{user}{asked}\n{assistant}{answered}\n" for asked, answered in row.history]
    question = "".join([*turns, f"{user}{row.prompt}"]) if turns else row.prompt
    return judge_templates()[language].format(question=question, answer=row.response)


@cache
def judge_templates() -> dict[str, str]:
    """Return the judge's prompts by language, with places for question and answer."""
    folder = Path(__file__).parent / "templates"
    files = {language: folder / f"judge.{language}.txt" for language in ("en", "zh")}
    return {language: file.read_text("utf-8").rstrip("\n") for language, file in files.items()}


def grade_of(text: str | None, logprobs: Mapping[str, float] | None = None) -> float | None:
    """Return the grade in a reply, None if it is anything else than a grade.

    logprobs: those of the first token's likeliest values. They count if the grade is the first.

    >>> grade_of("4"), grade_of("I refuse", {"I": -0.1, "3": -2.5})
    (4.0, None)
    >>> grade_of("4", {"4": math.log(0.6), "5": math.log(0.2), "ok": math.log(0.2)})
    4.25
    """
    found = _GRADE.fullmatch(text or "")
    if found is None:
        return None
    odds = dict.fromkeys(map(str, GRADES), 0.0)
    given = logprobs or {}
    for token, logprob in given.items():
        if token.strip() in odds:
            odds[token.strip()] += math.exp(logprob)
    total = sum(odds.values())
    if not total or max(given, key=given.__getitem__).strip() != found[1]:
        return float(found[1])
    return sum(int(grade) * share for grade, share in odds.items()) / total
