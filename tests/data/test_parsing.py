"""Files as people have them: each is read whole, or refused in one line with cause and remedy."""

import gzip
import io
import json
import random
import shlex
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ptuning.data.conversion import convert_file
from ptuning.data.parsing import DataFile, open_data
from ptuning.data.prompts import RowFormat
from ptuning.data.raw_file import DataError, RawRow
from ptuning.data.reading import read_rows

ROWS = [{"content": "甲", "summary": "一"}, {"content": "乙", "summary": "二"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
MARK = "\ufeff"


def save(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def read(path: Path, content: str | bytes) -> tuple[DataFile, list[Any], list[str]]:
    """Return the file, the columns of its rows, and its faults after the path."""
    file = open_data(save(path, content))
    items = list(file.rows())
    faults = [str(item).removeprefix(str(path)) for item in items if isinstance(item, DataError)]
    return file, [item.columns for item in items if isinstance(item, RawRow)], faults


def refusal(path: Path, content: str | bytes) -> str:
    """Return the one line that says why a file is not read, without its path."""
    with pytest.raises(DataError) as error:
        open_data(save(path, content))
    message = str(error.value).removeprefix(str(path))
    assert "\n" not in message
    return message


# JSON values


def test_nan_is_an_empty_field_wherever_it_stands(tmp_path: Path) -> None:
    text = '{"content": NaN, "history": [["a", NaN]]}\n'
    for content in (text, f"[\n{text}]", f'{{"data": [{text}]}}'):
        _, rows, faults = read(tmp_path / "a.json", content)
        assert rows == [{"content": None, "history": [["a", None]]}]
        assert not faults


@pytest.mark.parametrize("value", ["Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["{}", "[[{}]]", '{{"a": {}}}'])
def test_infinity_is_a_fault_of_its_row_alone(tmp_path: Path, value: str, field: str) -> None:
    broken = '{"content": ' + field.format(value) + "}"
    good = '{"content": "a"}'
    for content, place in ((f"{good}\n{broken}\n{good}", ":2"), (f"[{good},{broken},{good}]", ", row 2")):  # fmt: skip
        _, rows, faults = read(tmp_path / "a.json", content)
        assert rows == [{"content": "a"}] * 2
        assert faults == [f"{place}: {value} is not valid JSON; write a finite number, or null."]


@pytest.mark.parametrize("row", ['{"a": "1", "b": 2, "a": 3}', '{"x": [{"a": 1, "a": 2}]}'])
def test_a_repeated_key_is_named(tmp_path: Path, row: str) -> None:
    _, rows, faults = read(tmp_path / "a.json", f"{row}\n{LINES}")
    assert (rows, len(faults)) == (ROWS, 1)
    assert faults[0].startswith(':1: the key "a" appears twice')
    _, rows, faults = read(tmp_path / "a.json", f"[\n{row},\n{row}\n]")
    assert [fault[:4] for fault in faults] == [":2: ", ":3: "]
    _, _, faults = read(tmp_path / "a.json", r'{"a\nb": 1, "a\nb": 2}')
    assert faults[0].startswith(r':1: the key "a\nb" appears twice')  # on one line
    _, _, faults = read(tmp_path / "a.json", '{\n"a": 1,\n"a": 2}')
    assert faults[0].startswith(':1: the key "a"')


# Byte order marks


def test_marks_of_joined_files_are_left_out_and_noted(tmp_path: Path) -> None:
    text = f"{MARK}{LINES}{MARK}{LINES} {MARK}{LINES}"
    file, rows, faults = read(tmp_path / "a.json", text)
    assert (rows, faults) == (ROWS * 3, [])
    assert file.decoded.has_mark
    assert file.notes == ["2 byte order marks inside the file left out (lines 3, 5)"]
    assert open_data(file.path).notes == []  # before they are met
    list(file.rows())
    assert len(file.notes) == 1  # read again, not counted again


def test_a_mark_before_an_element_is_left_out_and_one_in_a_text_stays(tmp_path: Path) -> None:
    row = json.dumps({"a": f"{MARK}x{MARK}"}, ensure_ascii=False)
    file, rows, _ = read(tmp_path / "a.json", f"[{row},\n{MARK}{row},{MARK}{row}]")
    assert rows == [{"a": f"{MARK}x{MARK}"}] * 3
    assert file.notes == ["2 byte order marks inside the file left out (line 2)"]
    csv = f'a,b\n"x\n{MARK}y",z\n{MARK}"c,d",e\n'
    file, rows, faults = read(tmp_path / "a.csv", csv)
    assert rows == [{"a": f"x\n{MARK}y", "b": "z"}, {"a": "c,d", "b": "e"}]
    assert (file.notes, faults) == (["1 byte order mark inside the file left out (line 4)"], [])


# Delimited text


@pytest.mark.parametrize(
    ("delimiter", "name"),
    [("\t", "tabs"), (";", "semicolons"), ("|", "vertical bars"), ("，", "full-width commas")],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_the_delimiter_is_that_of_the_header(
    tmp_path: Path, delimiter: str, name: str, suffix: str
) -> None:
    table = 'content#summary\n甲,#一\n"乙#"#二\n'.replace("#", delimiter)
    file, rows, faults = read(tmp_path / f"a{suffix}", table)
    values = [list(row.values()) for row in rows]
    assert values == [["甲,", "一"], [f"乙{delimiter}", "二"]]
    assert (faults, file.notes) == ([], [f"fields are separated by {name}"])
    _, _, faults = read(tmp_path / f"a{suffix}", table + delimiter * 2)
    assert faults[0] == (
        f":4: 3 fields, but the first line names 2; put quotes around fields with {name}."
    )


def test_what_is_wrong_with_tabs_is_said_of_tabs(tmp_path: Path) -> None:
    _, _, faults = read(tmp_path / "a.tsv", 'a\tb\n"x"y\tz\n')
    assert faults[0].startswith(":2: broken TSV")
    assert faults[0].endswith("put quotes around fields with tabs or quotes.")


def test_a_tsv_may_have_commas_in_its_names(tmp_path: Path) -> None:
    _, rows, _ = read(tmp_path / "a.tsv", "a, or b, or c\td\n1\t2\n")
    assert rows == [{"a, or b, or c": "1", "d": "2"}]
    _, rows, _ = read(tmp_path / "a.tsv", "a,b\n1,2\n")
    assert rows == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\n', "SEP=;\n"])
def test_the_separator_line_of_excel_is_obeyed(tmp_path: Path, first: str) -> None:
    table = f"{first}content;summary, short\n甲;一\n"
    file, rows, faults = read(tmp_path / "a.csv", table + MARK + table)
    assert rows == [{"content": "甲", "summary, short": "一"}] * 2
    assert (file.header_line, faults) == (2, [])
    assert "2 repeated header lines inside the file left out (lines 4-5)" in file.notes
    assert refusal(tmp_path / "a.csv", "sep=,\na,a\n").startswith(":2: two columns")


def test_a_field_may_be_of_any_length(tmp_path: Path) -> None:
    _, rows, faults = read(tmp_path / "a.csv", f"a,b\n{'x' * 200_000},{'y' * 131_073}\n")
    assert ([len(value) for value in rows[0].values()], faults) == ([200_000, 131_073], [])


def test_a_repeated_header_is_no_row(tmp_path: Path) -> None:
    part = "content,summary\n甲,一\n"
    file, rows, faults = read(tmp_path / "a.csv", part * 3)
    assert (rows, faults) == ([ROWS[0]] * 3, [])
    assert file.notes == ["2 repeated header lines inside the file left out (lines 3, 5)"]
    _, rows, _ = read(tmp_path / "a.csv", part + "summary,content\n二,乙\n")
    assert rows == ROWS  # in the other order, under their own names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,a\n1,2,3\n", ':1: two columns are named "a"'),
        ("a,,b\n1,2,3\n", ":1: column 2 of 3 has no name"),
        (",,\n1,2,3\n", ":1: column 2 of 3 has no name"),
        ("\n\na,a\n1,2\n", ":3: two columns"),
        ('"a"x,b\n1,2\n', ":1: broken CSV"),
        ("", ": no rows; write the names"),
        ("\n \r\n", ": no rows; write the names"),
    ],
)
def test_a_fault_of_the_header_is_on_its_line(tmp_path: Path, text: str, words: str) -> None:
    assert refusal(tmp_path / "a.csv", text).startswith(words)


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    for text in ("a,b\n", "a,b", "a,b\na,b\n"):
        _, rows, faults = read(tmp_path / "a.csv", text)
        assert (rows, len(faults)) == ([], 1)
        assert faults[0].startswith(":1: no rows, the header alone")


def test_the_index_of_pandas_is_left_out_and_noted(tmp_path: Path) -> None:
    for delimiter in (",", "\t"):
        table = "#content#summary\n0#甲#一\n1#乙#二\n".replace("#", delimiter)
        file, rows, _ = read(tmp_path / "a.csv", table)
        assert rows == ROWS
        assert "column 1 has no name and is left out" in file.notes[-1]


def test_a_txt_is_what_it_begins_with(tmp_path: Path) -> None:
    for content in (LINES, json.dumps(ROWS), "content,summary\n甲,一\n乙,二\n"):
        assert read(tmp_path / "a.txt", content)[1] == ROWS


# Whole documents

COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({k: dict(zip("01", v, strict=True)) for k, v in COLUMNS.items()}, "columns, not rows"),
        (COLUMNS, "columns, not rows"),
        ({"0": ROWS[0], "1": ROWS[1]}, "rows under their keys"),
        ({"id_7": ROWS[0], "id_9": ROWS[1]}, "rows under their keys"),
        (
            {"columns": list(COLUMNS), "index": [0, 1], "data": [list(r.values()) for r in ROWS]},
            "columns, not rows",
        ),
        ({"schema": {"fields": [{"name": "content"}]}, "data": ROWS}, 'rows under "data"'),
        ({"data": ROWS}, 'rows under "data"'),
        ({"anything": ROWS}, 'rows under "anything"'),
        ({"version": "1.0", "RECORDS": ROWS, "total": 2}, 'rows under "RECORDS"'),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_document_of_all_rows_is_read_as_rows(
    tmp_path: Path, document: dict, words: str, indent: int | None
) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    file, rows, faults = read(tmp_path / "a.json", text)
    assert (rows, faults) == (ROWS, [])
    assert (file.unit, file.notes) == ("row", [f"{words}: read as 2 rows"])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": ["q", "a"], "source": "x"},
        {"conversations": ["q", "a"]},
        {"conversations": [{"from": "human", "value": "a"}], "tools": "x"},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]},
        {"history": [["q", "a"]]},
        {"history": [], "prompt": "a", "response": "b"},
        {"prompt": "a", "documents": [{"title": "b"}], "response": "c"},
        {"input": {"text": "a", "language": "b"}, "output": {"text": "c", "language": "d"}},
        {"prompt": "a", "responses": ["b", "c"]},
        {"content": "a", "meta": {"0": "b"}},
        {},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_row_is_no_document(tmp_path: Path, row: dict, indent: int | None) -> None:
    file, rows, faults = read(tmp_path / "a.jsonl", json.dumps(row, indent=indent))
    assert (rows, faults, file.notes, file.unit) == ([row], [], [], "line")


def test_objects_over_several_lines_are_rows(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    items = list(open_data(save(tmp_path / "a.json", text)).rows())
    assert [(item.line, item.columns) for item in items] == [(1, ROWS[0]), (5, ROWS[1])]
    _, rows, faults = read(tmp_path / "a.json", text[:-1] + ' "x" }')
    assert (rows, len(faults)) == (ROWS[:1], 1)
    assert faults[0].startswith(":8: broken JSON in the row that begins on line 5")


def test_a_ragged_row_of_a_split_document_is_a_fault(tmp_path: Path) -> None:
    text = '{"columns": ["a", "b"], "data": [["1", "2"], ["3"]]}'
    _, rows, faults = read(tmp_path / "a.json", text)
    assert rows == [{"a": "1", "b": "2"}]
    assert faults[0].startswith(", row 2: a row must be an object")


def test_rows_without_lines_of_their_own_are_numbered(tmp_path: Path) -> None:
    for text in ('[{"a": "b"}, 1, {"a": "c"}]\n', '[\n{"a": "b"}, 1,\n{"a": "c"}]'):
        file, rows, faults = read(tmp_path / "a.json", text)
        assert (file.unit, len(rows)) == ("row", 2)
        assert faults[0].startswith(", row 2: a row must be")
    for text, words in (
        ('[{"a": "b"}, {"a": }]', ", row 2: broken JSON: Expecting value at column 20"),
        ('[{"a": "b"} {"a": "c"}]', ", row 1: broken JSON: a comma or ]"),
        ('[{"a": "b"}] []', ", row 1: text after the end"),
    ):
        assert read(tmp_path / "a.json", text)[2][0].startswith(words)
    file, _, faults = read(tmp_path / "a.json", '[{"a": "b"},\n1]')
    assert (file.unit, faults[0][:3]) == ("line", ":2:")


# Containers


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.gz", "a.json", "a.JSON.GZ", "a.txt.gz"])
def test_gzip_is_unpacked_whatever_the_name(tmp_path: Path, name: str) -> None:
    file, rows, _ = read(tmp_path / name, gzip.compress(LINES.encode("utf-8")))
    assert (rows, file.notes, file.is_gzip) == (ROWS, ["unpacked from gzip"], True)


def test_a_name_in_gz_need_not_be_packed(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json.gz", LINES)[1] == ROWS


def test_the_ending_before_gz_says_how_to_read(tmp_path: Path) -> None:
    table = gzip.compress("content\tsummary\n甲\t一\n".encode())
    assert read(tmp_path / "a.tsv.gz", table)[1] == ROWS[:1]
    words = ": the ending (none) before .gz is unknown; use .json, .jsonl, .csv, .tsv, .txt or"
    assert refusal(tmp_path / "a.gz", table).startswith(words)


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(random.Random(0).randbytes(500))
    assert "ends too early; download" in refusal(tmp_path / "a.json.gz", packed[:-20])
    assert "is broken (" in refusal(tmp_path / "a.json.gz", packed[:-4] + b"1234")
    assert "is broken (" in refusal(tmp_path / "a.json.gz", packed[:10] + b"\xff" * 20)
    assert "gzip twice; type: gunzip" in refusal(tmp_path / "a.json.gz", gzip.compress(packed))


def _zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "x" * 100)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_zipped("rows.json"), "a zip archive; type: unzip '{}'"),
        (_zipped(), "a zip archive"),
        (_zipped("[Content_Types].xml", "xl/workbook.xml"), 'an Office file; save the sheet as "CSV UTF-8"'),
        (_zipped("xl/worksheets/sheet1.xml"), "an Office file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an Office file of the old kind; save"),
        (b"BZh91AY&SY" + bytes(9), "packed with bzip2; type: bzip2 -dk '{}'"),
        (b"\xfd7zXZ\0" + bytes(9), "packed with xz; type: xz -dk '{}'"),
        (b"\x28\xb5\x2f\xfd" + bytes(9), "packed with zstd; type: zstd -d '{}'"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive; type: 7z x '{}'"),
        (b"Rar!\x1a\x07\x01", "a rar archive; type: unrar x '{}'"),
        (b"rows.json" + bytes(248) + b"ustar" + bytes(500), "a tar archive; type: tar xf '{}'"),
        (b"%PDF-1.7\n", "a PDF; give the table"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer, not the data; type: git lfs pull"),
        (b"\n <!DOCTYPE html>\n<html>", "a web page, not data; download the raw file"),
        (b"<html lang='en'>", "a web page, not data"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a b.json", "a b.csv", "a b.xlsx"])
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, words: str, name: str) -> None:
    path = tmp_path / name
    assert refusal(path, content).startswith(f": {words.format(path)}")
    if name != "a b.xlsx":
        assert words.format(path) in refusal(path, gzip.compress(content))


def test_what_has_no_rows_or_no_known_ending_is_refused(tmp_path: Path) -> None:
    known = "use .json, .jsonl, .csv, .tsv, .txt or .parquet, also with .gz behind it."
    assert refusal(tmp_path / "a.doc", "x") == f": the ending .doc is unknown; {known}"
    assert refusal(tmp_path / "a", "x") == f": the ending (none) is unknown; {known}"
    for content in ("", " \n", "[]", " [ ] ", MARK * 2, "\v", "\u3000\n"):
        assert refusal(tmp_path / "a.json", content).startswith(": no rows; write one JSON object")
    with pytest.raises(DataError, match="it is a folder; give its files, such as"):
        open_data(tmp_path)
    with pytest.raises(DataError, match="no file matches this pattern, seen from"):
        open_data(tmp_path / "none-*.json")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.json",
            '{"train": [{"a": 1}], "test": [{"a": 2}]}',
            'several lists of rows: "train", "t',
        ),
        ("a.json", '[\n{"a": 1},\n]', "(a comma too many before ])"),
        ("a.json", '{"a": 1,}\n', "(a comma too many before })"),
        ("a.json", "{'a': 1}\n", "(single quotes: Python's notation; json.dumps writes JSON)"),
        ("a.json", '{"a": 1}{"a": 2}\n{"a": 3}', "(a second object on the line)"),
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', "a quote that opens in this row is never closed"),
    ],
)
def test_a_usual_mistake_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(DataError) as error:
        read_rows(save(tmp_path / name, content), RowFormat())
    assert words in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "content\tsummary, in brief\nq\ta\n",
        "question (short, plain)\tanswer\nq\ta\n",
        "content,summary\nq,a\n  \t\n\x1a",
        "content,summary; short\nq,a\n",
    ],
)
def test_a_table_is_read_by_the_delimiter_that_its_rows_have(tmp_path: Path, content: str) -> None:
    rows = list(open_data(save(tmp_path / "a.csv", content)).rows())
    assert [list(row.columns.values()) for row in rows if isinstance(row, RawRow)] == [["q", "a"]]
    assert len(rows) == 1


