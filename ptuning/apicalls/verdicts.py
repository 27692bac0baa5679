"""What an answer's call is worth: against the cards alone, or against a reference too.

Gorilla's evaluator compares domains; here the API itself must be right, and every wrong row has a
reason. Accepted values are compared as BFCL compares them
(https://github.com/ShishirPatil/gorilla/tree/main/berkeley-function-call-leaderboard).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ptuning.apicalls.calls import Call, FoundCalls, find_calls
from ptuning.apicalls.cards import GENERIC, Cards, card_call

REASONS = {
    "no_call": "没有调用 there is no call",
    "syntax": "无法解析 the call is not Python",
    "unknown_callee": "没有这个函数 no card has this function",
    "missing_argument": "缺少参数 an argument is missing",
    "unknown_model": "没有这样的取值 no card has these identifying values",
    "wrong_api": "另一个 API another API of the same domain",
    "wrong_domain": "另一个领域 an API of another domain",
    "wrong_argument": "参数值不对 the value of an argument is wrong",
    "unknown_argument": "多余的参数 an argument that should not be there",
    "unneeded_call": "不该调用 a call where no API fits",
}
MAX_NAMED = 3  # matching cards that are named with an answer
_IGNORED = re.compile(r"[ ,./\-_*^]")  # in texts with accepted values, as published


class Reference(NamedTuple):
    """What a question needs. api_call None: no API fits.

    accepted: the values of each argument that are right, "" among them for one that may be left
    out, None where the call itself says it; api_call is then the function's name.
    """

    question_id: str
    api_call: str | None
    domain: str = ""
    accepted: Mapping[str, Sequence[Any]] | None = None

    @property
    def call(self) -> Call | None:
        """The call that is needed, without its arguments where several are right."""
        if self.api_call is None or self.accepted is not None:
            return None if self.api_call is None else Call(self.api_call)
        return card_call(self.api_call)


class CallVerdict(NamedTuple):
    """What an answer is worth; reason None: it is right. matching are the indices of cards.

    domain_first: the first matching card is of the right domain; domain_any: one of them is.
    arguments: of the right API, and with the reference's arguments.
    """

    reason: str | None
    answer: FoundCalls
    matching: list[int]
    domain_first: bool = False
    domain_any: bool = False
    right_api: bool = False
    arguments: bool = False

    @property
    def hallucinated(self) -> bool:
        """Whether no card has such a call."""
        return not self.matching


def check_call(text: str, cards: Cards, scope: str | None = None) -> CallVerdict:
    """Say whether an answer calls one of the cards' APIs, and if not, why."""
    answer = find_calls(text)
    matching = cards.matching(answer.calls, scope)
    reason = None if matching else _why_no_card(answer, cards, scope)
    return CallVerdict(reason, answer, matching)


class ShownCall(NamedTuple):
    """The call of an answer for people to read: its text, None if it is not Python, and verdict.

    reason is a key of REASONS, None for a valid call; cards are the api_name of matching ones.
    """

    call: str | None
    valid: bool
    reason: str | None
    cards: list[str]


def to_shown_call(text: str, cards: Cards) -> ShownCall | None:
    """Return the first call of an answer that matches a card, else its first; None without any."""
    verdict = check_call(text, cards)
    calls, has_tag, looks_called = verdict.answer
    if not calls and not (has_tag and looks_called):
        return None
    matches = ((call, found) for call in calls if (found := cards.matching([call])))
    shown, own = next(matches, (calls[0] if calls else None, []))
    names = [str(cards[index].fields["api_name"]) for index in own[:MAX_NAMED]]
    source = None if shown is None else shown.source
    return ShownCall(source, verdict.reason is None, verdict.reason, names)


def _why_no_card(answer: FoundCalls, cards: Cards, scope: str | None) -> str:
    if not answer.calls:
        return "syntax" if answer.looks_called else "no_call"
    known = [
        (call, cards[index])
        for call in answer.calls
        for index in cards.of_callee(call.callee, scope)
    ]
    if not known:
        return "unknown_callee"
    is_whole = any(card.num_given(call) >= len(card.identifying) for call, card in known)
    return "unknown_model" if is_whole else "missing_argument"


def judge(text: str, cards: Cards, reference: Reference) -> CallVerdict:
    """Judge an answer by the cards and its reference."""
    scope = reference.question_id
    found = check_call(text, cards, scope)
    if reference.api_call is None:
        return found._replace(reason="unneeded_call" if found.answer.calls else None)
    if found.reason is not None:
        return found
    matching = set(found.matching)
    domains = [cards[index].domain == reference.domain for index in found.matching]
    if cards.family == GENERIC:
        needed = reference.call
        right = matching.intersection(cards.matching([] if needed is None else [needed], scope))
    else:
        right = {index for index in matching if cards[index].api_call == reference.api_call}
    found = found._replace(domain_first=domains[0], domain_any=any(domains), right_api=bool(right))
    if not right:
        return found._replace(reason="wrong_api" if any(domains) else "wrong_domain")
    faults = []
    for call in found.answer.calls:
        own = right.intersection(cards.matching([call], scope))
        if own:
            faults.append(argument_fault(call, reference, cards[min(own)].parameters))
    is_exact = None in faults
    reason = None if is_exact or cards.family != GENERIC else faults[0]
    return found._replace(reason=reason, arguments=is_exact)


def argument_fault(call: Call, reference: Reference, parameters: tuple[str, ...]) -> str | None:
    """Return the first fault among a call's arguments, None if there is none.

    parameters are the names of positional arguments, in order.
    """
    given = call.named(parameters)
    accepted = reference.accepted
    if accepted is None:
        needed = reference.call
        wanted = {} if needed is None else needed.named(parameters)
        if given.keys() - wanted.keys():
            return "unknown_argument"
        if wanted.keys() - given.keys():
            return "missing_argument"
        is_same = all(given[name].key == value.key for name, value in wanted.items())
        return None if is_same else "wrong_argument"
    if given.keys() - accepted.keys():
        return "unknown_argument"
    if any(name not in given and "" not in values for name, values in accepted.items()):
        return "missing_argument"
    is_right = all(is_accepted(one.value, accepted[name]) for name, one in given.items())
    return None if is_right else "wrong_argument"


def is_accepted(value: Any, accepted: Iterable[Any]) -> bool:
    """Return whether a value is among the accepted ones.

    Texts are compared without case, blanks and some signs, a whole number is also a float, and an
    accepted object lists what is right for each of its keys.

    >>> is_accepted("new york", ["New York"]), is_accepted(5, [5.0]), is_accepted(True, [1])
    (True, True, False)
    >>> is_accepted({"city": "Oslo"}, [{"city": ["oslo"], "country": ["Norway", ""]}])
    True
    """
    return any(_is_same(value, one) for one in accepted)


def _is_same(value: Any, one: Any) -> bool:
    if isinstance(value, dict) and isinstance(one, dict):
        known = value.keys() <= one.keys()
        return known and all(
            is_accepted(value[name], choices) if name in value else "" in choices
            for name, choices in one.items()
        )
    if isinstance(value, list | tuple) and isinstance(one, list | tuple):
        return len(value) == len(one) and all(map(_is_same, value, one))
    if isinstance(value, str) and isinstance(one, str):
        return _simplified(value) == _simplified(one)
    is_number = not isinstance(value, bool) and isinstance(one, float) and isinstance(value, int)
    return (type(value) is type(one) or is_number) and bool(value == one)


def _simplified(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')
