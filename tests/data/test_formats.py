"""Every shape of rows to one: which is found, what its turns become, and what is said of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptuning.data.formats import Layout, UnknownColumns
from ptuning.data.prompts import RowFormat
from ptuning.data.raw_file import DataError, as_places
from ptuning.data.reading import FileRows, find_files, read_rows


def write(path: Path, rows: list[dict]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read(tmp_path: Path, *rows: dict, for_training: bool = True, **settings: Any) -> FileRows:
    path = write(tmp_path / "rows.jsonl", list(rows))
    return read_rows(path, RowFormat(**settings), for_training=for_training)


def contents(rows: FileRows) -> list[tuple]:
    return [(row.prompt, row.response, row.history) for row in rows.kept]


# Two columns and Alpaca


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"content": "q", "summary": "a"}, "columns: content -> summary"),
        ({"summary": "a", "content": "q", "title": "t"}, "columns: content -> summary"),
        ({"prompt": "q", "response": "a"}, "columns: prompt -> response"),
        (
            {"id": "1", "prompt": "q", "response": "a", "history": [], "meta": {}},
            "columns: history + prompt -> response",
        ),
        ({"question": "q", "answer": "a"}, "columns: question -> answer"),
        ({"Question": "q", "Answer": "a"}, "columns: Question -> Answer"),
        ({"input": "q", "target": "a"}, "columns: input -> target"),
        ({"问题": "q", "回答": "a"}, "columns: 问题 -> 回答"),
        ({"prompt": "q", "summary": "a", "history": []}, "columns: history + prompt -> summary"),
        ({"instruction": "q", "output": "a"}, "alpaca: instruction -> output"),
        (
            {"instruction": "q", "input": "", "output": "a"},
            "alpaca: instruction + input -> output",
        ),
        (
            {"system": "", "instruction": "q", "input": "", "output": "a", "history": []},
            "alpaca: system + history + instruction + input -> output",
        ),
        (
            {"instruction": "q", "context": "", "response": "a", "category": "c"},
            "alpaca: instruction + context -> response",
        ),
    ],
)
def test_columns_are_told_by_their_names(tmp_path: Path, row: dict, layout: str) -> None:
    rows = read(tmp_path, row)
    assert str(rows.layout) == layout
    assert contents(rows) == [("q", "a", ())]


def test_the_input_follows_the_instruction_on_a_new_line(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        {"instruction": "译成英文", "input": "苹果", "output": "apple"},
        {"instruction": "你好", "input": "", "output": "你好！"},
        {"instruction": "", "input": "译：梨", "output": "pear"},
        {"instruction": "再译", "input": "李", "output": "plum", "history": [["译", "好"]]},
    )
    assert [row.prompt for row in rows.kept] == ["译成英文\n苹果", "你好", "译：梨", "再译\n李"]
    assert rows.kept[3].history == (("译", "好"),)


def test_a_system_text_precedes_the_first_question(tmp_path: Path) -> None:
    turns = {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]], "system": "s"}
    rows = read(tmp_path, turns, {**turns, "history": []}, {**turns, "system": None})
    assert contents(rows) == [
        ("q2", "a2", (("s\nq1", "a1"),)),
        ("s\nq2", "a2", ()),
        ("q2", "a2", (("q1", "a1"),)),
    ]


def test_named_columns_come_first(tmp_path: Path) -> None:
    row = {"instruction": "i", "input": "x", "output": "o", "text": "t", "history": [["q", "a"]]}
    rows = read(tmp_path, row, prompt_column="instruction", response_column="output")
    assert contents(rows) == [("i", "o", ())]
    assert rows.unused == {"input": 1, "text": 1, "history": 1}
    rows = read(tmp_path, row, prompt_column="text")  # the answer is still found
    assert contents(rows) == [("t", "o", ())]
    rows = read(tmp_path, row, response_column="text")  # and here the prompt, with all its parts
    assert contents(rows) == [("i\nx", "t", (("q", "a"),))]
    rows = read(tmp_path, row, prompt_column="text", input_column="input", history_column="history")
    assert contents(rows) == [("t\nx", "o", (("q", "a"),))]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "q", "prompt": "p", "target": "a"},
            'the prompt may be "prompt" or "question"; name it with --prompt_column. The columns '
            'here are: "question", "prompt", "target".',
        ),
        ({"question": "q", "answer": "a", "output": "b"}, 'the answer may be "answer" or "output"'),
        (
            {"Contents": "q", "summary": "a"},
            "no known format; name the columns: --prompt_column Contents --response_column summary",
        ),
        ({"a": 1, "b": 2}, "--prompt_column NAME --response_column NAME. The columns here are"),
        (
            {"question": "q"},
            'there are prompts ("question") and no answers, which training and val',
        ),
        ({"instruction": "q", "reply": "a"}, 'there are prompts ("instruction") and no answers'),
    ],
)
def test_columns_that_cannot_be_told_are_to_be_named(tmp_path: Path, row: dict, said: str) -> None:
    with pytest.raises(UnknownColumns) as error:
        read(tmp_path, row)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"paragraph": "p", "question": "q", "answer": "a"}, "columns: question -> answer"),
        ({"question": "q", "answer": "a", "turns": 3}, "columns: question -> answer"),
        ({"question": "q", "answer": "a", "dialogue": ["x", "y"]}, "columns: question -> answer"),
        ({"messages": "[]", "question": "q", "answer": "a"}, "columns: question -> answer"),
    ],
)
def test_a_text_is_no_conversation(tmp_path: Path, row: dict, layout: str) -> None:
    for for_training in (True, False):
        rows = read(tmp_path, row, for_training=for_training)
        assert str(rows.layout) == layout
        assert contents(rows) == [("q", "a", ())]
    with pytest.raises(UnknownColumns, match="no known format"):
        read(tmp_path, {"turns": ["q1", "q2"], "id": 1})


def test_a_system_text_is_used_whatever_is_named(tmp_path: Path) -> None:
    row = {"system": "s", "question": "q", "prompt": "p", "answer": "a"}
    rows = read(tmp_path, row, prompt_column="question", response_column="answer")
    assert contents(rows) == [("s\nq", "a", ())]


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("alpaca", 'columns "instruction" and "output"'),
        ("sharegpt", 'a column "conversations" or "conversation" that holds a list of turns'),
        ("messages", 'a column "messages" that'),
        ("lima", 'a column "conversations" or'),
        ("history", 'a column "history" that'),
    ],
)
def test_a_format_that_is_asked_for_needs_its_columns(
    tmp_path: Path, name: str, needed: str
) -> None:
    with pytest.raises(UnknownColumns) as error:
        read(tmp_path, {"content": "q", "summary": "a"}, format=name)
    assert f"--format {name} needs {needed}" in str(error.value)


# Conversations

TURNS = [("q1", "a1"), ("q2", "a2")]
LIST_OF_TURNS = {
    "sharegpt": {
        "conversations": [
            {"from": who, "value": text}
            for pair in TURNS
            for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
    },
    "messages": {
        "messages": [
            {"role": who, "content": text}
            for pair in TURNS
            for who, text in zip(("user", "assistant"), pair, strict=True)
        ]
    },
    "lima": {"conversations": [text for pair in TURNS for text in pair], "source": "x"},
    "history": {"history": [list(pair) for pair in TURNS]},
}


@pytest.mark.parametrize("name", LIST_OF_TURNS)
@pytest.mark.parametrize("asked", [True, False])
def test_a_conversation_is_a_row_per_answer(tmp_path: Path, name: str, asked: bool) -> None:
    rows = read(tmp_path, LIST_OF_TURNS[name], format=name if asked else "auto")
    assert rows.layout.name == name
    assert contents(rows) == [("q1", "a1", ()), ("q2", "a2", (("q1", "a1"),))]
    assert (rows.num_read, rows.num_made) == (1, 2)
    last = read(tmp_path, LIST_OF_TURNS[name], turns="last")
    assert contents(last) == contents(rows)[1:]


@pytest.mark.parametrize(
    "row",
    [
        {"paragraph": [{"q": "q1", "a": "a1"}, {"q": "q2", "a": "a2"}]},
        {"conversation": [{"human": "q1", "assistant": "a1"}, {"human": "q2", "assistant": "a2"}]},
        {"conversation": [{"input": "q1", "output": "a1"}, {"input": "q2", "output": "a2"}]},
        {"messages": json.dumps(LIST_OF_TURNS["messages"]["messages"])},  # as in a CSV
        {"history": json.dumps(LIST_OF_TURNS["history"]["history"])},
    ],
)
def test_questions_and_answers_may_stand_in_pairs_or_as_json(tmp_path: Path, row: dict) -> None:
    assert contents(read(tmp_path, row)) == [("q1", "a1", ()), ("q2", "a2", (("q1", "a1"),))]


def messages(*turns: tuple[str, Any], **more: Any) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def test_a_system_turn_precedes_the_first_question(tmp_path: Path) -> None:
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    rows = read(tmp_path, messages(("system", "s"), *turns), messages(*turns, system="t"))
    assert [contents(rows)[index] for index in (0, 1, 3)] == [
        ("s\nq1", "a1", ()),
        ("q2", "a2", (("s\nq1", "a1"),)),
        ("q2", "a2", (("t\nq1", "a1"),)),
    ]
    with pytest.raises(DataError, match='"messages" has a system turn after the first'):
        read(tmp_path, messages(*turns, ("system", "s")))


def test_turns_of_one_speaker_are_joined(tmp_path: Path) -> None:
    row = messages(("user", "q"), ("user", "more"), ("assistant", "a"), ("assistant", "b"))
    assert contents(read(tmp_path, row)) == [("q\nmore", "a\nb", ())]


def test_tools_speak_as_the_user_and_calls_are_answers(tmp_path: Path) -> None:
    turns = [("human", "q"), ("function_call", "f()"), ("observation", "1"), ("gpt", "a")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": "[f]"}
    rows = read(tmp_path, row)
    assert contents(rows) == [("[f]\nq", "f()", ()), ("1", "a", (("[f]\nq", "f()"),))]
    assert str(rows.layout) == "sharegpt: tools + the turns of conversations"
    rows = read(tmp_path, row | {"tools": [{"name": "f"}], "system": "s"}, row | {"tools": "[]"})
    assert contents(rows)[0] == ('s\n[{"name": "f"}]\nq', "f()", ())
    assert contents(rows)[2] == ("q", "f()", ())


def test_tool_calls_are_written_as_function_calls(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = messages(("user", "q"), ("assistant", None), ("tool", "1"), ("assistant", "a"))
    row["messages"][1] = asked
    said = '{"name": "f", "arguments": {"x": 1}}'
    assert contents(read(tmp_path, row)) == [("q", said, ()), ("1", "a", (("q", said),))]
    asked["content"] = "let me see"
    assert read(tmp_path, row).kept[0].response == f"let me see\n{said}"


def test_an_empty_answer_is_no_earlier_turn(tmp_path: Path) -> None:
    row = messages(("user", "q1"), ("assistant", ""), ("user", "q2"), ("assistant", "a2"))
    rows = read(tmp_path, row)
    assert contents(rows) == [("q1\nq2", "a2", ())]
    assert dict(rows.dropped) == {'no answer to a question in "messages"': [1]}
    only_system = messages(("system", "s"), ("user", ""), ("assistant", "a"))
    assert dict(read(tmp_path, row, only_system).dropped) == {
        'no answer to a question in "messages"': [1],
        'no question before an answer in "messages"': [2],
    }


def test_answers_of_different_weight_are_not_joined(tmp_path: Path) -> None:
    row = messages(("user", "q"), ("assistant", "bad"), ("assistant", "good"), ("user", "r"))
    row["messages"][1]["weight"] = 0
    row["messages"].append({"role": "assistant", "content": "a"})
    rows = read(tmp_path, row)
    assert contents(rows) == [("q", "good", ()), ("r", "a", (("q", "bad\ngood"),))]
    assert dict(rows.dropped) == {'weight 0 in "messages"': [1]}


def test_a_key_that_is_null_is_no_key(tmp_path: Path) -> None:
    nothing = {"from": None, "value": None, "input": None, "output": None}
    row = messages(("user", "q"), ("assistant", "a"))
    row["messages"] = [{**nothing, **turn} for turn in row["messages"]]
    assert contents(read(tmp_path, row)) == [("q", "a", ())]


def test_the_contract_alone_hides_where_rows_come_from(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": str(n), "source": f"article {n}"} for n in range(3)]
    assert read(tmp_path, *rows).unused == {"source": 3}
    whole = [{**row, "id": str(n), "meta": {}} for n, row in enumerate(rows)]
    assert read(tmp_path, *whole).unused == {}


def test_turns_as_text_are_looked_into_too(tmp_path: Path) -> None:
    row = messages(("user", "q"), ("assistant", "a"))
    row["messages"][1]["reasoning_content"] = "because"
    as_text = {"messages": json.dumps(row["messages"])}
    assert read(tmp_path, as_text).unused == {"messages.reasoning_content": 1}


@pytest.mark.parametrize(
    "name", ["created_at", "annotator", "来源", "rejected_response", "user_name", "meta_info"]
)
def test_what_says_where_an_answer_comes_from_is_no_part_of_the_prompt(
    tmp_path: Path, name: str
) -> None:
    rows = [{"content": "q", "summary": str(n), name: f"第 {n} 个"} for n in range(5)]
    assert read(tmp_path, *rows).left_out is None


def test_a_history_may_have_roles(tmp_path: Path) -> None:
    turns = LIST_OF_TURNS["messages"]["messages"]
    row = {"prompt": "q3", "response": "a3", "history": turns}
    assert contents(read(tmp_path, row)) == [("q3", "a3", (("q1", "a1"), ("q2", "a2")))]
    with pytest.raises(DataError, match="its turns are user"):
        read(tmp_path, row | {"history": turns[:1]})


def test_text_parts_are_joined_and_other_parts_are_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    row = messages(("user", parts), ("assistant", "c"))
    assert contents(read(tmp_path, row)) == [("a\nb", "c", ())]
    image = messages(("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "c"))
    with pytest.raises(DataError, match=r'rows.jsonl:2: turn 1 of "messages" has a part of the ty'):
        read(tmp_path, row, image)


def test_what_has_no_question_no_answer_or_no_weight_is_dropped_with_its_line(
    tmp_path: Path,
) -> None:
    untrained = messages(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
    untrained["messages"][1]["weight"] = 0
    rows = read(
        tmp_path,
        untrained,
        messages(("assistant", "hello"), ("user", "q"), ("assistant", "a")),
        messages(("user", "q"), ("assistant", "a"), ("user", "and?")),
        messages(("user", "q"), ("assistant", None)),
        messages(),
    )
    assert contents(rows) == [
        ("q2", "a2", (("q1", "a1"),)),
        ("q", "a", ()),
        ("q", "a", ()),
    ]
    assert dict(rows.dropped) == {
        'weight 0 in "messages"': [1],
        'no question before an answer in "messages"': [2, 5],
        'no answer to a question in "messages"': [3, 4],
    }


def test_a_conversation_to_answer_ends_in_its_open_question(tmp_path: Path) -> None:
    row = messages(("user", "q1"), ("assistant", "a1"), ("user", "q2"))
    rows = read(tmp_path, row, for_training=False)
    assert contents(rows) == [("q1", "a1", ()), ("q2", "", (("q1", "a1"),))]
    rows = read(tmp_path, row, for_training=False, turns="last")
    assert contents(rows) == [("q2", "", (("q1", "a1"),))]
    assert contents(read(tmp_path, row, turns="last")) == [("q1", "a1", ())]  # nothing else trains
    rows = read(tmp_path, {"conversations": "q"}, for_training=False)  # LIMA's test set
    assert contents(rows) == [("q", "", ())]


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([{"role": "wizard", "content": "a"}], 'turn 1 of "messages" has the role "wizard"; use'),
        ([{"content": "a"}], 'turn 1 of "messages" has no role; use'),
        ([{"role": {}, "content": "a"}], 'turn 1 of "messages" has no role; use'),
        (
            "[{'role': 'user', 'content': 'a'}]",
            '"messages" looks like a list of turns and is not JS',
        ),
        ([{"role": "user", "content": {}}], 'turn 1 of "messages" is an object; make it a string'),
        ([["a", "b"], ["c"]], 'turn 2 of "messages" is a list of 1 items; make it a text, a pair'),
        ([{"q": "a", "a": ["b"]}], 'the answer of turn 1 of "messages" is a list'),
        ({"role": "user"}, '"messages" is an object; make it a list of turns'),
    ],
)
def test_turns_of_another_shape_are_refused(tmp_path: Path, turns: Any, said: str) -> None:
    good = LIST_OF_TURNS["messages"]
    with pytest.raises(DataError) as error:
        read(tmp_path, good, {"messages": turns})
    assert said in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: ")


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda part: (
        st.lists(part, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "type", "q", "a", "weight"]),
            part | st.sampled_from(["user", "assistant", "system", "gpt", "text"]),
        )
    ),
)
ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(
            "messages conversations history system tools prompt instruction response input".split()
        ),
        VALUES,
    ),
    max_size=4,
)


@given(rows=ROWS, for_training=st.booleans(), turns=st.sampled_from(["all", "last"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_give_rows_or_a_data_error(
    tmp_path: Path, rows: list[dict], for_training: bool, turns: Any
) -> None:
    try:
        found = read(tmp_path, *rows, for_training=for_training, turns=turns)
    except DataError:
        return
    assert found.num_made == len(found.kept) + sum(map(len, found.dropped.values()))
    assert found.num_made >= found.num_read == len(rows)
    for row in found.kept:
        for text in (row.prompt, row.response, *(part for turn in row.history for part in turn)):
            text.encode("utf-8")
        assert not for_training or (row.prompt.strip() and row.response.strip())


# What is not used


def test_columns_that_are_not_used_are_counted_where_they_are_filled(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        {"content": "q", "summary": "a", "id": 1, "tags": [], "title": " "},
        {"content": "r", "summary": "b", "id": 0, "tags": ["x"]},
    )
    assert rows.unused == {"id": 2, "tags": 1}


def test_what_turns_hold_besides_texts_is_counted(tmp_path: Path) -> None:
    row = messages(("user", "q"), ("assistant", "a"))
    row["messages"][1] |= {"reasoning_content": "because", "name": "x", "refusal": None}
    assert read(tmp_path, row, row).unused == {"messages.reasoning_content": 2}


TRANSLATIONS = [
    {"instruction": "译成英文", "input": "苹果", "output": "apple"},
    {"instruction": "译成英文", "input": "梨", "output": "pear"},
    {"instruction": "你好", "input": "", "output": "你好！"},
]
NAMED = {"prompt_column": "instruction", "response_column": "output"}


def test_a_part_of_the_prompt_that_is_left_out_is_found(tmp_path: Path) -> None:
    found = read(tmp_path, *TRANSLATIONS, **NAMED).left_out
    flags = "--prompt_column instruction --input_column input --response_column output"
    assert found == ("input", 2, flags)
    assert found.remedy == f"use it: {flags}"
    assert read(tmp_path, *TRANSLATIONS).left_out is None
    chats = [
        {"prompt": "那明天呢？", "response": str(day), "history": [[f"{day}?", "晴"]]}
        for day in range(2)
    ]
    found = read(tmp_path, *chats, prompt_column="prompt").left_out
    assert found is not None
    assert found[2].endswith("--response_column response --history_column history")


def test_repeated_prompts_alone_are_no_fault(tmp_path: Path) -> None:
    rows = [{"content": "类型#裤", "summary": str(n), "id": n, "title": f"t {n}"} for n in range(9)]
    assert read(tmp_path, *rows).left_out is None
    with_source = [{**row, "source": f"{n} {n}"} for n, row in enumerate(rows)]
    assert read(tmp_path, *with_source).left_out is None
    with_text = [{**row, "正文": f"第{n}篇"} for n, row in enumerate(rows)]
    found = read(tmp_path, *with_text).left_out
    assert found is not None
    assert found[:2] == ("正文", 9)
    # one such pair among many rows may be chance
    many = [
        {"content": str(n // 2 if n < 2 else n), "summary": "a", "正文": f"第{n}"}
        for n in range(40)
    ]
    assert read(tmp_path, *many).left_out is None


def test_a_history_that_holds_the_answer_is_counted(tmp_path: Path) -> None:
    leaking = {"prompt": "甲", "response": "乙", "history": [["甲", "乙"]]}
    fine = {"prompt": "丙", "response": "丁", "history": [["甲", "乙"]]}
    assert read(tmp_path, leaking, fine, leaking).leaks == [1, 3]
    again = {"history": [["甲", "乙"], ["甲", "乙"]]}  # a conversation may repeat itself
    assert read(tmp_path, again).leaks == []


# Places and files


def test_places_are_ranges() -> None:
    assert as_places([1, 1, 2, 4], "line") == "lines 1-2, 4"
    assert as_places([5, 5], "line") == "line 5"
    assert as_places(range(1, 99, 2), "row") == "rows 1, 3, 5, 7, 9, ..."
    assert as_places(range(1, 15, 2), "row", most=None) == "rows 1, 3, 5, 7, 9, 11, 13"


def test_a_pattern_names_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.json", "a.json", "[c].json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert find_files("?.json") == [Path("a.json"), Path("b.json")]
    assert find_files("[c].json") == [Path("[c].json")]  # a file of that name comes first
    assert find_files("*.csv") == [Path("*.csv")]
    assert find_files("missing.json") == [Path("missing.json")]


# Public files


@pytest.mark.parametrize(
    ("name", "layout", "counts"),
    [
        ("alpaca/alpaca_5000.json", "alpaca", (5000, 5000, 4998)),
        ("alpaca/cherry_alpaca_5_percent.json.gz", "alpaca", (3111, 3111, 3111)),
        ("lima/lima.json", "alpaca", (1029, 1029, 1029)),
        ("lima/oaast_sft_zh.json.gz", "alpaca", (689, 689, 689)),
        ("lima/llamafactory_alpaca_en_demo.json", "alpaca", (999, 999, 999)),
        ("lima/llamafactory_alpaca_zh_demo.json", "alpaca", (1000, 1000, 1000)),
        ("lima/llamafactory_glaive_toolcall_en_demo.json.gz", "sharegpt", (300, 957, 957)),
        ("lima/llamafactory_glaive_toolcall_zh_demo.json.gz", "sharegpt", (300, 940, 940)),
        ("lima/llamafactory_v1_sft_demo.jsonl.gz", "messages", (500, 500, 500)),
        ("lima/self_cognition_zh.json", "alpaca", (80, 80, 80)),
        ("AdvertiseGen/dev.json", "columns", (1070, 1070, 1070)),
    ],
)
def test_public_files_are_read_whole(shared: Path, name: str, layout: str, counts: tuple) -> None:
    rows = read_rows(shared / "data" / name, RowFormat())
    assert rows.layout.name == layout
    assert (rows.num_read, rows.num_made, len(rows.kept)) == counts


def test_alpacas_empty_outputs_are_the_known_ones(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "instructions.json").read_bytes())["alpaca_5000"]
    rows = read_rows(shared / "data" / "alpaca" / "alpaca_5000.json", RowFormat())
    known = [index + 1 for index in golden["empty_outputs"]]
    assert (rows.unit, dict(rows.dropped)) == ("row", {'empty "output"': known})
    assert isinstance(rows.layout, Layout)
    source = json.loads((shared / "data" / "alpaca" / "alpaca_5000.json").read_bytes())
    joined = sum(bool(row["input"]) for row in source)
    assert joined == golden["nonempty_inputs"]
    with_input = [row for row, one in zip(source, range(5000), strict=True) if row["input"]]
    prompts = {row.prompt for row in rows.kept}
    assert {f"{row['instruction']}\n{row['input']}" for row in with_input} <= prompts
