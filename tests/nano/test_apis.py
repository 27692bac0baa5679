"""Invented API documents are cards, and every answer is copied from the right one."""

import json
from random import Random

import pytest

from ptuning.apicalls.cards import DOCUMENT, REQUIRED, card_call
from ptuning.apicalls.pairs import HEADINGS
from ptuning.nano.apis import (
    NONE_FITS,
    ask_documents,
    draw_topic,
    write_document,
)

Prompt = tuple[str, list[dict[str, str]], str]  # question, documents, answer


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [read_prompt(*ask_documents(Random(seed))) for seed in range(2_000)]


def read_prompt(prompt: str, answer: str) -> Prompt:
    question, *lines = prompt.split("\n")
    assert not lines or lines[0] in HEADINGS.values()
    return question, [json.loads(line) for line in lines[1:]], answer


def test_the_same_seed_asks_the_same():
    assert ask_documents(Random(5)) == ask_documents(Random(5))
    assert ask_documents(Random(5)) != ask_documents(Random(6))


def test_documents_are_cards_in_the_order_of_prompts():
    for seed in range(300):
        topic = draw_topic(Random(seed), is_english=seed % 2 == 0)
        document = write_document(topic, Random(seed))
        assert list(document) == [name for name in DOCUMENT if name in document]
        assert set(REQUIRED) <= set(document)
        call = card_call(str(document["api_call"]))
        assert call is not None
        assert call.callee == document["api_name"]


def test_answers_are_copied_from_the_document_whose_topic_is_asked_for(prompts):
    for question, documents, answer in prompts:
        if answer == NONE_FITS or question.startswith("照抄："):
            continue
        named = [document for document in documents if document["domain"] in question]
        right = max(named, key=lambda document: len(document["domain"]))  # "mall" is in "small"
        for line in answer.split("\n"):
            name, _, value = line.partition(": ")
            if name in right:
                assert value == right[name]
            else:
                assert [name for name in right if str(right[name]) in line]


def test_no_topic_of_a_document_is_asked_for_where_none_fits(prompts):
    without = [
        (question, documents) for question, documents, answer in prompts if answer == NONE_FITS
    ]
    assert [documents for _, documents in without if not documents]
    assert [documents for _, documents in without if documents]
    for question, documents in without:
        assert not [document for document in documents if document["domain"] in question]


def test_prompts_show_up_to_three_documents(prompts):
    assert {len(documents) for _, documents, _ in prompts} == {0, 1, 2, 3}


def test_names_are_too_many_to_be_known(prompts):
    calls = [document["api_call"] for _, documents, _ in prompts for document in documents]
    assert len(set(calls)) > 0.98 * len(calls)