def test_one_conversation_is_one_row_whatever_its_name_is_written_like(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = save(tmp_path / "a.json", json.dumps({"id": "1", "Messages": turns}))
    assert [row.prompt for row in read_rows(path, RowFormat()).kept] == ["q"]


def test_western_text_is_not_taken_for_chinese(tmp_path: Path) -> None:
    text = "content,summary\nit’s here,don’t go\ncafé,naïve – déjà vu\n"
    file = open_data(save(tmp_path / "a.csv", text.encode("cp1252")))
    message = str(file.encoding_fault)
    assert "not UTF-8; it looks like Windows-1252. Convert it: iconv -f CP1252 -t UTF-8" in message
    assert file.decoded.text == text


def test_the_line_that_column_names_come_from_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", "\n你好,你好呀\n谢谢,不客气\n")
    with pytest.raises(DataError, match=r"They are taken from line 2\.$"):
        read_rows(path, RowFormat())


def test_a_file_of_two_encodings_is_converted_in_parts(tmp_path: Path) -> None:
    lines = [f'{{"a": "{text}", "b": "衣服"}}\n' for text in ("你好，世界", "谢谢，再见", "早上好")]
    content = lines[0].encode() + lines[1].encode("gbk") + lines[2].encode()
    file = open_data(save(tmp_path / "a.json", content))
    assert str(file.encoding_fault).startswith(
        f"{tmp_path / 'a.json'}:2: not UTF-8, though other lines are; fix these lines, or convert"
    )
    assert file.decoded.damaged_lines == (2,)
    many = "".join(f'{{"a": "衣服很好看{index}", "b": "是的"}}\n' for index in range(500))
    file = open_data(save(tmp_path / "b.json", many.encode("gbk")))
    assert file.decoded.encoding == "GBK"


# Parquet


def test_parquet_without_pyarrow_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, content in (("a.parquet", b"x"), ("a.json", b"PAR1...")):
        assert refusal(tmp_path / name, content).endswith("-m pip install pyarrow")


def _parquet(columns: dict[str, list]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content)
    return content.getvalue()


def test_parquet_values_are_those_of_json(tmp_path: Path) -> None:
    columns = {
        "text": ["甲", None],
        "number": [12345678901234567, None],
        "share": [0.5, float("nan")],
        "flag": [True, None],
        "turns": [[{"role": "user", "n": 1}], []],
        "raw": ["乙".encode(), b""],
    }
    file, rows, faults = read(tmp_path / "a.parquet", _parquet(columns))
    turns = [{"role": "user", "n": "1"}]
    assert rows == [
        {"text": "甲", "number": "12345678901234567", "share": "0.5", "flag": True, "turns": turns, "raw": "乙"},
        {"text": None, "number": None, "share": None, "flag": None, "turns": [], "raw": ""},
    ]  # fmt: skip
    assert (file.unit, faults, file.encoding_fault) == ("row", [], None)
    _, rows, faults = read(tmp_path / "a.json", _parquet({"a": [1.0, float("inf"), 2.0]}))
    assert [row["a"] for row in rows] == ["1.0", "2.0"]
    assert faults[0].startswith(", row 2: an infinite number")
    _, _, faults = read(tmp_path / "a.parquet", _parquet({"a": [b"\xff"]}))
    assert faults[0].startswith(", row 1: bytes that are not text")


def test_nanoseconds_of_pandas_do_not_stop_a_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    content = _parquet({"a": ["x"], "when": pyarrow.array([1], pyarrow.timestamp("ns"))})
    _, rows, faults = read(tmp_path / "a.parquet", content)
    assert rows == [{"a": "x", "when": "1970-01-01 00:00:00.000000001"}]
    assert not faults


def test_parquet_that_is_broken_or_empty_is_refused(tmp_path: Path) -> None:
    whole = _parquet({"a": ["x" * 100]})
    assert "that cannot be read" in refusal(tmp_path / "a.parquet", whole[:-9])
    assert "that cannot be read" in refusal(tmp_path / "a.parquet", b"")
    assert refusal(tmp_path / "a.parquet", _parquet({"a": []})).startswith(": no rows")


# Encodings


def test_bytes_that_are_two_encodings_are_shown_in_both(tmp_path: Path) -> None:
    for codec in ("gbk", "cp950"):
        text = '{"a": "牛仔"}\n'
        file = open_data(save(tmp_path / "a.json", text.encode(codec)))
        message = str(file.encoding_fault)
        assert message.startswith(f"{tmp_path / 'a.json'}:1: not UTF-8. As GBK it reads “")
        assert "“牛仔”" in message
        assert "as Big5 it reads “" in message
        assert "convert it with the one that reads right: iconv -f GB18030" in message
        assert "or iconv -f CP950 -t UTF-8" in message


def test_hong_kong_characters_are_read_as_such(tmp_path: Path) -> None:
    text = '{"a": "嘅咗喺"}\n'
    file = open_data(save(tmp_path / "a.json", text.encode("big5hkscs")))
    assert "“嘅咗喺”" in str(file.encoding_fault)


@pytest.mark.parametrize("codec", ["gbk", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_printed_command_converts_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, packed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    text = LINES + '{"content": "嗯，这件裤子很轻便，上身显瘦，让人喜欢"}\n'
    content = text.encode(codec)
    name = "a b.json.gz" if packed else "a b.json"
    save(tmp_path / "a b-utf8.json", "mine")
    path = save(Path(name), gzip.compress(content) if packed else content)
    message = str(open_data(path).encoding_fault)
    command = message[message.index("gzip -dc" if packed else "iconv") :].split(" or ")[0]
    assert shlex.split(command)[-1] == "a b-utf8-2.json"
    subprocess.run(command, shell=True, check=True)
    assert Path("a b-utf8-2.json").read_text(encoding="utf-8") == text
    assert Path("a b-utf8.json").read_text(encoding="utf-8") == "mine"


# Any bytes at all


def _mutated(rng: random.Random, content: bytes) -> bytes:
    """Return the bytes cut, doubled, changed, joined or packed."""
    data = bytearray(content)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        piece = rng.choice(
            [b"", b'"', b"{", b"[", b"}", b"]", b",", b"\n", b"\r", b"\0", b"\t", b"\xff", b"\xef\xbb\xbf",
             b"NaN", b"Infinity", b'"a":', b"[" * 3000, b'{"a":' * 3000, b"PAR1", b"sep=;\n", rng.randbytes(3)]
        )  # fmt: skip
        data[at : at + rng.randrange(3)] = piece
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data) + 1)]
    if rng.random() < 0.1:
        data = bytearray(_cut(rng, gzip.compress(bytes(data), 1)))
    return bytes(data)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))] if rng.random() < 0.5 else content


