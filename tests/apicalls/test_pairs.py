"""Questions with their calls: read from every form, and written as rows with documents."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.apicalls.calls import find_calls
from ptuning.apicalls.cards import Card, Cards, card_call, read_cards
from ptuning.apicalls.pairs import (
    BM25,
    CALL,
    HEADINGS,
    ORACLE,
    TAGS,
    ApiPair,
    DocumentSettings,
    compat_rows,
    identifying_texts,
    pairs_of_cards,
    published_prompt,
    read_pairs,
    read_tags,
    to_prompt,
    training_rows,
    write_tags,
)
from ptuning.apicalls.retrieval import PublishedRetriever, Retriever
from ptuning.data.conversion import ContractRow
from ptuning.data.raw_file import DataError
from tests.apicalls.conftest import HUBS, find, read_lines

TITLE = "shop.load(repo='songmu/title-v2', model='title_small')"
CARDS: list[dict[str, Any]] = [
    {
        "api_name": "title",
        "api_call": TITLE,
        "domain": "Text",
        "framework": "SongMu",
        "description": "Writes a headline for an article.",
        "questions": ["Find a headline.", "写一个标题"],
    },
    {
        "api_name": "poem",
        "api_call": "shop.load(repo='songmu/poem-v1', model='poem_large')",
        "domain": "Text",
        "description": "Writes a poem about an article.",
        "questions": ["Rhyme about the sea."],
    },
    {
        "api_name": "weather",
        "api_call": "shop.load(repo='acme/sky-3', model='daily', days=7)",
        "domain": "Weather",
        "description": "Tells whether it will rain.",
    },
    {
        "api_name": "traffic",
        "api_call": "shop.load(repo='acme/road-9', model='jam_now')",
        "domain": "Traffic",
        "description": "Tells how long a drive takes.",
    },
]
ANSWER = {
    "domain": "Text",
    "api_call": TITLE,
    "api_provider": "SongMu",
    "explanation": "1. Load it.\n2. Ask it.",
    "code": "import shop\nmodel = shop.load(repo='songmu/title-v2', model='title_small')",
}
IN_LINES = "\n".join(f"<<<{name}>>>: {value}" for name, value in ANSWER.items())
IN_ONE_LINE = ", ".join(f"<<<{name}>>>: {value}" for name, value in ANSWER.items())
PSEUDO = "{" + ", ".join(f"'{name}': '{value}'" for name, value in ANSWER.items()) + "}"


@pytest.fixture
def cards(tmp_path: Path) -> Cards:
    return to_cards(tmp_path, CARDS)


def to_cards(folder: Path, given: Sequence[dict[str, Any]]) -> Cards:
    path = folder / "cards.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    return read_cards(path)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: dict[str, Any]) -> Path:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def published(code: str, card: dict[str, Any] = CARDS[0]) -> dict[str, Any]:
    return {"code": code, "api_call": card["api_call"], "provider": "SongMu", "api_data": card}


def asked(question: str, response: str) -> dict[str, Any]:
    return {"prompt": question, "response": response}


def documents_of(row: ContractRow) -> list[dict[str, Any]]:
    """Return what the lines after the heading of a prompt hold."""
    _, _, documents = row["prompt"].partition(f"\n{HEADINGS['en']}\n")
    return [json.loads(line) for line in documents.splitlines()]


def many_pairs(number: int = 400) -> list[ApiPair]:
    """Return pairs about all cards in turn."""
    return [
        ApiPair(f"Question number {n}", {CALL: CARDS[n % 4]["api_call"]}, n % 4)
        for n in range(number)
    ]


def rows_of(cards: Cards, pairs: Sequence[ApiPair], **settings: Any) -> list[ContractRow]:
    return training_rows(pairs, cards, DocumentSettings(**{"retriever": ORACLE} | settings))


def shows_right(row: ContractRow, pair: ApiPair) -> bool:
    return pair.card is not None and CARDS[pair.card]["api_name"] in row["meta"]["documents"]


# --- reading ---


@pytest.mark.parametrize(
    "code",
    [
        f"###Instruction: Find a headline.\n###Output: {IN_LINES}\n",
        f"###Instruction: Find a headline.\n###Output: {IN_ONE_LINE}",
        f"###Instruction: Find a headline.\n###Output: {PSEUDO}\n",
        f"{{'Instruction': 'Find a headline.', 'Output': {PSEUDO}}}",
        f"{{'Instruction': Find a headline., 'Output': {PSEUDO}}}".replace("\n", "\\n"),
        f"{{'Instruction': \"Find a headline.\", 'Input': '<noinput>', 'Output': {PSEUDO}}}",
    ],
)
def test_the_published_forms_of_an_answer_become_one(
    code: str, cards: Cards, write_rows: Callable[..., Path]
) -> None:
    ((pair,), left_out) = read_pairs(write_rows(published(code)), cards)
    assert pair == ApiPair("Find a headline.", ANSWER, 0)
    assert write_tags(pair.answer) == IN_LINES
    assert left_out == []


def test_tags_are_sorted_the_first_of_each_counts_and_empty_ones_are_left_out() -> None:
    text = "<<<code>>>: x\n<<<domain>>>\n<<<api_call>>>: f(1)\n<<<api_call>>>: g(2), "
    assert list(read_tags(text).items()) == [("api_call", "f(1)"), ("code", "x")]
    assert read_tags("f(1)") == {}
    assert write_tags({"code": "x", "domain": "", "api_call": "f(1)"}) == (
        "<<<api_call>>>: f(1)\n<<<code>>>: x"
    )


def test_quotes_at_the_end_of_a_question_are_its_own(
    cards: Cards, write_rows: Callable[..., Path]
) -> None:
    code = f'###Instruction: Find a headline like "Sea"\n###Output: {IN_LINES}'
    assert read_pairs(write_rows(published(code)), cards)[0][0].question.endswith(' like "Sea"')


def test_a_published_answer_that_calls_another_api_gets_the_call_of_its_card(
    cards: Cards, write_rows: Callable[..., Path]
) -> None:
    code = f"###Instruction: Rhyme.\n###Output: {IN_LINES}"
    ((pair,), _) = read_pairs(write_rows(published(code, CARDS[1])), cards)
    assert (pair.card, pair.answer) == (1, ANSWER | {"api_call": CARDS[1]["api_call"]})


def test_of_cards_with_one_call_a_published_row_is_about_that_of_its_api_data(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    given = [CARDS[0] | {"description": f"The {n}th."} for n in range(3)]
    row = published(f"###Instruction: Which?\n###Output: {IN_LINES}", given[1])
    cards = to_cards(tmp_path, given)
    assert read_pairs(write_rows(row), cards)[0][0].card == 1
    assert read_pairs(write_rows(row | {"api_data": {}}), cards)[0][0].card == 0


@pytest.mark.parametrize(
    ("file", "hub", "num_pairs", "num_left_out"),
    [
        ("torchhub_eval.json", "torchhub", 186, 0),
        ("torchhub_train.json", "torchhub", 837, 0),
        ("huggingface_eval.json", "huggingface", 900, 11),
        ("tensorflow_eval.json", "tensorflowhub", 688, 0),
    ],
)
def test_the_published_pairs_are_read(
    file: str, hub: str, num_pairs: int, num_left_out: int, gorilla: Path, hubs: dict[str, Cards]
) -> None:
    cards = hubs[hub]
    pairs, left_out = read_pairs(find(gorilla, file), cards)
    assert (len(pairs), len(left_out)) == (num_pairs, num_left_out)
    given = read_lines(find(gorilla, file))
    kept = [row for line, row in enumerate(given, 1) if line not in left_out]
    for pair, row in zip(pairs, kept, strict=True):
        assert pair.card is not None
        assert pair.question in row["code"]
        assert not any(sign in pair.question for sign in ("<<<", "Output", "Instruction:"))
        assert list(pair.answer) in (list(TAGS), list(TAGS[:4]))  # a few have no code
        written = write_tags(pair.answer)
        assert read_tags(written) == pair.answer
        card = cards[pair.card]
        if card.call is None:  # nothing can match it
            assert pair.answer[CALL] == card.api_call == row["api_call"]
        else:
            assert pair.card in cards.matching(find_calls(written).calls)
    own = [
        row["api_data"] == cards[pair.card].fields for pair, row in zip(pairs, kept, strict=True)
    ]
    assert sum(own) == (834 if hub == "huggingface" else num_pairs)  # of 911, 834 have a card


OTHER_ORDER = "shop.load(model='title_small', repo='songmu/title-v2')"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (
            f"You could type x = {OTHER_ORDER}",
            {
                "domain": "Text",
                "api_call": OTHER_ORDER,
                "api_provider": "SongMu",
                "explanation": CARDS[0]["description"],
            },
        ),
        (IN_ONE_LINE, ANSWER),
        (PSEUDO, ANSWER),
        (f"<<<api_call>>>: {TITLE}\n<<<domain>>>: News", {**ANSWER, "domain": "News"}),
    ],
)
def test_rows_of_other_formats_are_read_by_their_call(
    response: str, answer: dict[str, str], cards: Cards, write_rows: Callable[..., Path]
) -> None:
    if "News" in response:
        answer = {**answer, "explanation": CARDS[0]["description"]}
        answer.pop("code")
    ((pair,), left_out) = read_pairs(write_rows(asked("Find it.", response)), cards)
    assert pair == ApiPair("Find it.", answer, 0)
    assert list(pair.answer) == [name for name in TAGS if name in answer]
    assert left_out == []


@pytest.mark.parametrize("response", ["None", " None\n", "<<<domain>>>: x\n<<<api_call>>>: None"])
def test_none_is_the_answer_where_no_api_fits(
    response: str, cards: Cards, write_rows: Callable[..., Path]
) -> None:
    ((pair,), _) = read_pairs(write_rows(asked("Sing.", response)), cards)
    assert pair == ApiPair("Sing.", {"domain": "None", "api_call": "None"}, None)


def test_no_answer_and_a_call_of_no_card_are_left_out_with_their_lines(
    cards: Cards, write_rows: Callable[..., Path]
) -> None:
    rows = [
        asked("a", TITLE),
        asked("b", TITLE.replace("v2", "v3")),
        asked("c", "d"),
        asked("e", ""),
        asked("f", "None"),
    ]
    pairs, left_out = read_pairs(write_rows(*rows), cards)
    assert ([pair.question for pair in pairs], left_out) == (["a", "f"], [2, 3, 4])


@pytest.mark.parametrize(
    "row",
    [
        asked("a", "no call"),
        published(f"###Instruction: a\n###Output: {IN_LINES}", {"api_call": "x.y()"})
        | {"code": "###Instruction: a\n###Output: <<<api_call>>>: x.y()"},
        published(f"###Instruction:\n###Output: {IN_LINES}"),
    ],
)
def test_a_file_without_any_pair_is_an_error(
    row: dict[str, Any], cards: Cards, write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl.* has no row whose answer calls an API"):
        read_pairs(write_rows(row), cards)


def test_the_questions_of_cards_are_pairs(cards: Cards) -> None:
    pairs = pairs_of_cards(cards)
    assert [(pair.question, pair.card) for pair in pairs] == [
        ("Find a headline.", 0),
        ("写一个标题", 0),
        ("Rhyme about the sea.", 1),
    ]
    assert pairs[0].answer == {
        "domain": "Text",
        "api_call": TITLE,
        "api_provider": "SongMu",
        "explanation": "Writes a headline for an article.",
    }


# --- published prompts ---


@pytest.mark.parametrize("hub", HUBS)
def test_the_published_prompts_are_written_again(
    hub: str, gorilla: Path, hubs: dict[str, Cards], apicall: Any
) -> None:
    references = read_lines(find(gorilla, HUBS[hub][1]))
    questions = read_lines(gorilla / f"questions_{hub}_0_shot.jsonl")
    retriever = PublishedRetriever(hubs[hub])
    equal: Counter[str] = Counter()
    for kind in (ORACLE, BM25):
        wanted = read_lines(find(gorilla, f"questions_{hub}_{kind}.jsonl"))
        for question, row in zip(questions, wanted, strict=True):
            text = question["text"]
            if kind == BM25:
                card = hubs[hub][retriever.ranked(text, 1)[0]]
            else:
                data = references[question["question_id"] - 1]["api_data"]
                card = Card(data, None, (), frozenset(), False)
            equal[kind] += published_prompt(text, card, kind) == row["text"]
    assert equal[ORACLE] == apicall["oracle_prompts"][hub]["byte_equal"]
    assert equal[BM25] == {"torchhub": 180, "huggingface": 800, "tensorflowhub": 685}[hub]


@pytest.mark.parametrize(
    ("hub", "equal"),
    [
        ("torchhub", {None: 182, ORACLE: 155, BM25: 176}),
        ("huggingface", {None: 873, ORACLE: 773, BM25: 775}),
        ("tensorflowhub", {None: 676, ORACLE: 365, BM25: 676}),
    ],
)
def test_rows_of_the_published_references_have_the_published_prompts(
    hub: str, equal: dict[str | None, int], gorilla: Path, hubs: dict[str, Cards]
) -> None:
    """The others end in a blank, or their document is not that of the reference."""
    pairs, _ = read_pairs(find(gorilla, HUBS[hub][1]), hubs[hub])
    for kind, number in equal.items():
        file = find(gorilla, f"questions_{hub}_{kind or '0_shot'}.jsonl")
        wanted = {row["text"] for row in read_lines(file)}
        rows = compat_rows(pairs, hubs[hub], kind)
        assert sum(row["prompt"] in wanted for row in rows) == number


def test_compat_rows_show_the_right_card_or_none(cards: Cards) -> None:
    pairs = [ApiPair('Say "a"', ANSWER, 0), ApiPair("b", {CALL: "None"}, None)]
    bare, alone = (row["prompt"] for row in compat_rows(pairs, cards, None))
    assert (bare, alone) == (' Say \\"a\\"\\n', " b\\n")
    shown, still_alone = compat_rows(pairs, cards, ORACLE)
    assert shown["prompt"] == (
        f"{bare} \n Use this API documentation for reference:  {json.dumps(CARDS[0])}}}"
    )
    assert (shown["response"], shown["meta"]["documents"]) == (IN_LINES, ["title"])
    assert (still_alone["prompt"], still_alone["meta"]["documents"]) == (alone, [])


# --- our prompts ---


def test_a_prompt_has_a_heading_in_the_language_of_its_question() -> None:
    documents = ['{"api_name": "a"}', '{"api_name": "b"}']
    listed = "\n".join(documents)
    assert to_prompt("Find it", documents) == (
        f"Find it\nUse this API documentation for reference:\n{listed}"
    )
    assert (
        to_prompt("找一下 title 接口", documents)
        == f"找一下 title 接口\n参考以下 API 文档：\n{listed}"
    )
    assert to_prompt("Find it", []) == "Find it"


def test_a_row_follows_the_contract(cards: Cards) -> None:
    pairs = [ApiPair("Find a headline.", ANSWER, 0), ApiPair("写一首歌", {CALL: "None"}, None)]
    right, none = rows_of(cards, pairs, p=1, distractors=0, vary=0)
    assert right == {
        "id": "api:1",
        "prompt": to_prompt("Find a headline.", [cards[0].document]),
        "response": IN_LINES,
        "history": [],
        "source": "api",
        "meta": {"question": "Find a headline.", "documents": ["title"]},
    }
    assert (none["id"], none["response"]) == ("api:2", "<<<api_call>>>: None")


def test_a_seed_decides_the_rows(cards: Cards) -> None:
    pairs = many_pairs(40)
    assert rows_of(cards, pairs, seed=1) == rows_of(cards, pairs, seed=1)
    assert rows_of(cards, pairs, seed=1) != rows_of(cards, pairs, seed=2)
    assert rows_of(cards, pairs, seed=1)[:9] == rows_of(cards, pairs[:9], seed=1)


def test_copies_of_a_question_have_documents_of_their_own(cards: Cards) -> None:
    pairs = many_pairs(8)
    rows = rows_of(cards, pairs, copies=5)
    assert [row["id"] for row in rows] == [f"api:{n}" for n in range(1, 41)]
    assert [row["meta"]["question"] for row in rows] == [pair.question for pair in pairs] * 5
    assert rows[:8] == rows_of(cards, pairs)
    for n in range(8):
        assert len({row["prompt"] for row in rows[n::8]}) > 2


@pytest.mark.parametrize("retriever", [BM25, ORACLE])
@pytest.mark.parametrize("p", [0, 1])
@pytest.mark.parametrize("distractors", [0, 1, 3, 9])
def test_a_prompt_shows_the_right_document_by_p_and_others_by_number(
    retriever: str, p: float, distractors: int, cards: Cards
) -> None:
    pairs = many_pairs(20)
    rows = rows_of(cards, pairs, retriever=retriever, p=p, distractors=distractors)
    for row, pair in zip(rows, pairs, strict=True):
        assert shows_right(row, pair) is (p == 1)
        assert len(set(row["meta"]["documents"])) == min(distractors, 3) + p
        shown = [document["api_name"] for document in documents_of(row)]
        assert shown == row["meta"]["documents"]


def test_no_retriever_shows_and_varies_nothing(cards: Cards) -> None:
    pairs = many_pairs(8)
    rows = rows_of(cards, pairs, retriever=None, p=1, vary=1)
    assert [row["prompt"] for row in rows] == [pair.question for pair in pairs]
    assert [row["response"] for row in rows] == [write_tags(pair.answer) for pair in pairs]


def test_bm25_distracts_by_the_likeliest_wrong_document_and_oracle_by_any(cards: Cards) -> None:
    pairs = [ApiPair("A headline for this article?", ANSWER, 0)] * 40
    assert Retriever(cards).ranked(pairs[0].question, 2) == [0, 1]
    likeliest, chance = (
        Counter(
            name
            for row in rows_of(cards, pairs, retriever=retriever, p=0, distractors=1)
            for name in row["meta"]["documents"]
        )
        for retriever in (BM25, ORACLE)
    )
    assert likeliest == {"poem": 40}
    assert chance.keys() == {"poem", "weather", "traffic"}
    assert min(chance.values()) > 4


@pytest.mark.parametrize("retriever", [BM25, ORACLE])
def test_the_right_document_may_have_any_place(retriever: str, cards: Cards) -> None:
    pairs = [ApiPair("A headline for this article?", ANSWER, 0)] * 60
    rows = rows_of(cards, pairs, retriever=retriever, p=1, distractors=2)
    places = Counter(row["meta"]["documents"].index("title") for row in rows)
    assert sorted(places) == [0, 1, 2]
    assert min(places.values()) > 8


@pytest.mark.parametrize("retriever", [BM25, ORACLE])
def test_a_question_that_no_api_fits_always_sees_a_document(retriever: str, cards: Cards) -> None:
    pairs = [ApiPair("Sing a song", {CALL: "None"}, None)] * 10
    for distractors, number in ((0, 1), (1, 1), (2, 2)):
        rows = rows_of(cards, pairs, retriever=retriever, p=0, vary=1, distractors=distractors)
        assert {len(documents_of(row)) for row in rows} == {number}
        assert {row["response"] for row in rows} == {"<<<api_call>>>: None"}


# --- invented names ---


def test_document_and_answer_carry_the_same_invented_names(cards: Cards) -> None:
    pairs = many_pairs(40)
    for row, pair in zip(rows_of(cards, pairs, p=1, vary=1), pairs, strict=True):
        assert pair.card is not None
        card = cards[pair.card]
        others = {
            other["api_name"]: other for other in map(json.loads, (c.document for c in cards))
        }
        own = others.pop(CARDS[pair.card]["api_name"])
        shown = {document["api_name"]: document for document in documents_of(row)}
        changed = shown.pop(own["api_name"])
        assert shown.items() <= others.items()  # the other documents keep their names
        (call,) = find_calls(row["response"]).calls
        (given,) = find_calls(f"<<<api_call>>>: {changed['api_call']}").calls
        assert call == given
        for name in ("repo", "model"):
            value = call.named(())[name].value
            assert value != card.call.named(())[name].value
            assert len(value) == len(card.call.named(())[name].value)
        assert {name: own[name] for name in own if name != "api_call"} == {
            name: changed[name] for name in changed if name != "api_call"
        }
    assert len({row["response"] for row in rows_of(cards, pairs, p=1, vary=1)}) == 40


def test_numbers_and_short_names_stay(write_cards: Callable[..., Path]) -> None:
    calls = ["f(a='abc', b='1234', c=5, d='x-y-9', e=name)", "f(a='q', b='', c=0, d='', e=name)"]
    cards = read_cards(write_cards([(call, "x") for call in calls]))
    assert [identifying_texts(card) for card in cards] == [["x-y-9"], []]
    pair = ApiPair("Which?", {CALL: cards[0].api_call}, 0)
    (row,) = rows_of(cards, [pair], p=1, vary=1, distractors=0)
    values = {name: one.value for name, one in find_calls(row["response"]).calls[0].keywords}
    assert values.pop("d") != "x-y-9"
    assert values == {"a": "abc", "b": "1234", "c": 5, "e": "name"}


def test_only_identifying_names_are_invented(write_cards: Callable[..., Path]) -> None:
    card = {"api_call": "f(repo='some/repo', mode='fast')", "domain": "", "identify": ["repo"]}
    cards = read_cards(write_cards([card | {"domain": "x"}]))
    assert identifying_texts(cards[0]) == ["some/repo"]


def test_a_name_that_the_question_asks_for_stays(cards: Cards) -> None:
    pairs = [ApiPair("Load songmu/title-v2, please", ANSWER, 0)]
    (row,) = rows_of(cards, pairs, p=1, vary=1)
    call = find_calls(row["response"]).calls[0].named(())
    assert call["repo"].value == "songmu/title-v2"
    assert call["model"].value != "title_small"


def test_the_shares_of_shown_and_varied_rows_are_near_p_and_vary(cards: Cards) -> None:
    pairs = many_pairs(400)
    rows = rows_of(cards, pairs, p=0.6, vary=0.3)
    right = [(row, pair) for row, pair in zip(rows, pairs, strict=True) if shows_right(row, pair)]
    varied = [row for row, pair in right if pair.answer[CALL] not in row["response"]]
    assert len(right) / 400 == pytest.approx(0.6, abs=0.075)  # three standard deviations
    assert len(varied) / len(right) == pytest.approx(0.3, abs=0.09)
    wrong = [
        row["response"] for row, pair in zip(rows, pairs, strict=True) if not shows_right(row, pair)
    ]
    assert set(wrong) == {f"<<<api_call>>>: {card['api_call']}" for card in CARDS}


@pytest.mark.parametrize("retriever", [BM25, ORACLE])
def test_what_identifies_the_call_is_in_every_prompt_with_the_right_document(
    retriever: str, gorilla: Path, hubs: dict[str, Cards]
) -> None:
    cards = hubs["torchhub"]
    pairs, _ = read_pairs(find(gorilla, "torchhub_train.json"), cards)
    rows = training_rows(pairs, cards, DocumentSettings(retriever, p=1))
    for row in rows:
        calls = find_calls(row["response"]).calls
        held = [{value.key for value in call.values} for call in calls]
        shown = [card_call(document["api_call"]) for document in documents_of(row)]
        named = [call.named(("repo_or_dir", "model")) for call in shown if call is not None]
        needed = [
            {one[name].key for name in one.keys() & {"repo_or_dir", "model"}} for one in named
        ]
        assert any(keys and keys <= values for keys in needed for values in held), row
