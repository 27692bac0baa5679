"""Verdicts: the golden counts, the published cards, mutations, accepted values, reasons."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ptuning.apicalls.calls import calls_of, find_calls
from ptuning.apicalls.cards import Cards, find_family, read_cards
from ptuning.apicalls.verdicts import (
    REASONS,
    CallVerdict,
    Reference,
    check_call,
    is_accepted,
    judge,
)
from tests.apicalls.conftest import HUBS, find, read_lines

GOLDEN_OF = {  # reason: the golden's word
    **dict.fromkeys(("no_call", "syntax"), "no_call"),
    **dict.fromkeys(("unknown_callee", "unknown_model", "missing_argument"), "no_card"),
    **{None: "correct", "wrong_api": "other_api", "wrong_domain": "other_domain"},
}
WriteCards = Callable[..., Path]


def golden_row(verdict: CallVerdict) -> dict[str, Any]:
    return {
        "format_miss": not verdict.answer.has_tag,
        "parsed": bool(verdict.answer.calls),
        "hallucinated": verdict.hallucinated,
        "domain_first": verdict.domain_first,
        "domain_any": verdict.domain_any,
        "api_correct": verdict.right_api,
    }


def references_of(hub: str, gorilla: Path) -> list[Reference]:
    rows = read_lines(find(gorilla, HUBS[hub][1]))
    return [
        Reference(str(number), row["api_call"], row["api_data"]["domain"])
        for number, row in enumerate(rows, 1)
    ]


def test_published_cards(hubs: dict[str, Cards], apicall: Any) -> None:
    for hub, facts in apicall["cards"].items():
        cards = hubs[hub]
        assert cards.family == {"tensorflowhub": "tensorflow"}.get(hub, hub)
        never = [index for index, card in enumerate(cards) if card.call is None]
        assert never == sorted(facts["not_python"] + facts["no_identifying_value"])
        assert len({card.api_call for card in cards}) == facts["distinct_calls"]
    assert sum(card.call is None for card in hubs["huggingface"]) == 17


def test_published_answers(gorilla: Path, hubs: dict[str, Cards], apicall: Any) -> None:
    """The counts of seven published files, and 40 rows of each."""
    for name, expected in apicall["published_answers"].items():
        hub = name.split("_")[1]
        references = references_of(hub, gorilla)
        counts: Counter[str] = Counter()
        found = {}
        started_s = time.process_time()
        for response in read_lines(find(gorilla, name)):
            reference = references[response["question_id"] - 1]
            verdict = judge(response["text"], hubs[hub], reference)
            row = golden_row(verdict)
            counts.update(rows=1, **row)
            matching = {
                "matching_cards": len(verdict.matching),
                "first_card": verdict.matching[0] if verdict.matching else None,
            }
            found[reference.question_id] = row | matching
        if "huggingface" in name:  # 904 answers and 936 cards
            assert time.process_time() - started_s < 1
        assert counts == Counter(expected["counts"]), name
        for sampled in expected["sampled_rows"]:
            assert found[str(sampled.pop("question_id"))] == sampled


@pytest.mark.parametrize("kind", ["api_call_alone", "code_field"])
@pytest.mark.parametrize("hub", HUBS)
def test_references_as_answers(
    hub: str, kind: str, gorilla: Path, hubs: dict[str, Cards], apicall: Any
) -> None:
    rows = read_lines(find(gorilla, HUBS[hub][1]))
    counts: Counter[str] = Counter()
    for reference, row in zip(references_of(hub, gorilla), rows, strict=True):
        text = row["api_call" if kind == "api_call_alone" else "code"]
        counts.update(rows=1, **golden_row(judge(text, hubs[hub], reference)))
    expected = apicall["references_as_answers"][hub][kind]
    assert {name: counts[name] for name in expected} == expected


def test_answers_written_by_hand(gorilla: Path, hubs: dict[str, Cards], apicall: Any) -> None:
    cases = apicall["hand_written"]["cases"]
    assert len(cases) == 26
    for case in cases:
        hub = case["hub"]
        verdict = judge(case["answer"], hubs[hub], references_of(hub, gorilla)[case["reference"]])
        assert GOLDEN_OF[verdict.reason] == case["verdict"], case["note"]
        assert verdict.answer.has_tag is not case["format_miss"]
        assert verdict.matching == case["matching_cards"]


def test_answers_written_by_hand_against_their_own_cards(
    write_cards: WriteCards, apicall: Any
) -> None:
    """The TorchHub cases again, in a bare clone, with just the three cards that they name."""
    names = ("facebookresearch/pytorchvideo", "slow_r50"), ("pytorch/vision", "deeplabv3_resnet50")
    calls = [f"torch.hub.load(repo_or_dir='{repo}', model='{model}')" for repo, model in names]
    other = calls[0].replace("slow_r50", "slowfast_r50")
    path = write_cards([(calls[0], "Video"), (calls[1], "Segmentation"), (other, "Video")])
    cards = read_cards(path)
    assert cards.family == "torchhub"
    reference = Reference("1", calls[0], "Video")
    cases = [case for case in apicall["hand_written"]["cases"] if case["hub"] == "torchhub"]
    assert len(cases) == 19
    for case in cases:
        verdict = judge(case["answer"], cards, reference)
        assert GOLDEN_OF[verdict.reason] == case["verdict"], case["note"]
        assert len(verdict.matching) == len(case["matching_cards"])


TORCHHUB = "torch.hub.load(repo_or_dir='a/b', model='m', pretrained=True)"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("torch.hub.load('a/b', 'm')", None),
        ("torch.hub.load('a/b', 'm', pretrained=False, force_reload=True)", None),
        ("torch.hub.load(model='m', repo_or_dir='a/b')", None),
        ("torch.hub.load('a/b', 'n')", "wrong_api"),
        ("torch.hub.load('c/d', 'm')", "wrong_domain"),
        ("torch.hub.load('a/b', 'x')", "unknown_model"),
        ("torch.hub.load('a/b', pretrained=True)", "missing_argument"),
        ("torch.hub.load()", "missing_argument"),
        ("hub.load('a/b', 'm')", "unknown_callee"),
        ("torch.hub.load('a/b', 'm'", "syntax"),
        ("none fits", "no_call"),
    ],
)
def test_reasons(answer: str, reason: str | None, write_cards: WriteCards) -> None:
    others = [TORCHHUB.replace("'m'", "'n'"), TORCHHUB.replace("a/b", "c/d")]
    path = write_cards([(TORCHHUB, "Video"), (others[0], "Video"), (others[1], "Text")])
    assert judge(answer, read_cards(path), Reference("1", TORCHHUB, "Video")).reason == reason


def test_arguments_are_a_measure_of_their_own_in_the_hubs(write_cards: WriteCards) -> None:
    cards = read_cards(write_cards([(TORCHHUB, "Video")]))
    reference = Reference("1", TORCHHUB, "Video")
    same = judge("torch.hub.load('a/b', 'm', pretrained=True)", cards, reference)
    less = judge("torch.hub.load('a/b', 'm')", cards, reference)
    assert (same.reason, same.arguments) == (None, True)
    assert (less.reason, less.arguments) == (None, False)


def right_answers(
    gorilla: Path, hubs: dict[str, Cards]
) -> Iterator[tuple[Cards, Reference, str, list[Reference]]]:
    """Yield 100 right answers of each hub, with all references of the hub."""
    for hub, cards in hubs.items():
        references = references_of(hub, gorilla)
        right = [
            one
            for one in dict.fromkeys(references)
            if judge(str(one.api_call), cards, one).right_api
            and re.search("'[^']+'", str(one.api_call))
        ]
        assert len(right) >= 50
        for number in range(100):
            one = right[number % len(right)]
            yield cards, one, str(one.api_call), references


def test_mutations_of_300_right_answers(gorilla: Path, hubs: dict[str, Cards]) -> None:
    """Invented models are hallucinations, other cards' are wrong, and the form does not matter.

    16 of HuggingFace's still match a card that names a task alone, such as pipeline('fill-mask').
    """
    hallucinated, task_alone, other_cards = 0, 0, 0
    for cards, reference, call, references in right_answers(gorilla, hubs):
        invented = with_invented_model(call, cards)
        found = judge(invented, cards, reference)
        hallucinated += found.hallucinated
        task_alone += bool(found.matching)
        assert all(len(cards[index].identifying) == 1 for index in found.matching), invented
        for other in references:
            if other.domain == reference.domain and other.api_call != reference.api_call:
                verdict = judge(str(other.api_call), cards, reference)
                if verdict.matching and not verdict.right_api:
                    other_cards += 1
                    assert verdict.reason == "wrong_api"
                    break
        for form in (call.replace("'", '"'), f"model = {call}", with_last_keyword_first(call)):
            assert judge(form, cards, reference).right_api, form
        if "pretrained" not in call:  # a keyword twice is not Python
            more = f"{call.rstrip('.').removesuffix(')')}, pretrained=True)"
            assert judge(more, cards, reference).right_api, more
    assert (hallucinated, task_alone) == (284, 16)
    assert other_cards >= 150


def with_invented_model(call: str, cards: Cards) -> str:
    """Change the longest text that identifies the call: a model's name, or its repository."""
    identifying = " ".join(cards[cards.matching(find_calls(call).calls)[0]].identifying)
    texts = [text for text in re.findall("'([^']+)'", call) if text in identifying]
    longest = max(texts, key=len)
    return call.replace(longest, f"{longest[::-1]}-x9")