def test_any_bytes_yield_rows_or_a_located_fault(tmp_path: Path) -> None:
    rng = random.Random(15)
    table = "content,summary\n" + "".join(f"{r['content']},{r['summary']}\n" for r in ROWS)
    seeds = [LINES, json.dumps(ROWS), json.dumps(ROWS, indent=1), json.dumps(COLUMNS), table]
    seeds += [table.replace(",", "\t"), json.dumps({"data": ROWS}), "sep=;\n" + table, ""]
    seeds += ['{"content": [], "summary": []}', '{"content": {}, "summary": {}}', '{"data": []}']
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    seeds += [json.dumps({"messages": turns, "tools": [1]}) + "\n"] * 2
    contents = [text.encode(codec) for text in seeds for codec in ("utf-8", "gbk", "utf-16")]
    if find_spec("pyarrow"):
        contents.append(_parquet(COLUMNS))
    suffixes = [".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".json.gz", ".csv.gz", ".x"]
    seen = {"rows": 0, "faults": 0, "refused": 0}
    for number in range(3000):
        content = _mutated(rng, rng.choice(contents))
        if number % 8 == 0:
            content = rng.randbytes(rng.randrange(80))
        path = save(tmp_path / f"any{rng.choice(suffixes)}", content)
        items: list[RawRow | DataError]
        try:
            file = open_data(path)
        except DataError as error:
            items = [error]
            seen["refused"] += 1
        else:
            items = list(file.rows())
            assert file.encoding_fault is None or file.encoding_fault.path == path
            seen["rows"] += sum(isinstance(item, RawRow) for item in items)
            seen["faults"] += sum(isinstance(item, DataError) for item in items)
            text = file.decoded.text
            most = text.count("\n") + text.count("\r") + 1 if file.unit == "line" else len(items)
            assert all(item.unit == file.unit for item in items)
            assert all(item.line is not None and 1 <= item.line <= most for item in items)
        assert items
        with suppress(DataError):
            assert convert_file(path, RowFormat()).num_rejected >= 0
        for item in items:
            if isinstance(item, DataError):
                assert str(item).startswith((f"{path}:", f"{path}, row "))
                assert "\n" not in str(item)
    assert min(seen.values()) > 300, seen
