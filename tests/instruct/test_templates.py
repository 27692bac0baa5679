"""Prompts show the seeds in the published form and end in an open label; seeds come from any format of rows."""

import json
from pathlib import Path

import pytest

from ptuning.data.raw_file import DataError
from ptuning.instruct.blocks import Task, read_blocks
from ptuning.instruct.templates import (
    API_EN,
    API_ZH,
    TEMPLATES,
    Template,
    read_seeds,
    shipped_seeds,
)

TASKS = [Task("写一首  诗：", "夏天", "荷风"), Task("讲个笑话", "", "从前")]


def test_a_chinese_prompt_lists_the_tasks_and_leaves_one_open() -> None:
    prompt = TEMPLATES["zh"].prompt(TASKS, 4)
    head, _, blocks = prompt.partition("任务列表：\n")
    assert "一共6个任务" in head
    assert blocks == (
        "###\n1. 指令：写一首 诗\n1. 输入：\n夏天\n1. 输出：\n荷风\n"
        "###\n2. 指令：讲个笑话\n2. 输入：\n<无输入>\n2. 输出：\n从前\n###\n3. 指令："
    )


def test_an_english_prompt_leaves_no_space_after_its_open_label() -> None:
    prompt = TEMPLATES["en"].prompt([Task("Tell a joke", "", "Knock")], 19)
    assert "20 different tasks" in prompt
    assert prompt.endswith(
        "###\n1. Instruction: Tell a joke\n1. Input:\n<noinput>\n1. Output:\nKnock\n###\n2. Instruction:"
    )


@pytest.mark.parametrize("name", ["zh", "en", "adgen"])
def test_a_topic_is_one_more_requirement(name: str) -> None:
    template = TEMPLATES[name]
    with_topic, without = template.prompt(TASKS, 3, "中秋"), template.prompt(TASKS, 3)
    assert [line for line in with_topic.splitlines() if "中秋" in line]
    assert len(with_topic.splitlines()) == len(without.splitlines()) + 1
    numbers = [
        line.partition(".")[0]
        for line in with_topic.split("###")[0].splitlines()
        if line[0].isdigit()
    ]
    assert numbers == [str(n + 1) for n in range(len(numbers))]


@pytest.mark.parametrize("template", [API_ZH, API_EN], ids=["zh", "en"])
def test_requests_for_an_api_follow_its_document(template: Template) -> None:
    document = '{"api_name": "{name}", "api_call": "shop.title(item=\'\')"}'
    task = Task("给这条裙子起标题", "", "shop.title(item='裙子')")
    prompt = template.prompt([task], 4, document)
    head, _, shown = prompt.partition("###\n")
    assert head.splitlines()[1] == template.topic.format(document).rstrip()
    assert "5" in head.splitlines()[0]
    assert head.splitlines()[2].rstrip(":：") in ("要求", "Requirements")
    assert prompt.endswith(f"###\n2. {template.labels['instruction'].rstrip()}")
    blocks, preamble = read_blocks(shown, fields=template.fields)
    assert (blocks[0].task, blocks[0].fault, preamble) == (task, None, "")


def test_magpie_shows_nothing_but_the_beginning_of_a_turn() -> None:
    assert TEMPLATES["magpie"].prompt([], 1) == "[Round 0]\n问："


def test_a_changed_template_has_another_digest() -> None:
    templates = [*TEMPLATES.values(), API_ZH, API_EN]
    assert len({template.digest for template in templates}) == len(templates)


@pytest.mark.parametrize(
    ("name", "text", "tasks"),
    [
        ("a.json", json.dumps([{"instruction": "Add", "input": "1", "output": "2"}]), [Task("Add", "1", "2")]),
        ("a.jsonl", '{"content": "类型#裤", "summary": "裤子"}\n', [Task("类型#裤", "", "裤子")]),
        ("a.jsonl", '{"id": "s", "name": "n", "instruction": "Add", "is_classification": false, '
         '"instances": [{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]}\n', [Task("Add", "1", "2")]),
        ("a.jsonl", '{"id": "x:1", "prompt": "问", "response": "答", "history": [], "source": "s", "meta": {}}\n', [Task("问", "", "答")]),
        ("a.csv", "prompt,response\n问,答\n", [Task("问", "", "答")]),
    ],
    ids=["alpaca", "adgen", "self-instruct", "contract", "csv"],
)  # fmt: skip
def test_seeds_are_read_from_every_format(
    tmp_path: Path, name: str, text: str, tasks: list[Task]
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_seeds([tmp_path / name]) == tasks


def test_seeds_without_an_output_are_refused_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text(
        '{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": ""}\n',
        encoding="utf-8",
    )
    with pytest.raises(DataError, match=r"every seed needs.*line 2"):
        read_seeds([path])
    path.write_text('{"instruction": "a", "instances": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"seeds.jsonl:1: .*instances"):
        read_seeds([path])


def test_seeds_of_self_instruct_may_lack_an_input_and_no_output(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text(
        '{"instruction": "a", "instances": [{"input": null, "output": "b"}]}\n', encoding="utf-8"
    )
    assert read_seeds([path]) == [Task("a", "", "b")]
    path.write_text(
        '{"instruction": "a", "instances": [{"input": "", "output": ""}]}\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"seeds.jsonl:1: needs an instruction and an output"):
        read_seeds([path])


def test_published_seed_files_are_read(shared: Path) -> None:
    english = read_seeds([shared / "data" / "alpaca" / "seed_tasks.jsonl"])
    assert len(english) == 175
    assert sum(bool(task.input) for task in english) == 125
    assert len(read_seeds([shared / "data" / "lima" / "belle_zh_seed_tasks.json"])) == 175


def test_products_come_from_the_sample_data() -> None:
    seeds = read_seeds([shipped_seeds(TEMPLATES["adgen"])])
    assert len(seeds) == 2000
    assert all(task.instruction.startswith("类型#") and task.output for task in seeds)
