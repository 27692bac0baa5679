"""Tasks that text alone cannot do, in the wrong language or of the wrong form, are named by one reason."""

import json
from pathlib import Path

import pytest

from ptuning.instruct.blocks import Task
from ptuning.instruct.filters import BLOCKED_WORDS, blocked_pattern, fault_of
from ptuning.instruct.templates import TEMPLATES, read_seeds, shipped_seeds

BLOCKED = blocked_pattern(BLOCKED_WORDS)


def fault(template: str, instruction: str, output: str = "好的") -> str | None:
    return fault_of(Task(instruction, "", output), TEMPLATES[template], BLOCKED)


@pytest.mark.parametrize(
    ("instruction", "output", "reason"),
    [
        ("写一首关于海的诗", "海上生明月", None),
        ("写诗", "海", "too_short"),
        ("写" * 151, "海", "too_long"),
        ("打开https://a.b并总结", "好", "blocked_word"),
        ("写一段动漫人物的介绍", "他来自北方。", None),
        ("#写一首关于海的诗", "海", "bad_first_character"),
        ("“海”字怎么写得好看", "先点后提。", None),
        ("Write a poem about the sea", "The sea is wide.", "wrong_language"),
        ("把这句话译成法语", "Le train est en retard.", None),
        ("用SQL查出所有订单", "SELECT * FROM orders", None),
        ("说说你的家乡", "My home is by the sea.", "wrong_language"),
        ("写出这道题的答案", "42", None),
    ],
)
def test_chinese_tasks(instruction: str, output: str, reason: str | None) -> None:
    assert fault("zh", instruction, output) == reason


@pytest.mark.parametrize(
    ("instruction", "output", "reason"),
    [
        ("Describe the taste of tea.", "Bitter and fresh.", None),
        ("Map the route to work.", "Left, then right.", "blocked_word"),
        ("Explain the idea of mapping.", "One to one.", None),
        ("Write a program that adds.", "a + b", "write_a_program"),
        ("'Carpe diem' means what now?", "Enjoy today.", "bad_first_character"),
        ("Say it in Chinese, please.", "你好", None),
        ("Describe the taste of tea.", "清新微苦", "wrong_language"),
    ],
)
def test_english_tasks(instruction: str, output: str, reason: str | None) -> None:
    assert fault("en", instruction, output) == reason


@pytest.mark.parametrize(
    ("content", "copy", "reason"),
    [
        ("类型#裤*版型#宽松", "这条裤子很舒服", None),
        ("类型#上衣*衣样式#衬衫*颜色#白色", "白衬衫谁穿都好看", None),
        ("类型#上衣*颜色#白色", "白色干净", "type_not_named"),
        ("版型#宽松*类型#裤", "裤子", "bad_attributes"),
        ("类型#裤", "裤子", "bad_attributes"),
        ("类型#裤*版型", "裤子", "bad_attributes"),
        ("类型#裤*版型#宽松*版型#宽松", "裤子", "bad_attributes"),
        ("类型#裤**版型#宽松", "裤子", "bad_attributes"),
        ("类型# *版型#宽松", "裤子", "bad_attributes"),
        ("一条宽松的裤子", "裤子", "bad_attributes"),
    ],
)
def test_products(content: str, copy: str, reason: str | None) -> None:
    assert fault("adgen", content, copy) == reason


def test_real_rows_of_adgen_are_fit(shared: Path) -> None:
    lines = (
        (shared / "data" / "AdvertiseGen" / "train_head5001.json")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    rows = [json.loads(line) for line in lines]
    faults = [fault("adgen", row["content"], row["summary"]) for row in rows]
    assert faults.count("bad_attributes") == 0
    assert faults.count("type_not_named") <= 0.015 * len(rows)  # read: another garment is praised


@pytest.mark.parametrize("template", ["zh", "en"])
def test_the_seeds_that_are_shipped_are_fit(template: str) -> None:
    seeds = read_seeds([shipped_seeds(TEMPLATES[template])])
    assert len(seeds) == {"zh": 30, "en": 10}[template]
    assert [fault_of(task, TEMPLATES[template], BLOCKED) for task in seeds] == [None] * len(seeds)
    assert any(task.input for task in seeds)
    assert any(not task.input for task in seeds)


def test_words_of_ones_own_are_blocked_as_words() -> None:
    pattern = blocked_pattern(["cat", "价格"])
    assert pattern.search("A cat sat")
    assert not pattern.search("Concatenate")
    assert pattern.search("商品价格如何")
