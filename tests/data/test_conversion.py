"""Files of every known format to rows of the contract: all are there, and read back as they were."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from ptuning.data.conversion import (
    ContractRow,
    Conversion,
    convert_file,
    number_repeats,
)
from ptuning.data.parsing import write_json
from ptuning.data.prompts import RowFormat, Template, TextRow, build_alpaca, build_rounds
from ptuning.data.raw_file import DataError
from ptuning.data.reading import read_rows

# file, rows of the file, rows converted; read_rows says the same of them
PUBLIC = [
    ("alpaca/alpaca_5000.json", 5000, 4998),
    ("alpaca/cherry_alpaca_5_percent.json.gz", 3111, 3111),
    ("lima/lima.json", 1029, 1029),
    ("lima/llamafactory_alpaca_en_demo.json", 999, 999),
    ("lima/llamafactory_alpaca_zh_demo.json", 1000, 1000),
    ("lima/llamafactory_glaive_toolcall_en_demo.json.gz", 300, 957),
    ("lima/llamafactory_glaive_toolcall_zh_demo.json.gz", 300, 940),
    ("lima/llamafactory_v1_sft_demo.jsonl.gz", 500, 500),
    ("lima/oaast_sft_zh.json.gz", 689, 689),
    ("lima/example_history.json", 2, 2),
    ("lima/self_cognition_zh.json", 80, 80),
    ("lima/llamafactory_identity.json", 91, 91),
    ("AdvertiseGen/dev.json", 1070, 1070),
]
CHAT = [
    {"from": "human", "value": "你好"},
    {"from": "gpt", "value": "你好！"},
    {"from": "human", "value": "天气呢？"},
    {"from": "gpt", "value": "晴。"},
]


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(
        (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"
        for row in rows
    )
    path.write_text(text, encoding="utf-8")
    return path


def texts_of(rows: list[TextRow]) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    return [(row.prompt, row.response, row.history) for row in rows]


def written(made: Conversion, path: Path) -> Path:
    return write(path, list(made.rows))


# Nothing is lost


@pytest.mark.parametrize(("name", "num_read", "num_rows"), PUBLIC, ids=[row[0] for row in PUBLIC])
def test_public_files_become_rows_that_read_back_the_same(
    name: str, num_read: int, num_rows: int, shared: Path, tmp_path: Path
) -> None:
    path = shared / "data" / name
    made = convert_file(path, RowFormat())
    assert (made.read.num_read, len(made.rows)) == (num_read, num_rows)
    before = read_rows(path, RowFormat())
    assert before.num_made == num_rows + made.num_rejected
    assert before.dropped == made.read.dropped
    after = read_rows(written(made, tmp_path / "rows.jsonl"), RowFormat())
    assert texts_of(after.kept) == texts_of(before.kept)
    assert not after.dropped
    ids = [row["id"] for row in made.rows]
    assert len(set(ids)) == len(ids)
    assert {row["source"] for row in made.rows} == {path.name}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("alpaca/alpaca_5000.json", "alpaca_5000"),
        ("alpaca/cherry_alpaca_5_percent.json.gz", "cherry_alpaca_5_percent"),
    ],
)
def test_the_numbers_of_alpaca_are_the_published_ones(file: str, name: str, shared: Path) -> None:
    golden = json.loads((shared / "golden" / "instructions.json").read_text(encoding="utf-8"))
    facts = golden[name]
    made = convert_file(shared / "data" / file, RowFormat(), template="alpaca-en")
    with_input = [row for row in made.rows if "\n\n### Input:\n" in row["prompt"]]
    assert made.read.num_read == facts["rows"]
    assert len(with_input) == facts["nonempty_inputs"]
    empty = [1 + index for index in facts["empty_outputs"]]  # places count from 1
    assert dict(made.read.dropped) == ({'empty "output"': empty} if empty else {})
    assert sum(len(row["response"]) for row in made.rows) == facts["characters"]["output"]["total"]


def test_broken_rows_are_rejected_with_their_place_and_the_others_converted(tmp_path: Path) -> None:
    rows = [
        {"instruction": "甲", "input": "", "output": "一"},
        '{"instruction": "乙", ',
        {"instruction": "丙", "output": ""},
        {"instruction": ["丁"], "output": "四"},
        "[1]",
        {"instruction": "戊", "input": "戊", "output": "五"},
    ]
    made = convert_file(write(tmp_path / "a.jsonl", rows), RowFormat())
    assert [row["prompt"] for row in made.rows] == ["甲", "戊\n戊"]
    assert [row["id"] for row in made.rows] == ["a:1", "a:6"]
    assert made.read.num_read == 6
    assert sorted(made.read.dropped.values()) == [[2], [3], [4], [5]]
    reasons = {places[0]: reason for reason, places in made.read.dropped.items()}
    assert "broken JSON" in reasons[2]
    assert reasons[3] == 'empty "output"'
    assert "is a list" in reasons[4]
    assert "a row must be an object" in reasons[5]
    assert not any("a.jsonl" in reason for reason in reasons.values())


def test_a_file_of_broken_rows_alone_is_an_error_with_the_first_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: broken JSON"):
        convert_file(write(tmp_path / "a.jsonl", ["{broken", "[also"]), RowFormat())


def test_texts_that_are_numbers_keep_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = '{"prompt": 7.10, "response": 1e400, "history": [[1.50, 2]], "n": 1.5, "m": 1e400}'
    path.write_text(row + "\n", encoding="utf-8")
    written = tmp_path / "b.jsonl"
    made = convert_file(path, RowFormat()).rows
    written.write_text("".join(write_json(one) + "\n" for one in made), encoding="utf-8")
    again = read_rows(written, RowFormat()).kept[0]
    assert (again.prompt, again.response, again.history) == ("7.10", "1e400", (("1.50", "2"),))
    assert json.loads(written.read_text(encoding="utf-8"))["meta"] == {"n": 1.5, "m": "1e400"}
    with pytest.raises(ValueError, match="nested too deeply"):
        write_json(json.loads("[" * 900 + "]" * 900))


def test_an_answer_of_weight_0_is_rejected_with_unanswered_ones_kept(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:1]}])
    made = convert_file(path, RowFormat(), keep_unanswered=True)
    assert [(row["prompt"], row["response"]) for row in made.rows] == [("q", "")]
    assert dict(made.read.dropped) == {'weight 0 in "messages"': [1]}


def test_rows_of_weight_0_are_rejected(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "甲"},
        {"role": "assistant", "content": "一", "loss_weight": 0},
        {"role": "user", "content": "乙"},
        {"role": "assistant", "content": "二"},
    ]
    made = convert_file(write(tmp_path / "a.jsonl", [{"messages": turns}]), RowFormat())
    assert [row["response"] for row in made.rows] == ["二"]
    assert made.rows[0]["history"] == [["甲", "一"]]
    assert dict(made.read.dropped) == {'weight 0 in "messages"': [1]}


@pytest.mark.parametrize(("turns", "ids"), [("all", ["a:1.1", "a:1.2"]), ("last", ["a:1.2"])])
def test_the_id_of_a_turn_does_not_depend_on_which_are_taken(turns, ids, tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [{"conversations": CHAT}])
    assert [row["id"] for row in convert_file(path, RowFormat(turns=turns)).rows] == ids


def test_rows_without_an_answer_are_kept_on_demand(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [{"content": "甲", "summary": ""}, {"content": " ", "summary": ""}],
    )
    assert dict(convert_file(path, RowFormat()).read.dropped) == {
        'empty "summary"': [1],
        'empty "content"': [2],
    }
    made = convert_file(path, RowFormat(), keep_unanswered=True)
    assert [(row["prompt"], row["response"]) for row in made.rows] == [("甲", "")]
    assert dict(made.read.dropped) == {'empty "content"': [2]}
    back = read_rows(written(made, tmp_path / "b.jsonl"), RowFormat(), for_training=False)
    assert texts_of(back.kept) == [("甲", "", ())]
    bare = write(tmp_path / "c.jsonl", [{"content": "甲"}])
    assert len(convert_file(bare, RowFormat(), keep_unanswered=True).rows) == 1
    with pytest.raises(DataError):
        convert_file(bare, RowFormat())


# What else a row carries


def test_unused_columns_are_kept_in_meta(tmp_path: Path) -> None:
    row = {"content": "甲", "summary": "一", "score": 1.50, "tags": ["a"], "note": "", "none": None}
    made = convert_file(write(tmp_path / "a.jsonl", [row]), RowFormat())
    assert made.rows[0]["meta"] == {"score": "1.5", "tags": ["a"]}
    assert made.read.unused == {"score": 1, "tags": 1}


def test_rows_of_the_contract_keep_their_id_source_and_meta(tmp_path: Path) -> None:
    first = convert_file(
        write(tmp_path / "a.json.jsonl", [{"conversations": CHAT, "id": 7}]), RowFormat()
    )
    assert first.rows[0]["meta"] == {"id": "7"}
    again = convert_file(written(first, tmp_path / "b.jsonl"), RowFormat())
    assert again.rows == first.rows
    assert again.read.unused == {}
    more = [{**row, "score": 3} for row in first.rows]
    made = convert_file(write(tmp_path / "c.jsonl", more), RowFormat())
    assert made.rows[0]["meta"] == {"id": "7", "score": "3"}
    assert made.read.unused == {"score": 2}


def test_repeated_ids_are_numbered_and_stay_apart() -> None:
    ids = ["a:1", "a:1", "a:1+1", "a:1", "b"]
    rows = [ContractRow(id=row_id, prompt="", response="", history=[], source="", meta={})
            for row_id in ids]  # fmt: skip
    assert number_repeats(rows) == ["a:1"]
    assert [row["id"] for row in rows] == ["a:1", "a:1+2", "a:1+1", "a:1+3", "b"]


def test_placeholders_are_counted_by_row(tmp_path: Path) -> None:
    rows = [
        {"content": "你是谁", "summary": "我是 {{name}}，由 {{author}} 开发的 {{name}}。"},
        {"content": "<NAME> 是谁", "summary": "一个助手。<UNK>"},
        {"content": "写 List<T>", "summary": "a < B > c"},
    ]
    made = convert_file(write(tmp_path / "a.jsonl", rows), RowFormat())
    assert dict(made.placeholders) == {"{{name}}": [1], "{{author}}": [1], "<NAME>": [2]}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("lima/llamafactory_identity.json", {"{{name}}": 77, "{{author}}": 60}),
        ("lima/self_cognition_zh.json", {"<NAME>": 70, "<AUTHOR>": 49}),
        ("AdvertiseGen/dev.json", {}),
    ],
)
def test_placeholders_of_public_files(name: str, found: dict[str, int], shared: Path) -> None:
    made = convert_file(shared / "data" / name, RowFormat())
    assert {word: len(places) for word, places in made.placeholders.items()} == found


def test_a_history_that_holds_its_own_answer_is_noted(tmp_path: Path) -> None:
    row = {"prompt": "甲", "response": "一", "history": [["甲", "一"]]}
    assert convert_file(write(tmp_path / "a.jsonl", [row]), RowFormat()).read.leaks == [1]


def test_a_left_out_part_of_the_prompt_is_found(tmp_path: Path) -> None:
    rows = [{"instruction": "译", "input": word, "output": word} for word in "甲乙"]
    path = write(tmp_path / "a.jsonl", rows)
    named = RowFormat(prompt_column="instruction", response_column="output")
    found = convert_file(path, named).read.left_out
    assert found is not None
    assert (found.column, found.num_rows) == ("input", 2)
    assert "--input_column input" in found.remedy
    assert convert_file(path, RowFormat()).read.left_out is None


# Templates


def test_the_alpaca_template_is_the_published_text() -> None:
    assert build_alpaca("Do {it}.", "x") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Do {it}.\n\n### Input:\nx\n\n### Response:"
    )
    assert build_alpaca("Do it.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it.\n\n### Response:"
    )


def test_templates_of_alpaca_rows(tmp_path: Path) -> None:
    rows = [
        {"instruction": "译", "input": "苹果", "output": "apple"},
        {"instruction": "说", "input": "  ", "output": "好"},
        {"instruction": "", "input": "问", "output": "答"},
        {"instruction": "续", "input": "三", "output": "好", "history": [["一", "二"]]},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    made = {name: convert_file(path, RowFormat(), template=name) for name in get_args(Template)}
    prompts = {name: [row["prompt"] for row in one.rows] for name, one in made.items()}
    assert prompts["plain"] == ["译\n苹果", "说", "问", "续\n三"]
    assert prompts["round"] == ["译\n苹果", "说", "问", build_rounds("续\n三", [("一", "二")])]
    assert [row["history"] for row in made["round"].rows] == [[], [], [], []]
    for name in ("alpaca-en", "alpaca-zh"):
        pairs = [("译", "苹果"), ("说", ""), ("问", "")]
        assert prompts[name] == [build_alpaca(*pair, name) for pair in pairs]
        assert list(made[name].read.dropped.values()) == [[4]]
        assert "--template plain or round" in next(iter(made[name].read.dropped))


def test_the_system_text_stands_before_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "译", "input": "苹果", "output": "apple", "system": "用英文。"}
    made = convert_file(write(tmp_path / "a.jsonl", [row]), RowFormat(), template="alpaca-en")
    assert made.rows[0]["prompt"] == build_alpaca("用英文。\n译", "苹果")


def test_the_alpaca_template_of_every_published_row(shared: Path) -> None:
    """The rendering of train.py: prompt_input where the input is not "", else prompt_no_input."""
    path = shared / "data" / "alpaca" / "alpaca_5000.json"
    rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["output"]]
    begin = "Below is an instruction that describes a task"
    end = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    expected = [
        f"{begin}, paired with an input that provides further context. {end}{row['instruction']}"
        f"\n\n### Input:\n{row['input']}\n\n### Response:"
        if row["input"] != ""
        else f"{begin}. {end}{row['instruction']}\n\n### Response:"
        for row in rows
    ]
    made = convert_file(path, RowFormat(), template="alpaca-en")
    assert [row["prompt"] for row in made.rows] == expected