def with_last_keyword_first(call: str) -> str:
    (found,) = calls_of(call)[:1] or (None,)
    if found is None or found.positional or "[" in call or "**" in call:
        return call
    words = [f"{name}={value.value!r}" for name, value in reversed(found.keywords)]
    return f"{found.callee}({', '.join(words)})"


def test_families(write_cards: WriteCards) -> None:
    assert find_family([{"api_call": "torch.hub.load('a', 'b')"}]) == "torchhub"
    assert find_family([{"api_call": "hub.KerasLayer('u')"}]) == "tensorflow"
    framework = {"framework": "Hugging Face Transformers"}
    assert find_family([{"api_call": "pipeline('x')", **framework}]) == "huggingface"
    assert find_family([{"api_call": "weather.get(city='x')"}]) == "generic"


def test_a_generic_card_is_identified_by_its_function_or_by_the_named_arguments(
    write_cards: WriteCards,
) -> None:
    weather = "weather.get(city='Oslo', days=3)"
    shops = [f"shop.open(repo='{repo}', page=1)" for repo in ("a", "b")]
    path = write_cards(
        [
            (weather, "W"),
            *({"api_call": call, "domain": "S", "identify": ["repo"]} for call in shops),
        ]
    )
    cards = read_cards(path)
    assert check_call("weather.get(city='Rome')", cards).matching == [0]
    assert check_call("shop.open(page=7, repo='b')", cards).matching == [2]
    assert check_call("shop.open('a')", cards).matching == [1]
    assert check_call("shop.open(repo='c')", cards).reason == "unknown_model"
    assert check_call("shop.open(page=1)", cards).reason == "missing_argument"
    shared = read_cards(write_cards([(call, "S") for call in shops]))  # without `identify`
    assert check_call("shop.open(repo='b', page=1)", shared).matching == [1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("weather.get(days=3, city='Oslo')", None),
        ("weather.get('Oslo', 3)", None),
        ("weather.get(city='Rome', days=3)", "wrong_argument"),
        ("weather.get(city='Oslo', days=3.0)", "wrong_argument"),
        ("weather.get(city='Oslo')", "missing_argument"),
        ("weather.get(city='Oslo', days=3, x=1)", "unknown_argument"),
        ("weather.past(city='Oslo', days=3)", "wrong_api"),
        ("weather.got(city='Oslo', days=3)", "unknown_callee"),
    ],
)
def test_arguments_of_a_generic_call(
    answer: str, reason: str | None, write_cards: WriteCards
) -> None:
    call = "weather.get(city='Bergen', days=1)"
    cards = read_cards(write_cards([(call, "W"), (call.replace("get", "past"), "W")]))
    assert judge(answer, cards, Reference("1", "weather.get(city='Oslo', days=3)", "W")).reason == (
        reason
    )


