"""Completions become the tasks that a careful reader finds in them, each kept whole or dropped for one reason."""

import json
from typing import Any

import pytest

from ptuning.data.similarity import Pool
from ptuning.instruct.blocks import Block, Task, read_blocks, write_block
from ptuning.instruct.filters import BLOCKED_WORDS, blocked_pattern, fault_of
from ptuning.instruct.templates import TEMPLATES
from tests.conftest import TESTS

GOLDEN = json.loads((TESTS / "golden" / "completions.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in GOLDEN["cases"]}


def sort_out(case: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str | None]], str]:
    """Return the accepted tasks, what was dropped and why, and the preamble."""
    pool, accepted, dropped = Pool(case["seeds"]), [], []
    blocked = blocked_pattern(BLOCKED_WORDS)
    blocks, preamble = read_blocks(case["completion"], is_cut=case["finish_reason"] == "length")
    for task, fault in blocks:
        fault = fault or fault_of(task, TEMPLATES[case["template"]], blocked)
        if not fault and pool.scores(task.instruction).max(initial=0.0) > GOLDEN["rouge_threshold"]:
            fault = "duplicate"
        if fault:
            dropped.append({"reason": fault, "instruction": task.instruction or None})
        else:
            accepted.append(task._asdict())
            pool.add(task.instruction)
    return accepted, dropped, preamble


@pytest.mark.parametrize("name", [name for name in CASES if name != "en-json"])
def test_completions_give_the_golden_tasks_and_reasons(name: str) -> None:
    case = CASES[name]
    accepted, dropped, preamble = sort_out(case)
    assert accepted == case["accepted"]
    assert dropped == case["dropped"]
    assert preamble == case.get("preamble", "")


def test_every_golden_case_is_there() -> None:
    assert len(CASES) == GOLDEN["totals"]["cases"] == 40
    assert set(GOLDEN["blocked_words"]["en"] + GOLDEN["blocked_words"]["zh"]) == set(BLOCKED_WORDS)


def test_a_json_answer_is_read_too() -> None:
    """The one golden case that leaves a choice: such rows may be dropped or, as here, accepted."""
    accepted, dropped, _ = sort_out(CASES["en-json"])
    assert [task["instruction"] for task in accepted] == [
        "Name a famous bridge.",
        "Add the two numbers.",
    ]
    assert accepted[1] == {"instruction": "Add the two numbers.", "input": "4, 9", "output": "13"}
    assert dropped == []


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ('{"指令": "写一首诗", "输入": "无", "输出": "春眠"}', [Block(Task("写一首诗", "", "春眠"))]),
        ('```json\n[{"instruction": "Add up", "input": [1, 2], "output": 3}]\n```', [Block(Task("Add up", "[1, 2]", "3"))]),
        ('[{"instruction": "Add up", "output": "3"}]', [Block(Task("Add up", "", "3"), "missing_field")]),
        ('[{"instruction": "Add up", "input": "", "output": null}]', [Block(Task("Add up", "", ""), "empty_output")]),
        ("[1, 2]", [Block(Task("", "", "[1, 2]"), "no_fields")]),
        ('[{"instruction": "Add', [Block(Task("", "", '[{"instruction": "Add'), "no_fields")]),
    ],
)  # fmt: skip
def test_json_answers_in_many_forms(text: str, blocks: list[Block]) -> None:
    assert read_blocks(text)[0] == blocks


def test_only_the_last_block_of_a_cut_completion_is_dropped() -> None:
    text = (
        "1. Instruction: a\n1. Input: b\n1. Output: c\n2. Instruction: d\n2. Input: e\n2. Output: f"
    )
    assert [block.fault for block in read_blocks(text, is_cut=True)[0]] == [None, "cut_off"]
    assert [block.fault for block in read_blocks(text)[0]] == [None, None]


@pytest.mark.parametrize("text", [f"{' ' * 5000}x", f"{'#' * 5000}x", "[" * 5000, "  1. " * 2000])
def test_degenerate_completions_are_read_at_once(text: str) -> None:
    """Labels are found without backtracking, and deep nesting is no JSON answer."""
    assert [block.fault for block in read_blocks(text)[0]] == ["no_fields"]


def test_what_is_written_is_read_back() -> None:
    tasks = [
        Task("写一首诗", "夏天", "荷风\n### 不是分隔\n# 也不是"),
        Task("Tell a joke about 2020.", "", "It ended in 2020. Twice."),
        Task("列出步骤", "1. 洗\n2. 切", "输出在这里：\n```\n### x\n```"),
    ]
    for template in (TEMPLATES["zh"], TEMPLATES["en"]):
        text = "".join(
            write_block(task, n, template.labels, template.no_input)
            for n, task in enumerate(tasks, 4)
        )
        assert read_blocks(text)[0] == [Block(task) for task in tasks]


def test_adgen_blocks_have_their_own_labels() -> None:
    text = "类型#裤*版型#宽松\n4. 文案：\n这条裤子很宽松，输出：稳定。\n###\n5. 商品：类型#裙*颜色#红色\n5. 文案：\n红裙\n"
    found = read_blocks(text, fields=TEMPLATES["adgen"].fields)
    assert found[0] == [
        Block(Task("类型#裤*版型#宽松", "", "这条裤子很宽松，输出：稳定。")),
        Block(Task("类型#裙*颜色#红色", "", "红裙")),
    ]


def test_inputs_that_say_there_is_none_are_those_of_the_published_rows(shared: Any) -> None:
    facts = json.loads((shared / "golden" / "instructions.json").read_text(encoding="utf-8"))
    rows = json.loads((shared / "data" / "alpaca" / "alpaca_5000.json").read_text(encoding="utf-8"))

    def reads_as_none(text: str) -> bool:
        block = read_blocks(json.dumps({"instruction": "a", "input": text, "output": "b"}))[0][0]
        return bool(text) and not block.task.input

    found = [n for n, row in enumerate(rows) if reads_as_none(row["input"])]
    assert found == facts["alpaca_5000"]["fake_inputs"]["indices"]
