"""New questions for API cards: what is asked, kept and dropped, and how a run is continued."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ptuning.apicalls.cards import Cards, read_cards
from ptuning.apicalls.pairs import read_pairs
from ptuning.apicalls.writing import MAX_IDLE, CardWriter
from ptuning.completions.source import Ask, Completion
from ptuning.instruct.collect import Settings, Tally, journal_of
from tests.completions.scripted import ScriptedSource, completed, sentence

TITLE = "shop.load(repo='songmu/title', size=4)"
POEM = "shop.load(repo='songmu/poem', size=9)"
WEATHER = "sky.forecast_of(city='Oslo')"
CARDS: list[dict[str, Any]] = [
    {
        "api_name": "title_v2",
        "api_call": TITLE,
        "domain": "Text",
        "description": "Writes a headline.",
        "identify": ["repo"],
        "questions": ["Please write a headline about my cat."],
    },
    {
        "api_name": "poem",
        "api_call": POEM,
        "domain": "Text",
        "description": "Writes a poem.",
        "identify": ["repo"],
    },
    {
        "api_name": "weather",
        "api_call": WEATHER,
        "domain": "Weather",
        "description": "Tells whether it will rain.",
        "questions": ["Will it rain today in Oslo?", "Do I need an umbrella in Bergen?"],
    },
]
CALLS = [card["api_call"] for card in CARDS]
Pairs = list[tuple[str, str]]


@pytest.fixture
def cards(write_cards: Callable[..., Path]) -> Cards:
    return read_cards(write_cards(CARDS))


def completion_of(pairs: Pairs) -> Completion:
    """Return a completion that continues the label "Request:"."""
    texts = (f" {question}\n1. Call: {call}\n" for question, call in pairs)
    return completed("###\n1. Request:".join(texts))


def new_pairs(ask: Ask, index: int) -> Pairs:
    """Invent two questions about a card."""
    words = Random(f"{ask.prompt}\n{ask.seed}")
    return [(f"Explain {sentence(words, 6)}.", CALLS[index]) for _ in range(2)]


def source_of(answer: Callable[[Ask, int], Pairs] = new_pairs, **options: Any) -> ScriptedSource:
    """Return a source whose answer is made of the prompt and the index of its card."""
    return ScriptedSource(
        lambda ask: completion_of(answer(ask, ask.request % len(CARDS))), **options
    )


def saying(question: str, call: str = TITLE) -> ScriptedSource:
    """Return a source that gives the first card one pair, and the others new ones."""
    return source_of(lambda ask, index: new_pairs(ask, index) if index else [(question, call)])


def write(
    cards: Cards, out: Path, source: ScriptedSource, per_card: int = 4, language: str = "en"
) -> tuple[CardWriter, Tally]:
    settings = Settings(
        template=f"api.{language}",
        examples=0,
        machine_examples=3,
        topics=[card.document for card in cards],
        blocklist=(),
    )
    writer = CardWriter(settings, cards, per_card, source, out)
    return writer, writer.collect(per_card * len(cards))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def shown_in(prompt: str) -> list[str]:
    """Return the questions that a prompt shows."""
    lines = prompt.splitlines()
    return [line.split("Request: ")[1] for line in lines if "Request: " in line]


def test_each_card_gets_its_number_of_questions_with_its_call(cards: Cards, tmp_path: Path) -> None:
    out = tmp_path / "new.jsonl"
    writer, tally = write(cards, out, source_of(), per_card=5)
    rows = rows_of(out)
    assert Counter(row["response"] for row in rows) == dict.fromkeys(CALLS, 5)
    assert writer.kept == {0: 5, 1: 5, 2: 5}
    assert (tally.kept, tally.requests, tally.ended, tally.dropped) == (15, 9, "", {})
    assert tally.made == 15  # what comes after the fifth is not read
    for row in rows:
        assert row["response"] == CALLS[row["meta"]["request"] % len(cards)]
        assert row["source"] == "generate:api.en"


def test_the_rows_are_pairs_of_their_cards(cards: Cards, tmp_path: Path) -> None:
    out = tmp_path / "new.jsonl"
    write(cards, out, source_of())
    pairs, left_out = read_pairs(out, cards)
    assert [pair.card for pair in pairs] == [CALLS.index(row["response"]) for row in rows_of(out)]
    assert [pair.question for pair in pairs] == [row["prompt"] for row in rows_of(out)]
    assert left_out == []


def test_a_prompt_holds_the_document_and_the_questions_of_its_card_alone(
    cards: Cards, tmp_path: Path
) -> None:
    out, source = tmp_path / "new.jsonl", source_of()
    write(cards, out, source, per_card=8)
    kept: defaultdict[int, list[str]] = defaultdict(list)
    for row in rows_of(out):
        kept[row["meta"]["request"]].append(row["prompt"])
    for wave in source.waves:
        assert [ask.request % len(cards) for ask in wave] == [0, 1, 2]  # cards take turns
        for ask in wave:
            index, earlier = (
                ask.request % len(cards),
                range(ask.request % len(cards), ask.request, 3),
            )
            assert [card.document in ask.prompt for card in cards] == [n == index for n in range(3)]
            given = [one.rstrip(":") for one in CARDS[index].get("questions", [])]
            own = [*given, *(question for n in earlier for question in kept[n])]
            shown = shown_in(ask.prompt)
            assert set(shown) <= set(own)
            assert len(shown) == len(set(shown)) == min(len(own), 3)
            assert ask.prompt.count(f"Call: \n{CALLS[index]}\n") == len(shown)
    assert [ask.request for ask in source.asks] == list(range(12))


@pytest.mark.parametrize(
    "question",
    [
        "Could title_v2 write me a headline?",
        "Could TITLE_V2, please, write me a headline?",
        "Could you call shop.load for my headline?",
        "Could songmu/title write me a headline?",
    ],
)
def test_a_question_that_names_the_api_is_dropped(
    question: str, cards: Cards, tmp_path: Path
) -> None:
    writer, tally = write(cards, tmp_path / "new.jsonl", saying(question))
    assert tally.dropped == {"blocked_word": MAX_IDLE}
    assert writer.kept == {1: 4, 2: 4}


@pytest.mark.parametrize(
    "question",
    [
        "Could you load me a good title for this shop?",  # parts of the names are plain words
        "Could sky.forecast_of write me a headline about songmu?",  # another card's
    ],
)
def test_plain_words_and_names_of_other_cards_are_kept(
    question: str, cards: Cards, tmp_path: Path
) -> None:
    writer, tally = write(cards, tmp_path / "new.jsonl", saying(question), per_card=1)
    assert (writer.kept[0], tally.dropped) == (1, {})


@pytest.mark.parametrize(
    ("question", "call", "reason"),
    [
        ("Explain the ways of my cat.", POEM, "not_its_call"),
        ("Explain the ways of my cat.", TITLE.replace("title", "title2"), "not_its_call"),
        ("Explain the ways of my cat.", "a headline", "not_its_call"),
        ("Could title_v2 write me a headline?", POEM, "not_its_call"),
        ("A headline", TITLE, "too_short"),
        ("给我的猫写一个好标题，谢谢你", TITLE, "wrong_language"),
        ("Please write a headline about my cat.", TITLE, "duplicate"),  # of the card itself
        ("Will it rain today in Oslo?", TITLE, "duplicate"),  # of another card
        ("Explain the ways of my cat.", "", "empty_output"),
    ],
)
def test_other_faults_have_their_names(
    question: str, call: str, reason: str, cards: Cards, tmp_path: Path
) -> None:
    writer, tally = write(cards, tmp_path / "new.jsonl", saying(question, call))
    assert tally.dropped == {reason: MAX_IDLE}
    assert writer.kept == {1: 4, 2: 4}


def test_a_call_with_other_values_of_free_arguments_is_kept_as_it_is(
    cards: Cards, tmp_path: Path
) -> None:
    out, call = tmp_path / "new.jsonl", "shop.load(size=7, repo='songmu/title')"
    write(cards, out, saying("Explain the ways of my cat.", call), per_card=1)
    assert call in [row["response"] for row in rows_of(out)]


def test_chinese_questions_have_calls_too(cards: Cards, tmp_path: Path) -> None:
    questions = ["给我的猫写一个好标题", "为这篇关于大海的文章想个名字"]
    source = ScriptedSource(
        lambda ask: completed(
            f"{questions[0]}\n1. 调用：\n{TITLE}\n###\n2. 请求：{questions[1]}\n2. 调用：{TITLE}"
            if ask.request % 3 == 0
            else ""
        )
    )
    writer, _ = write(cards, tmp_path / "new.jsonl", source, per_card=2, language="zh")
    assert [row["prompt"] for row in rows_of(tmp_path / "new.jsonl")] == questions
    assert writer.kept == {0: 2}
    assert source.asks[0].prompt.endswith("\n2. 请求：")


def test_a_card_that_gets_nothing_is_given_up_while_others_finish(
    cards: Cards, tmp_path: Path
) -> None:
    source = source_of(lambda ask, index: [] if index == 1 else new_pairs(ask, index))
    writer, tally = write(cards, tmp_path / "new.jsonl", source, per_card=24)
    assert writer.kept == {0: 24, 2: 24}
    assert Counter(ask.request % 3 for ask in source.asks) == {0: 12, 1: MAX_IDLE, 2: 12}
    assert (tally.kept, bool(tally.ended)) == (48, True)


def test_a_question_now_and_then_keeps_a_card_in_work(cards: Cards, tmp_path: Path) -> None:
    def seldom(ask: Ask, index: int) -> Pairs:
        turn = ask.request // len(CARDS) + 1
        return [] if index == 1 and turn % MAX_IDLE else new_pairs(ask, index)

    source = source_of(seldom)
    writer, _ = write(cards, tmp_path / "new.jsonl", source)
    assert writer.kept == {0: 4, 1: 4, 2: 4}
    assert Counter(ask.request % 3 for ask in source.asks) == {0: 2, 1: 2 * MAX_IDLE, 2: 2}


def test_a_card_without_a_call_is_never_asked_about(
    write_cards: Callable[..., Path], tmp_path: Path
) -> None:
    given = [CARDS[0], CARDS[1] | {"api_call": "see the manual", "identify": []}, CARDS[2]]
    source = source_of()
    writer, tally = write(read_cards(write_cards(given)), tmp_path / "new.jsonl", source)
    assert {ask.request % 3 for ask in source.asks} == {0, 2}
    assert writer.kept == {0: 4, 2: 4}
    assert tally.ended


def uneven(ask: Ask, index: int) -> Pairs:
    """Break a rule every now and then."""
    faults = [[("Too short", CALLS[index])], [], [("Explain it to my cat.", "f()")]]
    return Random(ask.seed).choice([*faults, new_pairs(ask, index), new_pairs(ask, index)])


@pytest.mark.parametrize("repeats", [False, True])
def test_an_interrupted_run_ends_as_one_that_was_not(
    repeats: bool, cards: Cards, tmp_path: Path
) -> None:
    out, whole = tmp_path / "new.jsonl", source_of(uneven)
    _, wanted = write(cards, out, whole, per_card=6)
    rows, journal = out.read_bytes(), journal_of(out).read_bytes()
    report = out.with_suffix(".report.json").read_bytes()
    assert wanted.dropped.keys() > {"too_short", "not_its_call"}
    places = Random(1)
    for _ in range(10):
        at = places.randrange(len(journal))
        journal_of(out).write_bytes(journal[:at])
        out.write_bytes(rows[: places.randrange(len(rows))])
        source = source_of(uneven, repeats=repeats)
        write(cards, out, source, per_card=6)
        assert out.read_bytes() == rows
        assert out.with_suffix(".report.json").read_bytes() == report
        missing = len(whole.asks) - max(journal[:at].count(b"\n") - 1, 0)
        assert missing <= len(source.asks) <= missing + (2 if repeats else 0)


def test_the_same_command_again_asks_for_nothing(cards: Cards, tmp_path: Path) -> None:
    out, source = tmp_path / "new.jsonl", source_of(uneven)
    write(cards, out, source_of(uneven))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    writer, _ = write(cards, out, source)
    assert source.asks == []
    assert writer.kept == {0: 4, 1: 4, 2: 4}
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_larger_number_for_each_card_continues(cards: Cards, tmp_path: Path) -> None:
    out, first, second = tmp_path / "new.jsonl", source_of(), source_of()
    write(cards, out, first, per_card=3)
    before = rows_of(out)
    writer, _ = write(cards, out, second, per_card=7)
    rows = rows_of(out)
    assert writer.kept == {0: 7, 1: 7, 2: 7}
    names = ("id", "prompt", "response")  # what is most similar may be another row now
    texts = [[row[name] for name in names] for row in rows]
    assert all([row[name] for name in names] in texts for row in before)
    requests = [ask.request for source in (first, second) for ask in source.asks]
    assert sorted(requests) == list(range(len(requests)))  # none twice
    assert second.asks


def test_other_cards_are_another_run(
    cards: Cards, write_cards: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "new.jsonl"
    write(cards, out, source_of())
    other = CARDS[0] | {"description": "Writes a limerick."}
    with pytest.raises(ValueError, match="is of a run with other settings"):
        write(read_cards(write_cards([other, *CARDS[1:]])), out, source_of())
