"""Evaluation: references and responses of every form, counts, and the page that shows the rows."""

import gzip
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ptuning.apicalls.cards import Cards, read_cards
from ptuning.apicalls.evaluation import (
    MEASURES,
    count,
    judge_all,
    read_references,
    read_responses,
    table_lines,
    write_details,
)
from ptuning.apicalls.pairs import DocumentSettings, pairs_of_cards, training_rows
from ptuning.apicalls.verdicts import REASONS, Reference
from ptuning.data.raw_file import DataError
from tests.apicalls.conftest import HUBS, find, read_lines
from tests.apicalls.test_verdicts import possible_call

WEATHER = "weather.get(city='Oslo', days=3)"
CARDS = [(WEATHER, "Weather"), ("weather.past(city='Oslo')", "Weather"), ("music.play(a=1)", "M")]
REFERENCES = [
    {"question_id": 7, "api_call": WEATHER, "domain": "Weather"},
    {"question_id": "b", "api_call": "music.play(a=1)", "domain": "M"},
    {"question_id": "c", "api_call": None},
]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as JSON lines."""

    def write_rows(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write_rows


@pytest.fixture
def cards(write_cards: Callable[..., Path]) -> Cards:
    return read_cards(write_cards(CARDS))


def refused(read: Callable[..., Any], path: Path, *arguments: Any) -> str:
    """Return what is said of a file, whose name and folder it begins with, after the folder."""
    with pytest.raises(DataError) as caught:
        read(path, *arguments)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(f"{path.parent}/")


def test_plain_references(write: Write) -> None:
    bare = {"api_call": "f(1)"}
    assert read_references(write([*REFERENCES, bare, {"api_call": "None"}])) == [
        Reference("7", WEATHER, "Weather"),
        Reference("b", "music.play(a=1)", "M"),
        Reference("c", None),
        Reference("4", "f(1)"),
        Reference("5", None),
    ]


@pytest.mark.parametrize("hub", HUBS)
def test_gorillas_references_have_their_line_as_id_and_their_cards_domain(
    hub: str, gorilla: Path
) -> None:
    path = find(gorilla, HUBS[hub][1])
    assert read_references(path) == [
        Reference(str(number), row["api_call"], row["api_data"]["domain"])
        for number, row in enumerate(read_lines(path), 1)
    ]


def test_prepared_rows_are_references_too(write_cards: Callable[..., Path], write: Write) -> None:
    cards = read_cards(write_cards(CARDS, questions=["What?"]))
    rows = training_rows(pairs_of_cards(cards), cards, DocumentSettings(None))
    rows[2]["response"] = "<<<domain>>>: None\n<<<api_call>>>: None"
    assert read_references(write(rows)) == [
        Reference("api:1", WEATHER, "Weather"),
        Reference("api:2", "weather.past(city='Oslo')", "Weather"),
        Reference("api:3", None),
    ]


def bfcl(shared: Path, kind: str) -> tuple[Path, Path]:
    """Return the file of functions, and that of references."""
    functions = shared / "data" / "bfcl" / f"BFCL_v4_{kind}.json.gz"
    possible = functions.with_name(f"possible_answer_{functions.name}")
    return functions, possible if possible.exists() else functions


@pytest.mark.parametrize(("kind", "number"), [("simple_python", 400), ("multiple", 200)])
def test_bfcls_possible_answers_are_all_right(
    kind: str, number: int, shared: Path, write: Write
) -> None:
    functions, possible = bfcl(shared, kind)
    references = read_references(possible)
    rows = [{"question_id": one.question_id, "text": possible_call(one)} for one in references]
    answers = read_responses(write(rows[::-1]), references)
    counts = count(judge_all(answers, read_cards(functions, "generic")))
    right = dict.fromkeys(MEASURES, number) | {"format": 0, "hallucination": 0, "error": 0}
    assert counts == {
        "calls": {"rows": number, **right},
        "no_api": {"rows": 0, "right": 0},
        "reasons": {},
    }


def test_bfcls_irrelevant_questions_are_counted_apart(shared: Path, write: Write) -> None:
    functions, path = bfcl(shared, "irrelevance")
    references = read_references(path)
    assert {one.api_call for one in references} == {None}
    rows = [{"text": "f(1)" if number < 3 else "No function fits."} for number in range(240)]
    rows_judged = judge_all(read_responses(write(rows), references), read_cards(functions))
    counts = count(rows_judged)
    assert counts["no_api"] == {"rows": 240, "right": 237}
    assert set(counts["calls"].values()) == {0}
    assert counts["reasons"] == {"unneeded_call": 3}
    assert list(table_lines(counts)) == [
        "no API fits: 237 of 240 without a call (98.8%)",
        f"  unneeded_call          3  {REASONS['unneeded_call']}",
    ]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"domain": "x"}, 'needs "api_call", a call, or null where no API fits.'),
        ({"api_call": ""}, 'needs "api_call", a call, or null where no API fits.'),
        ({"api_call": 3}, 'needs "api_call", a call, or null where no API fits.'),
        ({"response": "hello"}, 'needs "api_call", a call, or null where no API fits.'),
        *(
            ({"ground_truth": truth}, "ground_truth needs a single call: [{name: {argument: []}}].")
            for truth in ([], "f", 3, [{"f": {}}, {"g": {}}], [{"f": 3}], [{"f": {"a": 3}}])
        ),
        ({"question_id": 7, "api_call": "f()"}, "question_id 7 is there twice."),
        ({"question_id": "7", "api_call": "f()"}, "question_id 7 is there twice."),
    ],
)
def test_a_reference_that_is_none_is_named_with_its_line(
    row: Any, fault: str, write: Write
) -> None:
    path = write([REFERENCES[0], row, REFERENCES[1]])
    assert refused(read_references, path) == f"rows.jsonl:2: {fault}"


def test_a_card_that_is_no_object_leaves_the_rows_own_domain(write: Write) -> None:
    row = {"api_call": "f()", "api_data": "f", "domain": "D"}
    assert read_references(write([row])) == [Reference("1", "f()", "D")]


def test_a_file_without_references_is_refused(write: Write) -> None:
    assert refused(read_references, write([])).startswith("rows.jsonl: no rows; write one JSON")


def texts(answers: list[tuple[Reference, str]]) -> dict[str, str]:
    return {reference.question_id: text for reference, text in answers}


def test_responses_are_joined_by_id_in_any_order(write: Write) -> None:
    references = read_references(write(REFERENCES))
    rows = [{"question_id": "c", "text": "C"}, {"question_id": 7, "text": "A", "predict": "no"}]
    assert texts(read_responses(write(rows), references)) == {"c": "C", "7": "A"}


def test_responses_without_ids_are_joined_by_order(write: Write) -> None:
    references = read_references(write(REFERENCES))
    rows = [{"labels": "x", "predict": text} for text in "ABC"]
    path = write(rows, "generated_predictions.txt")
    assert texts(read_responses(path, references)) == {"7": "A", "b": "B", "c": "C"}
    rows = [{"question_id": "c", "text": "A"}, {"text": "B"}, {"text": "C"}]  # one id is not enough
    assert texts(read_responses(write(rows), references)) == {"7": "A", "b": "B", "c": "C"}


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (
            [{"text": "a"}, {"text": "b"}],
            'rows.jsonl: has 2 answers to 3 references; give every row its "question_id", or as '
            "many rows as references.",
        ),
        (
            [{"text": "a"}, {"text": "b"}, {"question_id": 7, "text": "c"}, {"text": "d"}],
            'rows.jsonl: has 4 answers to 3 references; give every row its "question_id", or as '
            "many rows as references.",
        ),
        (
            [{"question_id": 7, "text": "a"}, {"question_id": "z", "text": "b"}],
            "rows.jsonl:2: question_id z is in no reference.",
        ),
        (
            [{"question_id": 7, "text": "a"}, {"question_id": "7", "text": "b"}],
            "rows.jsonl:2: question_id 7 is there twice.",
        ),
        *(
            (
                [{"question_id": 7, "text": "a"}, {"question_id": "b", **answer}],
                'rows.jsonl:2: needs "text" (or "predict"), the answer.',
            )
            for answer in ({}, {"text": None}, {"predict": ["x"]}, {"answer": "x"})
        ),
    ],
)
def test_a_response_that_is_none_is_named_with_its_line(
    rows: list[Any], fault: str, write: Write
) -> None:
    references = read_references(write(REFERENCES))
    assert refused(read_responses, write(rows), references) == fault


def test_the_counts_of_the_published_answers(
    gorilla: Path, hubs: dict[str, Cards], apicall: Any
) -> None:
    assert len(apicall["published_answers"]) == 7
    for name, expected in apicall["published_answers"].items():
        hub = name.split("_")[1]
        references = read_references(find(gorilla, HUBS[hub][1]))
        answers = read_responses(find(gorilla, name), references)
        counts = count(judge_all(answers, hubs[hub]))
        calls = counts["calls"]
        assert expected["counts"] == {
            "rows": len(answers),
            "format_miss": calls["rows"] - calls["format"],
            "parsed": calls["parsed"],
            "hallucinated": calls["hallucination"],
            "domain_first": calls["domain_first"],
            "domain_any": calls["domain_any"],
            "api_correct": calls["right_api"],
        }, name
        assert calls["hallucination"] + calls["error"] + calls["right_api"] == calls["rows"]
        assert sum(counts["reasons"].values()) == calls["rows"] - calls["right_api"], name


ANSWERS = [
    f"<<<api_call>>>: {WEATHER}",
    "weather.get(city='Oslo', days=4)",
    "weather.past(city='Oslo')",
    "weather.past(city='Oslo'); weather.got()",
    "rain.get()",
    "",
]


def judged(texts: list[str], cards: Cards, call: str | None = WEATHER) -> list[Any]:
    references = [Reference(str(n), call, "Weather") for n in range(1, len(texts) + 1)]
    return judge_all(list(zip(references, texts, strict=True)), cards)


def test_what_is_counted(cards: Cards) -> None:
    rows = judged(ANSWERS, cards) + judged(["none fits", "f()", WEATHER], cards, None)
    assert count(rows) == {
        "calls": {
            **{"rows": 6, "format": 1, "parsed": 5, "hallucination": 2, "error": 2},
            **{"domain_first": 4, "domain_any": 4, "right_api": 2, "arguments": 1},
        },
        "no_api": {"rows": 3, "right": 1},
        "reasons": {
            **{"no_call": 1, "unknown_callee": 1, "wrong_api": 2, "wrong_argument": 1},
            "unneeded_call": 2,
        },
    }
    assert list(count(rows)["reasons"]) == [
        name for name in REASONS if name in count(rows)["reasons"]
    ]


def test_the_table_has_the_parse_rate_beside_every_accuracy(cards: Cards) -> None:
    rows = judged(ANSWERS, cards) + judged(["none fits", "f()"], cards, None)
    words = {name: text for name, (text, _) in MEASURES.items()}
    beside = "(83.3% parsed)"
    assert list(table_lines(count(rows))) == [
        "6 answers to questions that an API fits:",
        f"  format             1   16.7%  {words['format']}",
        f"  parsed             5   83.3%  {words['parsed']}",
        f"  hallucination      2   33.3%  {beside}  {words['hallucination']}",
        f"  error              2   33.3%  {beside}  {words['error']}",
        f"  domain_first       4   66.7%  {beside}  {words['domain_first']}",
        f"  domain_any         4   66.7%  {beside}  {words['domain_any']}",
        f"  right_api          2   33.3%  {beside}  {words['right_api']}",
        f"  arguments          1   16.7%  {beside}  {words['arguments']}",
        "no API fits: 1 of 2 without a call (50.0%)",
        f"  no_call                1  {REASONS['no_call']}",
        f"  unknown_callee         1  {REASONS['unknown_callee']}",
        f"  wrong_api              2  {REASONS['wrong_api']}",
        f"  wrong_argument         1  {REASONS['wrong_argument']}",
        f"  unneeded_call          1  {REASONS['unneeded_call']}",
    ]


class Page(HTMLParser):
    """The elements of a page, its table rows as texts of their cells, and its summaries."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.summaries: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        elif tag == "summary":
            self.summaries.append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data
        if self.summaries:
            self.summaries[-1] += data
        self.words += data


