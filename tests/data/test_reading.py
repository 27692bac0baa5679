"""Data files: every way to write rows, and a file:line for every way to get them wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ptuning.data.parsing import open_data
from ptuning.data.prompts import RowFormat
from ptuning.data.raw_file import DataError
from ptuning.data.reading import FileRows, read_rows

ROWS = [{"content": "类型#裤", "summary": "宽松"}, {"content": "类型#裙", "summary": "修身"}]


def read(path: Path, *, max_rows: int | None = None, **changes: Any) -> FileRows:
    columns = {"prompt_column": "content", "response_column": "summary", **changes}
    return read_rows(path, RowFormat(**columns), max_rows=max_rows)


def places_of(rows: FileRows) -> dict[str, list[int]]:
    return dict(rows.dropped)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def texts_of(rows: FileRows) -> list[dict]:
    return [{"content": row.prompt, "summary": row.response} for row in rows.kept]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.json", as_lines(ROWS), [1, 2]),
        ("a.jsonl", as_lines(ROWS), [1, 2]),
        ("a.JSON", as_lines(ROWS).replace("\n", "\r\n"), [1, 2]),
        ("a.json", "\n" + as_lines(ROWS).replace("\n", "\n\n"), [2, 4]),
        ("a.json", as_lines(ROWS).rstrip("\n"), [1, 2]),
        ("a.json", json.dumps(ROWS), [1, 2]),
        ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False), [2, 6]),
        ("a.json", "\ufeff" + as_lines(ROWS), [1, 2]),
        ("a.json", "\ufeff \n" + json.dumps(ROWS), [1, 2]),
        ("a.csv", "content,summary\n类型#裤,宽松\n类型#裙,修身\n", [2, 3]),
        ("a.csv", "\ufeffcontent,summary\r\n类型#裤,宽松\r\n\r\n类型#裙,修身", [2, 4]),
        ("a.csv", 'summary,content\n"宽松","类型#裤"\n修身,类型#裙\n', [2, 3]),
    ],
)
def test_every_form_gives_the_same_rows(
    tmp_path: Path, name: str, content: str, lines: list[int]
) -> None:
    rows = read(write(tmp_path / name, content))
    assert texts_of(rows) == ROWS
    assert [row.line for row in rows.kept] == lines
    assert (rows.num_read, rows.dropped) == (2, {})


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    text = "一\u2028二\u0085三"
    rows = read(write(tmp_path / "a.jsonl", as_lines([{"content": text, "summary": "四"}])))
    assert rows.kept[0].prompt == text


def test_csv_fields_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    content = 'content,summary\n"一, ""二""\n三",四\n五,六\n'
    rows = read(write(tmp_path / "a.csv", content))
    assert texts_of(rows)[0] == {"content": '一, "二"\n三', "summary": "四"}
    assert [row.line for row in rows.kept] == [2, 4]


def test_numbers_keep_their_digits(tmp_path: Path) -> None:
    content = '{"content": 1.50, "summary": 12345678901234567890}\n{"content": 1, "summary": 0}'
    rows = read(write(tmp_path / "a.json", content))
    assert texts_of(rows)[0] == {"content": "1.50", "summary": "12345678901234567890"}
    assert texts_of(rows)[1] == {"content": "1", "summary": "0"}
    long = "1" * 10_000  # more digits than Python turns into an int
    rows = read(write(tmp_path / "b.json", f'{{"content": {long}, "summary": 1}}'))
    assert rows.kept[0].prompt == long


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    content = r'{"content": "a\ud83db", "summary": "\ud83d\ude00"}'
    rows = read(write(tmp_path / "a.json", content))
    assert texts_of(rows) == [{"content": "a\ufffdb", "summary": "😀"}]


def test_rows_without_a_prompt_or_an_answer_are_counted(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        {"content": "", "summary": "a"},
        {"content": "a", "summary": None},
        {"content": "a", "summary": " \n"},
        {"content": "a"},
        {"content": None, "summary": ""},
    ]
    found = read(write(tmp_path / "a.json", as_lines(rows)))
    assert texts_of(found) == ROWS
    assert found.num_read == 7
    assert places_of(found) == {'empty "content"': [3, 7], 'empty "summary"': [4, 5, 6]}


def test_rows_to_answer_are_all_kept(tmp_path: Path) -> None:
    rows = [{"content": "a", "summary": ""}, {"content": None}, {"content": "b", "summary": "c"}]
    path = write(tmp_path / "a.json", as_lines(rows))
    found = read_rows(path, RowFormat(), for_training=False)
    assert [(row.line, row.prompt, row.response) for row in found.kept] == [
        (1, "a", ""),
        (2, "", ""),
        (3, "b", "c"),
    ]
    assert not found.dropped


def test_max_rows_counts_rows_that_are_dropped(tmp_path: Path) -> None:
    rows = [{"content": "", "summary": "a"}, *ROWS]
    found = read(write(tmp_path / "a.json", as_lines(rows) + "broken"), max_rows=2)
    assert (found.num_read, len(found.kept)) == (2, 1)
    with pytest.raises(ValueError, match="use 1 or more"):
        read(tmp_path / "a.json", max_rows=0)


# Histories


@pytest.mark.parametrize(
    ("history", "turns"),
    [
        ([["你好", "好"]], (("你好", "好"),)),
        ([["a", 1], ["", None]], (("a", "1"), ("", ""))),
        ([], ()),
        (None, ()),
        ("", ()),
        ("  ", ()),
        ('[["你好", "好"]]', (("你好", "好"),)),
    ],
)
def test_a_history_is_a_list_of_pairs(tmp_path: Path, history: object, turns: tuple) -> None:
    rows = [{**ROWS[0], "history": history}, {**ROWS[1], "history": []}]
    found = read(write(tmp_path / "a.json", as_lines(rows)), history_column="history")
    assert found.kept[0].history == turns


def test_a_row_without_the_history_field_has_none(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "history": [["a", "b"]]}, ROWS[1]]
    found = read(write(tmp_path / "a.json", as_lines(rows)), history_column="history")
    assert [row.history for row in found.kept] == [(("a", "b"),), ()]


def test_a_csv_history_is_json(tmp_path: Path) -> None:
    content = 'content,summary,history\na,b,"[[""c"", ""d""]]"\ne,f,\n'
    found = read(write(tmp_path / "a.csv", content), history_column="history")
    assert [row.history for row in found.kept] == [(("c", "d"),), ()]


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ([["a"]], "turn 1 is a list of 1 items"),
        ([["a", "b"], "c"], "turn 2 is a string"),
        ([{"x": "a"}], "turn 1 is an object"),
        ({"q": "a"}, "it is an object"),
        (True, "it is true or false"),
        ("[[", "Expecting value at column 3"),
        ('"a"', "it is a string"),
    ],
)
def test_a_history_of_another_shape_is_refused(
    tmp_path: Path, history: object, problem: str
) -> None:
    path = write(tmp_path / "a.json", as_lines([ROWS[0], {**ROWS[1], "history": history}]))
    with pytest.raises(DataError) as error:
        read(path, history_column="history")
    assert str(error.value).startswith(f"{path}:2: the history")
    assert problem in str(error.value)
    assert '[["question", "answer"], ...]' in str(error.value)


def test_a_turn_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", as_lines([{**ROWS[0], "history": [["a", ["b"]]]}]))
    with pytest.raises(DataError, match='turn 1 of the history "history" is a list'):
        read(path, history_column="history")


# Faults


@pytest.mark.parametrize(
    ("name", "content", "place", "words"),
    [
        ("a.json", as_lines(ROWS) + '{"content": "a"\n', ":3:", "broken JSON"),
        ("a.json", '{"content": "a", "summary"}\n', ":1:", "one whole object per line"),
        ("a.json", '{"content": "a\n', ":1:", "Unterminated string starting at column 13;"),
        ("a.json", '[{"content": "a', ", row 1:", "Unterminated string starting at column 14;"),
        ("a.json", '{"content": "a\tb"}\n', ":1:", "Invalid control character at column 15;"),
        ("a.json", as_lines(ROWS) + "[1]\n", ":3:", "this is a list"),
        ("a.json", '"text"\n', ":1:", "this is a string"),
        ("a.json", "[1]", ", row 1:", "a row must be an object"),
        ("a.json", "[" * 100_000, ", row 1:", "nested too deeply"),
        ("a.json", '{"content": ' + "[" * 100_000, ":1:", "nested too deeply"),
        ("a.json", '[\n{"content": "a", "summary": "b"},\n{"content": }\n]', ":3:", "column 13"),
        ("a.json", '[\n{"content": "a"},\n{"content":\n "a" "b"}]', ":4:", "begins on line 3"),
        ("a.json", '[\n{"content": "a"}\n{"content": "a"}]', ":3:", "a comma or ] is due"),
        ("a.json", '[\n{"content": "a"}\n', ":3:", "a comma or ] is due"),
        ("a.json", '[{"content": "a"},\n]', ":2:", "broken JSON"),
        ("a.json", "[{}]\n[{}]", ":2:", "text after the end"),
        ("a.json", "", ":", "no rows"),
        ("a.json", " \n\n", ":", "no rows"),
        ("a.json", "[]", ":", "no rows"),
        ("a.csv", "content,summary\n", ":1:", "no rows"),
        ("a.csv", "content,summary\na,b\na,b,c\n", ":3:", "3 fields, but the first line names 2"),
        ("a.csv", 'content,summary\n"a,b\n', ":2:", "broken CSV"),
        ("a.csv", '"content"x,summary\na,b\nc,d\n', ":1:", "broken CSV"),
        ("a.json", '{"content": ["a"], "summary": "b"}', ":1:", 'field "content" is a list'),
        ("a.json", '{"content": "a", "summary": {}}', ":1:", 'field "summary" is an object'),
        ("a.json", '{"content": "a", "summary": true}', ":1:", "is true or false"),
        ("a.xlsx", "PK", ":", "use .json, .jsonl, .csv"),
    ],
)
def test_a_fault_names_its_line_and_the_cure(
    tmp_path: Path, name: str, content: str, place: str, words: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}{place} ")
    assert words in str(error.value)


def test_a_missing_column_names_those_there_and_the_flag(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", as_lines([{"question": "a", "answer": "b"}]))
    with pytest.raises(DataError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f'{path}: no column "content"')
    assert 'The columns here are: "question", "answer".' in message
    assert "--prompt_column" in message
    with pytest.raises(DataError, match="--response_column"):
        read(path, prompt_column="question")
    with pytest.raises(DataError, match="--history_column"):
        read(path, prompt_column="question", response_column="answer", history_column="history")
    with pytest.raises(DataError, match='Was "question" meant'):
        read(path, prompt_column="Questions", response_column="answer")


def test_faults_do_not_end_the_rows_of_other_lines(tmp_path: Path) -> None:
    text = as_lines([ROWS[0]]) + "{\n" + as_lines([ROWS[1]])
    items = list(open_data(write(tmp_path / "a.json", text)).rows())
    assert [item.line for item in items] == [1, 2, 3]
    assert [isinstance(item, DataError) for item in items] == [False, True, False]
    path = write(tmp_path / "a.csv", "content,summary\na,b,c\n" + 'd,"e"f\ng,h\n')
    items = list(open_data(path).rows())
    assert [isinstance(item, DataError) for item in items] == [True, True, False]


def test_gbk_is_recognised_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"content":\n"裙让人绕圈"}'.encode("gbk"))
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: not UTF-8; it looks like GBK")
    assert f"iconv -f GB18030 -t UTF-8 {path}" in str(error.value)


def test_utf_16_and_other_bytes_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it looks like UTF-16"):
        read(write(tmp_path / "a.json", '{"content": "类型"}'.encode("utf-16")))
    with pytest.raises(DataError, match="not UTF-8, nor GBK"):
        read(write(tmp_path / "a.json", b'{"content": "\xff\xff"}'))


def test_a_path_that_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.json: cannot be read \(No such file"):
        read(tmp_path / "missing.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "folder.json")


@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.text(alphabet='{}[]",:\\u019aeE.-+\n\r tnfNI\ud800', max_size=60).map(
            lambda text: text.encode("utf-8", "surrogatepass")
        ),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
            lambda part: st.lists(part) | st.dictionaries(st.sampled_from("ab"), part),
        ).map(lambda value: json.dumps(value).encode("utf-8")),
    ),
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".txt"]),
)
@example(content=b'a,b\n"x"y,1\n', suffix=".csv")
@example(content=b"a,b\rc,d\r", suffix=".csv")
@example(content=b"a,b\n" + b"x" * 200_000 + b",1\n", suffix=".csv")
@example(content=b"a,b\n\x00,1\n", suffix=".csv")
@example(content=b'{"a": "\\ud800", "b": "c"}', suffix=".json")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_rows_or_a_data_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = write(tmp_path / f"any{suffix}", content)
    rows, error = None, None
    try:
        rows = read_rows(path, RowFormat(prompt_column="a", response_column="b"))
    except DataError as data_error:
        error = data_error
    if rows is None:
        assert str(error).startswith((f"{path}:", f"{path}, row "))
        return
    assert rows.num_read == len(rows.kept) + sum(map(len, rows.dropped.values()))
    for row in rows.kept:
        assert row.line >= 1
        for text in (row.prompt, row.response):
            assert text.strip()
            text.encode("utf-8")


def test_the_real_file_reads_whole(shared: Path) -> None:
    rows = read(shared / "data" / "AdvertiseGen" / "train_head5001.json")
    assert (rows.num_read, len(rows.kept), rows.dropped) == (5001, 5001, {})
    assert rows.kept[-1].line == 5001