def test_a_call_where_no_api_fits(write_cards: WriteCards) -> None:
    cards = read_cards(write_cards([("f(a=1)", "D")]))
    texts = ("<<<domain>>>: None\n<<<api_call>>>: None", "f(a=1)", "g(1)")
    found = [judge(text, cards, Reference("1", None)).reason for text in texts]
    assert found == [None, "unneeded_call", "unneeded_call"]


@pytest.mark.parametrize(
    ("value", "accepted", "is_right"),
    [
        ("new-york", ["New York"], True),
        (5, [5.0], True),
        (5.0, [5], False),
        (1, [True], False),
        (["a", "B"], [["A", "b"]], True),
        (["a"], [["a", "b"]], False),
        ({"x": 1}, [{"x": [1, 2], "y": ["", 3]}], True),
        ({"x": 1}, [{"x": [1], "y": [3]}], False),
        ({"x": 1, "z": 1}, [{"x": [1]}], False),
        ([{"x": 1}], [[{"x": [1]}]], True),
        (None, [None], True),
    ],
)
def test_accepted_values(value: Any, accepted: list[Any], is_right: bool) -> None:
    assert is_accepted(value, accepted) is is_right


def possible_call(reference: Reference, *, without: str = "", **changed: str) -> str:
    """Return a call with the first accepted value of each argument; changed gives sources."""
    values = {
        name: repr(first_accepted(choices))
        for name, choices in (reference.accepted or {}).items()
        if [one for one in choices if one != ""] and name != without
    }
    words = [f"{name}={value}" for name, value in (values | changed).items()]
    return f"{reference.api_call}({', '.join(words)})"