def page_of(rows: list[Any], cards: Cards, path: Path) -> tuple[str, Page]:
    page = write_details(path, rows, cards)
    assert page == path.with_suffix(".html")
    text = page.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_details_are_a_line_for_each_row(cards: Cards, tmp_path: Path) -> None:
    rows = judged(ANSWERS, cards) + judged(["f()"], cards, None)
    write_details(tmp_path / "out.jsonl", rows, cards)
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["text"] for line in lines] == [*ANSWERS, "f()"]
    assert lines[0] == {
        **{"question_id": "1", "reason": None, "reference": WEATHER, "calls": [WEATHER]},
        **{"cards": ["api-0"], "format": True, "parsed": True, "hallucination": False},
        **{"error": False, "domain_first": True, "domain_any": True, "right_api": True},
        **{"arguments": True, "text": ANSWERS[0]},
    }
    assert [line["reason"] for line in lines[1:]] == [
        *("wrong_argument", "wrong_api", "wrong_api", "unknown_callee", "no_call"),
        "unneeded_call",
    ]
    assert lines[3]["calls"] == ["weather.past(city='Oslo')", "weather.got()"]
    assert lines[6]["reference"] is None


def test_the_page_groups_the_rows_by_reason_with_reference_and_answer_side_by_side(
    cards: Cards, tmp_path: Path
) -> None:
    rows = judged(ANSWERS, cards) + judged(["f()"], cards, None)
    _, page = page_of(rows, cards, tmp_path / "out.jsonl")
    groups = [text.split("\n")[0] for text in page.summaries if text[0] in "✗✓"]
    assert groups == [
        f"✗ no_call {REASONS['no_call']} (1)",
        f"✗ unknown_callee {REASONS['unknown_callee']} (1)",
        f"✗ wrong_api {REASONS['wrong_api']} (2)",
        f"✗ wrong_argument {REASONS['wrong_argument']} (1)",
        f"✗ unneeded_call {REASONS['unneeded_call']} (1)",
        "✓ 正确 right (1)",
    ]
    shown = {row[0]: row[1:] for row in page.rows if len(row) == 3}
    assert shown["2"][0].strip() == WEATHER
    assert shown["2"][1].startswith("weather.get(city='Oslo', days=4)")
    assert "7 条回答 answers" in page.words
    assert "parse rate: 83.3 %" in page.words
    assert "no call where no API fits: 0 / 1" in page.words


