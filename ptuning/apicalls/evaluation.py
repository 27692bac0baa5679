"""Answers against references: what is counted, and the rows and page that show it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptuning.apicalls.cards import NO_API, Cards, fields_of
from ptuning.apicalls.pairs import CALL, DOMAIN, read_tags
from ptuning.apicalls.verdicts import REASONS, CallVerdict, Reference, judge
from ptuning.completions.journal import to_line
from ptuning.data.parsing import open_data
from ptuning.data.raw_file import DataError, RawRow, number_of
from ptuning.data.reading import read_raw_rows
from ptuning.output import render_page
from ptuning.storage import write_atomically

ID = "question_id"
ANSWERS = ("text", "predict")  # columns of an answer: published, and main.py --do_predict's
SHOWN_LENGTH = 2000  # characters of an answer on the page
MEASURES: dict[str, tuple[str, Callable[[CallVerdict], bool]]] = {
    "format": ("有 api_call 标签 has the tag api_call", lambda one: one.answer.has_tag),
    "parsed": ("解析出调用 a call could be read", lambda one: bool(one.answer.calls)),
    "hallucination": ("没有这样的 API no card has such a call", lambda one: not one.matching),
    "error": (
        "另一个 API another card's call",
        lambda one: bool(one.matching) and not one.right_api,
    ),
    "domain_first": ("首个匹配的领域 domain of the first match", lambda one: one.domain_first),
    "domain_any": ("任一匹配的领域 domain of any match", lambda one: one.domain_any),
    "right_api": ("API 正确 the right API", lambda one: one.right_api),
    "arguments": ("参数也正确 with the right arguments", lambda one: one.arguments),
}


class JudgedRow(NamedTuple):
    """An answer, what it should have been, and its verdict."""

    reference: Reference
    text: str
    verdict: CallVerdict


def read_references(path: Path) -> list[Reference]:
    """Return what the questions of a file need; a row without an id gets its number from 1.

    A row is {question_id, api_call, domain}, Gorilla's {api_call, api_data}, one of `api prepare`,
    or BFCL's: possible answers, or a question to which no function fits.
    """
    references: dict[str, Reference] = {}
    for number, row in enumerate(read_raw_rows(open_data(path), None), 1):
        one = _to_reference(row, number)
        if references.setdefault(one.question_id, one) is not one:
            raise row.fault(f"{ID} {one.question_id} is there twice.")
    return list(references.values())


def _to_reference(row: RawRow, number: int) -> Reference:
    fields = fields_of(row)
    row_id = str(fields.get(ID, fields.get("id", number)))
    if "ground_truth" in fields:
        try:
            (((name, accepted),),) = [calls.items() for calls in fields["ground_truth"]]
            accepted = {key: [*values] for key, values in accepted.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise row.fault(
                "ground_truth needs a single call: [{name: {argument: []}}]."
            ) from error
        return Reference(row_id, name, "", accepted)
    if "function" in fields:
        if "irrelevance" not in row_id:
            raise row.fault("is a question of BFCL; references are its file of possible answers.")
        return Reference(row_id, None)
    if isinstance(fields.get("response"), str):
        fields = read_tags(fields["response"])
    call, card = fields.get(CALL, ""), fields.get("api_data")
    domain = (card if isinstance(card, dict) else fields).get(DOMAIN, "")
    if call in (None, NO_API):
        return Reference(row_id, None)
    if not isinstance(call, str) or not call:
        raise row.fault(f'needs "{CALL}", a call, or null where no API fits.')
    return Reference(row_id, call, str(domain))


def read_responses(path: Path, references: Sequence[Reference]) -> list[tuple[Reference, str]]:
    """Return the answers of a file with their references, joined by question_id, else by order.

    DataError for an id that has no reference or is there twice, and for counts that differ.
    """
    rows = read_raw_rows(open_data(path), None)
    by_id = {one.question_id: one for one in references}
    are_named = bool(rows) and all(ID in row.columns for row in rows)
    if not are_named and len(rows) != len(references):
        raise DataError(
            path,
            None,
            f"has {number_of(len(rows), 'answer')} to {number_of(len(references), 'reference')}; "
            f'give every row its "{ID}", or as many rows as references.',
        )
    joined: dict[str, tuple[Reference, str]] = {}
    for number, row in enumerate(rows):
        text = next((row.columns[name] for name in ANSWERS if name in row.columns), None)
        if not isinstance(text, str):
            raise row.fault('needs "text" (or "predict"), the answer.')
        name = str(row.columns[ID]) if are_named else references[number].question_id
        if name not in by_id or name in joined:
            fault = "is there twice" if name in joined else "is in no reference"
            raise row.fault(f"{ID} {name} {fault}.")
        joined[name] = by_id[name], text
    return list(joined.values())


def judge_all(answers: Sequence[tuple[Reference, str]], cards: Cards) -> list[JudgedRow]:
    """Judge every answer."""
    return [JudgedRow(one, text, judge(text, cards, one)) for one, text in answers]


def count(rows: Sequence[JudgedRow]) -> dict[str, dict[str, int]]:
    """Count what is measured: of the questions that an API fits, of the others, and reasons."""
    fitting = [row.verdict for row in rows if row.reference.api_call is not None]
    others = [row.verdict for row in rows if row.reference.api_call is None]
    reasons = Counter(row.verdict.reason for row in rows if row.verdict.reason is not None)
    return {
        "calls": {"rows": len(fitting)}
        | {name: sum(map(holds, fitting)) for name, (_, holds) in MEASURES.items()},
        "no_api": {"rows": len(others), "right": sum(one.reason is None for one in others)},
        "reasons": {name: reasons[name] for name in REASONS if reasons[name]},
    }


def table_lines(counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield the counts as lines for a terminal; the parse rate is with every accuracy."""
    calls, no_api = counts["calls"], counts["no_api"]
    if calls["rows"]:
        parsed = f"{calls['parsed'] / calls['rows']:.1%} parsed"
        yield f"{calls['rows']} answers to questions that an API fits:"
        for name, (words, _) in MEASURES.items():
            beside = "" if name in ("format", "parsed") else f"  ({parsed})"
            share = f"{calls[name] / calls['rows']:.1%}"
            yield f"  {name:<14}{calls[name]:>6} {share:>7}{beside}  {words}"
    if no_api["rows"]:
        rate = no_api["right"] / no_api["rows"]
        yield f"no API fits: {no_api['right']} of {no_api['rows']} without a call ({rate:.1%})"
    for name, number in counts["reasons"].items():
        yield f"  {name:<18}{number:>6}  {REASONS[name]}"


