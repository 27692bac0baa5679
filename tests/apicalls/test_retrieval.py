"""Retrieval: our words and fields, and the documents of Gorilla's published questions."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ptuning.apicalls.cards import Card, read_cards
from ptuning.apicalls.retrieval import PublishedRetriever, Retriever

HUBS = {  # name: card file, questions whose published document is our best
    "torchhub": ("torchhub_api.jsonl", 186),
    "huggingface": ("huggingface_api.jsonl.gz", 894),
    "tensorflowhub": ("tensorflowhub_api.jsonl.gz", 685),
}


def card(**fields: Any) -> Card:
    named = {"api_name": "x", "api_call": "x()", "domain": "", "description": ""} | fields
    return Card(named, None, (), frozenset(), False)


CARDS = [
    card(domain="Weather", api_name="sky/forecast-v2", description="The forecast for a city."),
    card(domain="Vision", functionality="Image classification", api_name="resnet50"),
    card(domain="天气", api_name="tianqi", description="查询城市的天气预报"),
    card(domain="Vision", functionality="Image classification", api_name="resnet50"),
    card(domain="Music", description=None, api_name="play.song"),
]


@pytest.mark.parametrize(
    ("question", "best"),
    [
        ("Which API gives me the FORECAST?", 0),  # by description, whatever the case
        ("something like forecast-v2, please", 0),  # by a part of the name
        ("classify this image", 1),  # by the first letters of "classification"
        ("我想知道明天的天气", 2),  # by a word of jieba's
        ("play a song", 4),
    ],
)
def test_a_question_finds_the_card_that_shares_its_words(question: str, best: int) -> None:
    assert Retriever(CARDS).ranked(question, 1) == [best]


def test_equal_cards_come_in_file_order_and_k_may_exceed_their_number() -> None:
    retriever = Retriever(CARDS)
    assert retriever.ranked("Image classification", 99)[:2] == [1, 3]
    assert sorted(retriever.ranked("Image classification", 99)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("question", ["", "zzz", "Please give me an API that can", "请帮我", "?!"])
def test_a_question_without_a_known_word_gets_the_cards_in_file_order(question: str) -> None:
    assert Retriever(CARDS).ranked(question, 3) == [0, 1, 2]


def test_cards_without_any_word_are_ranked_too() -> None:
    assert Retriever([card(api_name="the")]).ranked("weather", 5) == [0]


def test_indexing_is_silent_whatever_the_log_level(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        Retriever(CARDS).ranked("weather", 1)
    assert [one for one in caplog.records if one.name.startswith("bm25s")] == []
    assert capfd.readouterr().err == ""


def test_the_published_okapi_scores_words_as_they_are_cut_by_spaces() -> None:
    retriever = PublishedRetriever(CARDS)
    assert retriever.ranked("an 'resnet50', x", 2) == [1, 3]
    assert retriever.ranked("resnet50", 2) == [0, 1]  # no word of a card: quotes and commas count


def read_lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("hub", HUBS)
def test_the_published_documents_are_found_again(hub: str, shared: Path, golden: Path) -> None:
    expected = json.loads((golden / "apicall.json").read_text(encoding="utf-8"))["bm25"][hub]
    folder = shared / "data" / "gorilla"
    file, num_equal = HUBS[hub]
    cards = read_cards(folder / file)
    retriever = PublishedRetriever(cards)
    questions = read_lines(folder / f"questions_{hub}_0_shot.jsonl")
    published = read_lines(folder / f"questions_{hub}_bm25.jsonl.gz")
    best = [retriever.ranked(one["text"], 1)[0] for one in questions]
    ties = {int(question_id): tied for question_id, tied in expected["tied"].items()}
    equal = 0
    for question, found, top, row in zip(questions, best, expected["top1"], published, strict=True):
        allowed = ties.get(question["question_id"], [top])
        assert found in allowed
        names = ("domain", "api_name", "description")
        equal += any(
            all(repr(cards[index].fields[name]) in unescaped(row["text"]) for name in names)
            for index in allowed
        )
    assert equal == num_equal == expected["equal_to_published_card"]


def unescaped(text: str) -> str:
    return text.replace("\\'", "'").replace("\\\\", "\\")