def first_accepted(choices: list[Any]) -> Any:
    value = next(one for one in choices if one != "")
    return plain_value(value)


def plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        filled = {name: c for name, c in value.items() if [one for one in c if one != ""]}
        return {name: first_accepted(choices) for name, choices in filled.items()}
    return [plain_value(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("kind", "count"), [("simple_python", 400), ("multiple", 200)])
def test_bfcl_and_its_mutations(kind: str, count: int, shared: Path) -> None:
    """The possible answers are right; each of ten kinds of mutation gets its reason."""
    folder = shared / "data" / "bfcl"
    cards = read_cards(folder / f"BFCL_v4_{kind}.json.gz", "generic")
    rows = read_lines(folder / f"possible_answer_BFCL_v4_{kind}.json.gz")
    calls = [(row["id"], *next(iter(row["ground_truth"][0].items()))) for row in rows]
    references = [Reference(row_id, name, "", accepted) for row_id, name, accepted in calls]
    assert len(references) == count
    seen: Counter[str | None] = Counter()

    def expect(text: str, reference: Reference, reason: str | None) -> None:
        verdict = judge(text, cards, reference)
        assert verdict.reason == reason, (text, reference)
        seen[reason] += 1

    for reference in references:
        accepted = reference.accepted or {}
        call, name = possible_call(reference), str(reference.api_call)
        required = [key for key, choices in accepted.items() if "" not in choices]
        verdict = judge(call, cards, reference)
        assert (verdict.reason, verdict.right_api, verdict.arguments) == (None, True, True), call
        words = call[len(name) + 1 : -1]
        expect(f"<<<api_call>>>: x = {call}\n<<<api_provider>>>: y", reference, None)
        expect(call.replace(name, f"{name}_all", 1), reference, "unknown_callee")
        expect(call[:-1], reference, "syntax")
        expect(f"I would use {name} with {words}.", reference, seen_call(words))
        expect(f"{name}({words}{', ' if words else ''}no_such=1)", reference, "unknown_argument")
        for key in required[:1]:
            expect(possible_call(reference, without=key), reference, "missing_argument")
            expect(possible_call(reference, **{key: "object()"}), reference, "wrong_argument")
            expect(
                possible_call(reference, **{key: "'no such value'"}), reference, "wrong_argument"
            )
            as_other = repr([accepted[key][0], None])
            expect(possible_call(reference, **{key: as_other}), reference, "wrong_argument")
        offered = [card for card in cards if card.scope == reference.question_id]
        for card in offered:
            if card.call is not None and card.call.callee != name:
                expect(f"{card.call.callee}({words})", reference, "wrong_api")
                break
    assert {*seen} >= {None, "unknown_callee", "syntax", "unknown_argument", "missing_argument"}
    assert seen["wrong_argument"] > count
    assert seen["wrong_api"] > (150 if kind == "multiple" else -1)


def seen_call(words: str) -> str:
    """Return the reason for a sentence with these words in it: no call, unless they hold one."""
    return (
        "unknown_callee"
        if calls_of(f"f({words})")[1:]
        else ("syntax" if re.search(r"\w\s*\(", words) else "no_call")
    )


def test_bfcl_irrelevance(shared: Path) -> None:
    path = shared / "data" / "bfcl" / "BFCL_v4_irrelevance.json.gz"
    cards = read_cards(path, "generic")
    references = [Reference(row["id"], None) for row in read_lines(path)]
    assert len(references) == 240
    for reference in references:
        (card,) = [card for card in cards if card.scope == reference.question_id][:1]
        assert judge("None of these functions fits.", cards, reference).reason is None
        assert card.call is not None
        assert judge(f"{card.call.callee}()", cards, reference).reason == "unneeded_call"


def test_every_reason_is_explained() -> None:
    assert all(
        re.fullmatch(r"[^a-z]+ [a-z].+", words.replace("API", "")) for words in REASONS.values()
    )
