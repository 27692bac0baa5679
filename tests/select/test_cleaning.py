"""Rules of cleaning: golden rows and near misses, published rows, and answers in other languages."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from ptuning.select.cleaning import RULES, Fields, fault_of, without_fake_input

NAMES = {"output_equals_input": "identical_fields", "leaked_markers": "swallowed_task"}


def verdict(row: dict[str, str]) -> str:
    """Return what cleaning does with a row of instruction, input and output, by the golden's names."""
    instruction, text, output = row["instruction"], row["input"], row["output"]
    prompt = f"{instruction}\n{text}" if text else instruction
    if without_fake_input(prompt, text) is not None:
        return "fake_input"
    return fault_of(Fields(instruction, text, output)) or "keep"


def test_golden_rows_and_near_misses(lima: Any) -> None:
    rows = lima["cleaning"]["rows"]
    assert len(rows) == 30
    expected = [NAMES.get(row["expected"], row["expected"]) for row in rows]
    assert [verdict(row) for row in rows] == expected


def found_in(path: Path) -> dict[str, list[int]]:
    """Return the row numbers by verdict; a fake input does not hide another fault."""
    found = defaultdict(list)
    for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        if verdict(row) == "fake_input":
            found["fake_input"].append(number)
            row["input"] = ""
        found[verdict(row)].append(number)
    return found


def test_published_alpaca_rows(shared: Path) -> None:
    """All 99 faults found were read; cut endings beyond the five of the golden would be false."""
    facts = json.loads((shared / "golden" / "instructions.json").read_text(encoding="utf-8"))
    facts = facts["alpaca_5000"]
    found = found_in(shared / "data" / "alpaca" / "alpaca_5000.json")
    assert found["fake_input"] == facts["fake_inputs"]["indices"]
    assert found["empty_output"] == facts["empty_outputs"]
    assert found["cut_ending"] == facts["outputs_cut_at_20"]["indices"]
    assert found["swallowed_task"] == facts["output_with_field_label"]
    assert found["identical_fields"] == facts["output_equals_input"]
    assert found["url_only_input"] == facts["input_is_only_a_url"]
    assert found["media_input"] == facts["bracketed_media_or_text_inputs"]["indices"]
    assert not {*found} & {"leaked_markers", "self_reference", "language_mismatch"}


def test_rows_of_lima_are_hardly_touched(shared: Path) -> None:
    """The three that go speak as an assistant, in rows that ask what it is able to do."""
    found = found_in(shared / "data" / "lima" / "lima.json")
    assert {name: rows for name, rows in found.items() if name != "keep"} == {
        "self_reference": [421, 565, 1008]
    }


@pytest.mark.parametrize(
    ("instruction", "output", "expected"),
    [
        ("1+2", "这是一道加法题。", None),
        ("用 shimmer 造一个句子", "The shimmer of the sea was blue.", None),
        ("列出四张专辑", "Here is a list of four albums by the band.", "language_mismatch"),
        ("写一个循环", "for name in names:\n    show(name)", None),
        ("你喜欢什么？", "作为人工智能领域的研究者，我喜欢数据。", None),
        ("你喜欢什么？", "作为人工智能，我没有喜好。", "self_reference"),
        ("Show a query.", "SELECT * FROM orders WHERE status = 'shipped';", None),
        ("Write a recipe.", "Ingredients: eggs.\nInstructions:\n1. Heat a pan.", None),
        ("Write a chat.", "好的。<|im_end|>", "leaked_markers"),
        ("接着说", "[Round 0]\n问：你好\n答：你好", "leaked_markers"),
        ("Go on.", "It was late in the evening, and the", "cut_ending"),
        ("Name it.", "The one and only, the", None),
        *(("Count.", text, None) for text in ("2, 4, 18, 20", "It is 1 to 20", "on March 20")),
        *(("When?", f"It opened {text} 20", "cut_ending") for text in ("in", "since", "in June")),
        ("Who?", "As an AI researcher, I have published ten papers.", None),
        ("Who?", "Sorry, but as an AI assistant I cannot see.", "self_reference"),
        ("Who?", "As an AI I cannot see.", "self_reference"),
        ("Who?", "As an AI developed by them, I cannot see.", "self_reference"),
        ("中译英：今天天气很好", "The weather is nice today, is it not?", None),
        ("谁写了哈姆雷特？", "William Shakespeare", None),
    ],
)
def test_rules_at_their_edges(instruction: str, output: str, expected: str | None) -> None:
    assert fault_of(Fields(instruction, "", output)) == expected


def test_an_earlier_turn_tells_the_language() -> None:
    fields = Fields(
        "more details pls", "", "微服务之间通过消息通信。", "什么是微服务？\n一种架构。"
    )
    assert fault_of(fields) is None
    assert fault_of(fields._replace(history="")) == "language_mismatch"


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Name a tree.\n<noinput>", "", "Name a tree."),
        ("Name a tree.\nNo input.", "No input.", "Name a tree."),
        ("推荐一部电影\n无", "", "推荐一部电影"),
        ("Choose one:\nnone\nall", "", None),
        ("none", "", None),
        ("Translate into French:\nNone", "", None),
        ("\nnone", "", None),
        ("Name a tree.", "", None),
    ],
)
def test_fake_inputs_are_cut_off_the_prompt(prompt: str, text: str, expected: str | None) -> None:
    assert without_fake_input(prompt, text) == expected


def test_every_rule_is_described_in_both_languages() -> None:
    for meaning in RULES.values():
        chinese, separator, english = meaning.partition(": ")
        assert separator
        assert not chinese.isascii()
        assert english.isascii()


@pytest.mark.parametrize("blank", [" ", "\u3000", "大型", ", ", "1. ", "as an ai ", "January "])
def test_no_rule_backtracks(blank: str) -> None:
    started = time.process_time()
    for start in ("作为AI", "as an AI", "10", "#"):
        fault_of(Fields("说一下。", blank * 20_000, f"{start}{blank * 20_000}x"))
    assert time.process_time() - started < 5