def test_the_page_has_every_reason_there_is(cards: Cards, tmp_path: Path) -> None:
    (row,) = judged([""], cards)
    rows = [row._replace(verdict=row.verdict._replace(reason=reason)) for reason in REASONS]
    _, page = page_of(rows, cards, tmp_path / "out.jsonl")
    heads = [text.split()[1] for text in page.summaries if text.startswith("✗")]
    assert heads == list(REASONS)


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)></pre>{{ 7*7 }}&lt;"


def test_markup_in_answers_references_and_ids_is_text_on_the_page(
    write_cards: Callable[..., Path], tmp_path: Path
) -> None:
    call = f"f(a={HOSTILE!r})"
    cards = read_cards(write_cards([(call, "D")], api_name=HOSTILE))
    rows = judge_all([(Reference(HOSTILE, call, "D"), f"{call} {HOSTILE}")], cards)
    text, page = page_of(rows, cards, tmp_path / "out.jsonl")
    assert "<script" not in text
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "link", "a", "base"}
    assert page.words.count(HOSTILE) == 6  # id, reference, call, card, twice in the answer
    names = {name for _, attributes in page.tags for name in attributes}
    assert names == {"lang", "charset", "name", "content", "http-equiv", "class", "style", "open"}


def test_the_page_needs_nothing_from_outside(cards: Cards, tmp_path: Path) -> None:
    text, page = page_of(judged(ANSWERS, cards), cards, tmp_path / "out.jsonl")
    assert not re.search(r"https?:|//|url\(|@import|\bsrc=|\bhref=", text)
    policies = [one["content"] for _, one in page.tags if "http-equiv" in one]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_a_long_answer_is_cut_on_the_page_alone(cards: Cards, tmp_path: Path) -> None:
    answer = WEATHER + "x" * 5000 + "end"
    text, _ = page_of(judged([answer], cards), cards, tmp_path / "out.jsonl")
    assert "x…" in text
    assert "xend" not in text
    assert read_lines(tmp_path / "out.jsonl")[0]["text"] == answer


@pytest.mark.parametrize("answer", [f"{WEATHER} \ud800", "weather.get('\ud800')", r"f('\ud800')"])
def test_half_a_surrogate_pair_is_kept_in_the_lines_and_does_not_stop_the_page(
    answer: str, cards: Cards, tmp_path: Path, write: Write
) -> None:
    references = read_references(write(REFERENCES[:1]))
    answers = read_responses(write([{"text": answer}]), references)
    rows = judge_all(answers, cards)
    text, _ = page_of(rows, cards, tmp_path / "out.jsonl")
    assert "ud800" in text or "&#55296;" in text
    assert read_lines(tmp_path / "out.jsonl")[0]["text"] == answer


def test_packed_files_are_read(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "packed.jsonl.gz"
    path.write_bytes(gzip.compress(write(REFERENCES).read_bytes()))
    assert [one.question_id for one in read_references(path)] == ["7", "b", "c"]