def write_details(path: Path, rows: Sequence[JudgedRow], cards: Cards) -> Path:
    """Write a line per row to `path`, and a page next to it; return the page's path."""
    shown = [_to_detail(row, cards) for row in rows]
    write_atomically(path, b"".join(map(to_line, shown)))
    groups: dict[str | None, list[dict[str, Any]]] = {reason: [] for reason in (*REASONS, None)}
    for one in shown:
        groups[one["reason"]].append(one)
    page = path.with_suffix(".html")
    text = render_page(
        Path(__file__).parent / "api_report.html.j2",
        counts=count(rows),
        measures={name: words for name, (words, _) in MEASURES.items()},
        reasons=REASONS,
        groups={name: group for name, group in groups.items() if group},
        limit=SHOWN_LENGTH,
    )
    write_atomically(page, text.encode("utf-8", "xmlcharrefreplace"))
    return page


def _to_detail(row: JudgedRow, cards: Cards) -> dict[str, Any]:
    reference, text, verdict = row
    return {
        ID: reference.question_id,
        "reason": verdict.reason,
        "reference": reference.api_call,
        "calls": [call.source for call in verdict.answer.calls],
        "cards": [cards[index].fields["api_name"] for index in verdict.matching],
        **{name: holds(verdict) for name, (_, holds) in MEASURES.items()},
        "text": text,
    }
