"""The data check: what it counts in a file, and that no file stops it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ptuning.data.checking.check import check_file, find_placeholders, is_fake_input
from ptuning.data.checking.findings import (
    NOTICES,
    PROBLEMS,
    FileCounts,
    Finding,
    Report,
    as_text,
    as_values,
    find_between,
    find_in_file,
)
from ptuning.data.checking.lengths import Side
from ptuning.data.dataset import CHUNK_ROWS
from ptuning.data.parsing import DataError, open_data
from ptuning.data.prompts import Example, RowFormat
from ptuning.data.reading import read_rows
from ptuning.data.tokenization import to_training_batch
from ptuning.data.tokenizer import ChatGLMTokenizer

ROWS = [{"content": "类型#裙", "summary": "简约"}, {"content": "颜色#蓝色", "summary": "条纹"}]
FORMAT = RowFormat()
CONTEXT = 2048  # tokens


def as_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check(
    path: Path,
    content: str | bytes | list[Any],
    tokenizer: ChatGLMTokenizer,
    row_format: RowFormat = FORMAT,
) -> FileCounts:
    text = as_lines(content) if isinstance(content, list) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return check_file(path, tokenizer, row_format)


def find(counts: FileCounts, context: int = CONTEXT) -> dict[str, Finding]:
    return {finding.kind: finding for finding in find_in_file(counts, context)}


def kinds(counts: FileCounts) -> set[str]:
    """Name what was found, but for characters that the small vocabulary of the tests lacks."""
    return set(find(counts)) - {"spelled_character"}


def row(content: Any = "甲", summary: Any = "乙") -> dict[str, Any]:
    return {"content": content, "summary": summary}


def test_a_clean_file_has_no_finding(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    counts = check(tmp_path / "a.json", ROWS, tokenizer)
    assert (counts.num_read, counts.num_used) == (2, 2)
    assert find(counts) == {}


# One fault each


@pytest.mark.parametrize(
    ("rows", "kind", "count", "places"),
    [
        ([*ROWS, row(""), row(None), row(" \n")], "empty_field", 3, (3, 4, 5)),
        ([*ROWS, {"content": "甲"}], "empty_field", 1, (3,)),
        ([row(), *ROWS, row(), row()], "duplicate_row", 2, (4, 5)),
        ([*ROWS, row(["a"]), [1]], "broken_row", 2, (3, 4)),
        ([*ROWS, row("甲<eop>", "[gMASK]乙")], "control_text", 1, (3,)),
        ([*ROWS, row("＜sop＞")], "control_text", 1, (3,)),
        ([*ROWS, row("甲", "a<n>b")], "control_text", 1, (3,)),
        ([*ROWS, row("甲", "<|im_start|>")], "control_text", 1, (3,)),
        ([*ROWS, row("<image_12>")], "control_text", 1, (3,)),
        ([*ROWS, row("甲", "这款<UNK>的")], "unknown_mark", 1, (3,)),
        ([*ROWS, row("<UNK>")], "unknown_mark_prompt", 1, (3,)),
        ([*ROWS, row("甲", "好\ufffd")], "lost_character", 1, (3,)),
        ([*ROWS, row("甲", "\u200b")], "no_tokens", 1, (3,)),
        ([row(), *ROWS, row("甲", "丙"), row("甲", "丁")], "several_answers", 1, (1,)),
        ([*ROWS, row("颜色", "龘")], "spelled_character", 1, (3,)),
        ([*ROWS, row("甲", "乙" * 63)], "cut_answer", 1, ()),
        ([*ROWS, row("甲" * 64)], "cut_prompt", 1, ()),
        (
            [*ROWS, row("甲", "NaN"), row("null", "None"), row("a", "N/A")],
            "missing_word",
            3,
            (3, 4, 5),
        ),
        ([*ROWS, row("我叫{{name}}"), row("乙", "我是<AUTHOR>")], "placeholder", 2, (3, 4)),
        ([*ROWS, row() | {"history": [["甲", "乙"]]}], "leak", 1, (3,)),
        ([row() | {"input": "一"}, row("甲", "丙") | {"input": "二"}], "left_out", 2, ()),
    ],
)
def test_each_fault_is_counted_where_it_is(
    tmp_path: Path,
    tokenizer: ChatGLMTokenizer,
    rows: list[Any],
    kind: str,
    count: int,
    places: tuple[int, ...],
) -> None:
    found = find(check(tmp_path / "a.json", rows, tokenizer))
    assert found[kind].count == count
    assert found[kind].places == places
    assert found[kind].is_problem == (kind in PROBLEMS)
    assert found[kind].remedy


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{{name}}和{{ 作者 }}", ["{{name}}", "{{ 作者 }}"]),
        ("我是<NAME>，由<FULL NAME>开发", ["<NAME>", "<FULL NAME>"]),
        ("<UNK> <n> <eop> <ENC> [MASK] <name> <T>", []),
        ("<TITLE>标题</TITLE><BR> vector<INT>", []),
        ("{{range .}}{{item.name}}{{end}}", []),  # Go's templates
        ("{% if a %}{{ a }}{% endif %}", []),  # Jinja's
        ("<NOINPUT>", []),  # an input that says there is none
    ],
)
def test_placeholders_are_told_from_markup(text: str, found: list[str]) -> None:
    assert find_placeholders(text) == found


@pytest.mark.parametrize("text", ["No input", "<noinput>.", "N/A", "None", "\\<noinput\\>", "无"])
def test_an_input_that_says_there_is_none_is_a_notice(
    tmp_path: Path, tokenizer: ChatGLMTokenizer, text: str
) -> None:
    task = {"instruction": "说说春天", "input": "", "output": "花开了"}
    rows = [task, task | {"instruction": "甲", "input": text}, task | {"input": "钠（Na）"}]
    found = find(check(tmp_path / "a.json", rows, tokenizer))
    assert (found["fake_input"].places, found["fake_input"].examples) == ((2,), (text,))
    assert not found["fake_input"].is_problem


def test_ordinary_brackets_are_no_control_tokens(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    rows = [row("[Round 0] x < y > z [1]", "<b>好</b> | <| |> [mask] <sos>")]
    assert find(check(tmp_path / "a.json", rows, tokenizer)) == {}


def test_control_tokens_are_listed_in_the_order_of_the_text(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    names = ["<sop>", "<n>", "[gMASK]", "<eop>", "<|tab|>"]
    found = find(check(tmp_path / "a.json", [row("".join(names))], tokenizer))
    assert found["control_text"].examples == tuple(f"{name} in 1 row" for name in names)


def test_only_the_first_places_are_kept_and_all_are_counted(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    found = find(check(tmp_path / "a.json", [row()] * 100, tokenizer))
    assert found["duplicate_row"].count == 99
    assert found["duplicate_row"].places == (2, 3, 4, 5, 6)
    assert found["duplicate_row"].examples[0] == "line 2 = line 1"


def test_answers_of_one_conversation_are_one_place(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    turns = ["甲", "乙<eop>"] * 8
    rows = [{"conversations": turns}, {"conversations": turns}]
    report = Report(("a",), find_in_file(check(tmp_path / "a.json", rows, tokenizer), CONTEXT))
    found = {finding.kind: finding for finding in report.findings}
    assert (found["control_text"].count, found["control_text"].places) == (16, (1, 2))
    assert not found["control_text"].has_more
    assert "line 2 = line 1; ...\n" in as_text(report)


def test_prompts_with_several_answers_are_in_the_order_of_the_file(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    rows = [row("甲", "一"), row("乙", "二"), row("乙", "三"), row("甲", "四")]
    found = find(check(tmp_path / "a.json", rows, tokenizer))["several_answers"]
    assert (found.places, found.examples) == ((1, 2), ("1, 4", "2, 3"))


def test_characters_without_a_token_are_named(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    counts = check(tmp_path / "a.json", [*ROWS, row("龘龘", "这件")], tokenizer)
    assert counts.words["spelled_character"]["龘"] == 2
    assert "这" not in counts.words["spelled_character"]


class WithoutBytes:
    """A vocabulary without bytes: the ids of one that has them, each byte made the unknown id."""

    byte_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: ChatGLMTokenizer) -> None:
        self.tokenizer = tokenizer
        self.unk_token_id = tokenizer.unk_token_id

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        byte_ids = set(self.tokenizer.byte_ids)
        encoded = self.tokenizer.encode_batch(texts)
        return [[self.unk_token_id if i in byte_ids else i for i in ids] for ids in encoded]


def test_characters_that_become_the_unknown_token_are_a_problem(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    without: Any = WithoutBytes(tokenizer)
    found = find(check(tmp_path / "a.json", [row("这件", "衬衫"), row("这件", "龘")], without))
    assert found["unknown_token"].places == (2,)
    assert found["unknown_token"].is_problem


# Encodings


@pytest.mark.parametrize(
    ("codec", "name", "has_mark"),
    [
        ("utf-8", "UTF-8", False),
        ("utf-8-sig", "UTF-8", True),
        ("gbk", "GBK", False),
        ("gb18030", "GBK", False),
        ("utf-16", "UTF-16", True),
        ("utf-16-le", "UTF-16", False),
        ("utf-16-be", "UTF-16", False),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_every_encoding_is_named_and_checked(
    tmp_path: Path, tokenizer: ChatGLMTokenizer, codec: str, name: str, has_mark: bool, suffix: str
) -> None:
    rows = [*ROWS, *ROWS]
    csv_text = "content,summary\n" + "".join(f"{r['content']},{r['summary']}\n" for r in rows)
    text = as_lines(rows) if suffix == ".json" else csv_text
    counts = check(tmp_path / f"a{suffix}", text.encode(codec), tokenizer)
    assert counts.decoded is not None
    assert (counts.decoded.encoding, counts.decoded.has_mark) == (name, has_mark)
    assert counts.num_used == 4
    found = find(counts)
    assert found["duplicate_row"].count == 2
    assert ("encoding" in found) == (name != "UTF-8")
    assert ("byte_order_mark" in found) == (codec == "utf-8-sig")
    if name != "UTF-8":
        assert "iconv -f " in found["encoding"].message
        with pytest.raises(DataError, match="iconv"):
            read_rows(tmp_path / f"a{suffix}", FORMAT)


@pytest.mark.parametrize("codec", ["utf-8", "gbk"])
def test_a_damaged_byte_is_located_and_the_rest_is_checked(
    tmp_path: Path, tokenizer: ChatGLMTokenizer, codec: str
) -> None:
    content = as_lines(ROWS * 3).encode(codec) + b'{"content": "\xff", "summary": "b"}\n'
    counts = check(tmp_path / "a.json", content, tokenizer)
    found = find(counts)["encoding"]
    assert counts.num_used == 7
    assert (found.places, found.is_problem) == ((7,), True)
    assert ("UTF-8" if codec == "utf-8" else "GBK") in found.remedy


# Columns and files


def test_big5_is_shown_in_both_readings(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    rows = [row("這是一個很漂亮的裙子", "適合夏天穿")] * 3
    found = find(check(tmp_path / "a.json", as_lines(rows).encode("big5"), tokenizer))
    assert "這是一個" in found["encoding"].message


# Columns and formats


@pytest.mark.parametrize(
    ("columns", "flags", "remedy"),
    [
        # every column of the prompt is named: review A1, B5, B7, B20
        ("instruction input output history", {"prompt_column": "instrution"},
         "--prompt_column instruction --input_column input --response_column output "
         "--history_column history"),
        ("prompt question target category", {},
         "--prompt_column prompt --response_column target"),
        ("context query question answer", {},
         "--prompt_column question --input_column context --response_column answer"),
        ("contents sumary", {}, "--prompt_column contents --response_column sumary"),
        ("content sumary", {"response_column": "summary"},
         "--prompt_column content --response_column sumary"),
        ("content summary", {"history_column": "histroy"},
         "--prompt_column content --response_column summary"),
        ("一 二", {}, "--prompt_column NAME --response_column NAME"),
        ("content summary", {"format": "alpaca"},
         "leave --format alpaca out, or type in its place: --prompt_column content "
         "--response_column summary"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_told_come_with_the_flags_to_type(
    tmp_path: Path, tokenizer: ChatGLMTokenizer, columns: str, flags: dict[str, Any], remedy: str
) -> None:
    rows = [dict.fromkeys(columns.split(), "甲")]
    counts = check(tmp_path / "a.json", rows, tokenizer, RowFormat(**flags))
    found = find(counts)
    assert set(found) == {"missing_column"}
    present = ", ".join(f'"{column}"' for column in columns.split())
    assert present in found["missing_column"].message
    assert found["missing_column"].remedy.endswith(remedy)
    assert (counts.num_read, counts.num_used) == (1, 0)


def test_the_columns_advised_are_read(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    rows = [{"context": "一", "query": "二", "question": "三", "answer": "四", "history": []}]
    remedy = find(check(tmp_path / "a.json", rows, tokenizer))["missing_column"].remedy
    words = remedy.removeprefix("type: ").split()
    flags = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    counts = check(tmp_path / "a.json", rows, tokenizer, RowFormat(**flags))
    assert str(counts.layout) == "columns: history + question + context -> answer"


@pytest.mark.parametrize(
    ("rows", "layout", "num_used"),
    [
        ([{"instruction": "译", "input": "梨", "output": "pear"}],
         "alpaca: instruction + input -> output", 1),
        ([{"messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"},
                        {"role": "user", "content": "丙"}, {"role": "assistant", "content": "丁"}]}],
         "messages: the turns of messages", 2),
        ([{"conversations": [{"from": "human", "value": "甲"}, {"from": "gpt", "value": "乙"}]}],
         "sharegpt: the turns of conversations", 1),
        ([{"conversations": ["甲", "乙", "丙", "丁"]}], "lima: the turns of conversations", 2),
        ([{"history": [["甲", "乙"], ["丙", "丁"]]}], "history: the turns of history", 2),
    ],
)  # fmt: skip
def test_every_format_is_found_and_said(
    tmp_path: Path, tokenizer: ChatGLMTokenizer, rows: list[Any], layout: str, num_used: int
) -> None:
    counts = check(tmp_path / "a.json", rows, tokenizer)
    assert (str(counts.layout), counts.num_used) == (layout, num_used)
    assert kinds(counts) == set()
    text = as_text(Report(("a.json",), [], counts))
    assert f"  format    {layout}\n" in text
    assert ("1 read, 2 answers in them, 2 used" in text) == (num_used == 2)
    last = check(tmp_path / "a.json", rows, tokenizer, RowFormat(turns="last"))
    assert last.num_used == 1


def test_turns_that_training_leaves_out_are_counted(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    def turn(role: str, text: str, **weight: int) -> dict[str, Any]:
        return {"role": role, "content": text} | weight

    rows = [
        [turn("user", "甲"), turn("assistant", "乙", weight=0), turn("user", "丙"),
         turn("assistant", "丁"), turn("user", "戊")],
        [turn("assistant", "己"), turn("user", "庚"), turn("assistant", "辛")],
    ]  # fmt: skip
    content: list[Any] = [{"messages": turns} for turns in rows]
    counts = check(tmp_path / "a.json", content, tokenizer)
    findings = find_in_file(counts, CONTEXT)[:3]
    assert [(one.kind, one.count, one.places) for one in findings] == [
        ("empty_field", 1, (1,)),
        ("empty_field", 1, (2,)),
        ("untrained_turn", 1, (1,)),
    ]
    assert "no answer to a question" in findings[0].message
    assert "no question before an answer" in findings[1].message
    assert "weight 0" in findings[2].message
    assert counts.num_used == 2


def test_unused_columns_are_listed_with_the_rows_that_fill_them(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    rows = [row("甲") | {"id": 1, "x": None}, row("乙") | {"id": 2}, row("丙")]
    text = as_text(Report(("a",), [], check(tmp_path / "a.json", rows, tokenizer)))
    used = "content (prompt), summary (response)"
    assert f"  columns   {used}, id (not used, filled in 2 rows), x (not used, filled in 0" in text


def test_the_remedy_for_a_column_left_out_is_taken(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    rows = [{"content": "译", "passage": word, "summary": word * 2} for word in ("梨", "桃")]
    counts = check(tmp_path / "a.json", rows, tokenizer)
    found = find(counts)["left_out"]
    assert find(counts)["several_answers"].remedy.endswith("apart: passage")
    flags = "--prompt_column content --input_column passage --response_column summary"
    assert found.remedy.endswith(flags)
    assert found.is_problem
    columns = RowFormat(prompt_column="content", input_column="passage", response_column="summary")
    assert kinds(check(tmp_path / "a.json", rows, tokenizer, columns)) == set()


def test_what_the_reader_left_out_is_a_notice(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    counts = check(tmp_path / "a.csv", "content,summary\n甲,乙\ncontent,summary\n", tokenizer)
    assert kinds(counts) == {"note"}
    assert "line 3" in find(counts)["note"].message


@pytest.mark.parametrize(
    "rows",
    [
        [{"content": "甲"}, {"content": "乙"}],
        [row("甲", ""), row("乙", None)],
        [{"content": "甲", "x": "一"}, {"content": "乙", "x": "二"}],
        [{"conversations": ["甲"]}, {"conversations": ["乙"]}],
    ],
)
def test_a_test_set_without_answers_is_checked(
    tmp_path: Path, tokenizer: ChatGLMTokenizer, rows: list[Any]
) -> None:
    counts = check(tmp_path / "a.json", [*rows, rows[0]], tokenizer)
    assert not counts.has_answers
    found = find(counts)
    assert kinds(counts) == {"no_answers", "duplicate_row"}
    assert found["no_answers"].count == 3
    assert not found["no_answers"].is_problem
    assert "nothing to do for --do_predict" in found["no_answers"].remedy
    may_be_named = "content" in rows[0] and "summary" not in rows[0]
    assert ("--response_column NAME" in found["no_answers"].remedy) == may_be_named
    assert "3 read, 3 to answer" in as_text(Report(("a",), [], counts))


def test_a_named_answer_column_that_is_not_there_is_no_test_set(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    counts = check(tmp_path / "a.json", [row()], tokenizer, RowFormat(response_column="丙"))
    assert kinds(counts) == {"missing_column", "no_answers"}  # --do_predict would answer it
    assert 'no column "丙"' in find(counts)["missing_column"].message


def test_bytes_that_are_lost_here_are_not_said_to_be_lost_before(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    (tmp_path / "a.csv").write_bytes("content,summary\ncafé,ein Text\n".encode("cp1252"))
    counts = check_file(tmp_path / "a.csv", tokenizer, RowFormat())
    assert kinds(counts) == {"encoding"}


def test_a_history_counts_as_part_of_the_prompt(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    rows = [{**row(), "history": [["问", "答<eop>"]]}, {**row(), "history": []}]
    counts = check(tmp_path / "a.json", rows, tokenizer)
    assert counts.lengths[0, 0] > counts.lengths[1, 0] + 5
    assert counts.places["control_text"] == [1]
    assert "duplicate_row" not in counts.places


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.csv", "content,summary\n", "no rows"),
        ("a.json", b"\x00\x01\x02\xff\n\xfe", "no row can be read; the first fault is"),
        ("a.xlsx", "PK", "the ending .xlsx is unknown"),
    ],
)
def test_a_file_without_rows_is_unreadable(
    tmp_path: Path, tokenizer: ChatGLMTokenizer, name: str, content: str | bytes, words: str
) -> None:
    found = find(check(tmp_path / name, content, tokenizer))
    assert set(found) == {"unreadable"}
    assert words in found["unreadable"].message


def test_a_missing_file_is_unreadable(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    counts = check_file(tmp_path / "none.json", tokenizer, FORMAT)
    assert "cannot be read (No such file" in find(counts)["unreadable"].message


def test_the_check_goes_on_after_broken_lines(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    path = tmp_path / "a.json"
    counts = check(path, as_lines(ROWS) + "{broken\n" + as_lines([row(), row([])]), tokenizer)
    assert (counts.num_used, counts.places["broken_row"]) == (3, [3, 5])
    assert counts.examples["broken_row"][0][1].startswith(f"{path}:3: broken JSON")
    csv_file = check(tmp_path / "a.csv", "content,summary\na,b,c\nd,e\n", tokenizer)
    assert (csv_file.num_used, csv_file.places["broken_row"]) == (1, [2])
    array = check(tmp_path / "b.json", '[{"content":"a","summary":"b"},\n 1,\n{"x": }]', tokenizer)
    assert (array.num_used, array.places["broken_row"]) == (1, [2, 3])


def test_a_file_of_fields_that_are_no_text_is_broken_and_no_test_set(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    counts = check(tmp_path / "a.json", [row("甲", ["乙"]), row([], "乙")], tokenizer)
    assert set(find(counts)) == {"broken_row"}
    assert "2 read, 0 used, 2 broken" in as_text(Report(("a",), [], counts))


def test_rows_of_a_one_line_array_are_numbered(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    found = find(check(tmp_path / "a.json", json.dumps([*ROWS, ROWS[0]]), tokenizer))
    assert found["duplicate_row"].examples == ("row 3 = row 1",)


# Two files


def test_shared_rows_and_prompts_are_found(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    first = check(tmp_path / "a.json", [*ROWS, row(), row("丙", "一"), row()], tokenizer)
    second = check(tmp_path / "b.json", [row("丙", "二"), row("丁"), row()], tokenizer)
    found = {finding.kind: finding for finding in find_between(first, second)}
    assert set(found) == {"shared_row", "shared_prompt"}
    assert found["shared_row"].count == 1
    assert found["shared_row"].examples == ("line 3 = line 3",)
    assert found["shared_prompt"].examples == ("line 4 = line 1",)
    assert not find_between(first, check(tmp_path / "c.json", [row("戊")], tokenizer))


# Lengths


def test_cuts_are_those_of_training(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    rows = [row("件" * n, "色" * (30 - n)) for n in range(1, 30)]
    counts = check(tmp_path / "a.json", rows, tokenizer)
    for limit in (3, 10, 17, 40):
        examples = [Example(r["content"], r["summary"], r["content"]) for r in rows]
        trained = to_training_batch(
            tokenizer, examples, max_source_length=limit, max_target_length=limit
        )
        prompts = sum(one.prompt_cut for one in trained) / len(rows)
        answers = sum(one.answer_cut for one in trained) / len(rows)
        assert [side.cut_share(limit) for side in counts.sides] == [prompts, answers]


def test_rows_of_many_chunks_keep_their_lengths(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    rows = [row(f"{n}", "色" * (n % 7 + 1)) for n in range(CHUNK_ROWS + 5)]
    counts = check(tmp_path / "a.json", rows, tokenizer)
    expected = tokenizer.encode_batch([r["summary"] for r in rows])
    assert counts.lengths[:, 1].tolist() == [len(ids) for ids in expected]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50), st.integers(3, 2000))
def test_the_length_that_is_advised_suffices(lengths: list[int], limit: int) -> None:
    side = Side("answer", "--max_target_length", limit, 2, np.array(lengths))
    assert side.cut_share(side.sufficient_limit) <= 0.01


def test_lengths_beyond_the_base_are_said_and_not_advised(
    tmp_path: Path, tokenizer: ChatGLMTokenizer
) -> None:
    rows = [row("件", "色" * 3000), *(row("件" * n, "色") for n in range(1, 99))]
    found = find(check(tmp_path / "a.json", rows, tokenizer))
    assert "the 2,048 tokens of the base model: 1 row (1.0%)" in found["beyond_context"].message
    assert not found["beyond_context"].is_problem
    short = find(check(tmp_path / "a.json", [*rows[:1], row("乙")], tokenizer))["cut_answer"].remedy
    assert short == (
        "--max_target_length 1984 cuts 50.0%; more does not fit the 2,048 tokens of the base model"
    )
    other = find(check(tmp_path / "b.json", [row("件" * 3000, "色" * 3000)], tokenizer), 1000)
    assert other["cut_prompt"].remedy.startswith("--max_source_length 500 cuts 100.0%; more")
    assert other["cut_answer"].remedy.startswith("--max_target_length 500 cuts 100.0%; more")


# Anything at all

_texts = st.text(max_size=12) | st.sampled_from(["<eop>", "<UNK>", "\ufffd", "\u200b", "龘", " "])
_turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "x"]), "content": _texts}
)
_row_lists = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "content": _texts | st.none() | st.integers(),
            "summary": _texts,
            "input": _texts,
            "history": st.just([]) | st.just([["甲", "乙"]]) | _texts,
            "messages": st.lists(_turns, max_size=3) | _texts,
        },
    ),
    max_size=6,
)
_contents = st.one_of(
    st.binary(max_size=200),
    _row_lists.map(lambda rows: json.dumps(rows).encode("utf-8")),
    st.tuples(
        _row_lists, st.sampled_from(["utf-8", "gb18030", "utf-16", "utf-8-sig"]), st.binary(max_size=3)
    ).map(lambda t: as_lines(t[0]).encode(t[1], "replace") + t[2]),
    st.text(alphabet='{}[]",:\\u019aeE.-+\n\r contesumary\ud800', max_size=80).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
)  # fmt: skip


@given(content=_contents, suffix=st.sampled_from([".json", ".jsonl", ".csv", ".txt"]))
@example(content=b'content,summary\n"x"y,1\na,b\n', suffix=".csv")
@example(content=b'"content"x,summary\na,b\n', suffix=".csv")
@example(content=b"content,summary\na\x00,b\n", suffix=".csv")
@example(content=b'{"\\ud800": "b", "content": "\\ud800", "summary": 1}', suffix=".json")
@example(content=b"[" * 100_000, suffix=".json")
@example(content=b"\xff\xfe\x00", suffix=".json")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_a_report(
    tmp_path: Path, tokenizer: ChatGLMTokenizer, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"any{suffix}"
    counts = check(path, content, tokenizer)
    report = Report((str(path),), find_in_file(counts, CONTEXT), counts)
    kinds = {finding.kind for finding in report.findings}
    assert kinds <= {*PROBLEMS, *NOTICES}
    assert ("unreadable" in kinds) == (counts.num_read == 0)
    assert all(message.startswith(str(path)) for _, message in counts.examples["broken_row"])
    assert as_text(report).startswith(str(path))
    pair = Report(("a", "b"), find_between(counts, counts))
    assert as_text(pair).startswith("a and b\n")
    json.dumps(as_values([report, pair], FORMAT, "t"))
    assert all(finding.count >= 1 and finding.remedy for finding in report.findings)
    _agrees_with_training(path, counts)


def _agrees_with_training(path: Path, counts: FileCounts) -> None:
    """Training refuses a file exactly if the check found what stops training; else rows agree."""
    stops = counts.unreadable is not None or counts.places["broken_row"] or counts.encoding_fault
    stops = stops or "missing_column" in find(counts)
    if counts.layout is not None and counts.layout.conversation is None:
        stops = stops or counts.layout.response is None  # training needs a column of answers
    try:
        rows = read_rows(path, FORMAT)
    except DataError:
        assert stops
    else:
        assert not stops
        num_used = counts.num_used if counts.has_answers else 0
        assert (rows.num_read, len(rows.kept)) == (counts.num_read, num_used)
        assert rows.left_out == counts.left_out or not counts.has_answers


# Real files


def test_the_real_file_is_known(shared: Path, real_tokenizer: ChatGLMTokenizer) -> None:
    path = shared / "data" / "AdvertiseGen" / "dev.json"
    counts = check_file(path, real_tokenizer, FORMAT)
    found = find(counts)
    assert counts.num_used == 1070
    assert found["unknown_mark"].count == 300
    assert found["duplicate_row"].examples == ("line 890 = line 889",)
    assert round(counts.sides[1].cut_share(64), 2) == 0.54


@pytest.mark.parametrize(
    ("name", "key", "num_rows"),
    [
        ("alpaca_5000.json", "alpaca_5000", 64),
        ("cherry_alpaca_5_percent.json.gz", "cherry_alpaca_5_percent", 62),
    ],
)
def test_fake_inputs_of_published_rows_are_the_known_ones(
    shared: Path, tokenizer: ChatGLMTokenizer, name: str, key: str, num_rows: int
) -> None:
    path = shared / "data" / "alpaca" / name
    known = json.loads((shared / "golden" / "instructions.json").read_text("utf-8"))[key]
    rows = [row for row in open_data(path).rows() if not isinstance(row, DataError)]
    found = [i for i, row in enumerate(rows) if is_fake_input(row.columns["input"])]
    assert found == known["fake_inputs"]["indices"]
    counts = check_file(path, tokenizer, FORMAT)
    assert counts.places["fake_input"] == [rows[i].line for i in found]
    assert len(found) == num_rows == find(counts)["fake_input"].count


@pytest.mark.parametrize(
    ("name", "num_rows", "words"),
    [
        ("self_cognition_zh.json", 74, {"<NAME>", "<AUTHOR>"}),
        ("llamafactory_identity.json", 85, {"{{name}}", "{{author}}"}),
        ("llamafactory_v1_sft_demo.jsonl.gz", 50, {"{{name}}", "{{author}}"}),
        ("lima.json", 0, set()),
    ],
)
def test_placeholders_of_published_rows_are_found(
    shared: Path, tokenizer: ChatGLMTokenizer, name: str, num_rows: int, words: set[str]
) -> None:
    path = shared / "data" / "lima" / name
    counts = check_file(path, tokenizer, FORMAT)
    assert len(counts.places["placeholder"]) == num_rows
    assert set(counts.words["placeholder"]) == words
