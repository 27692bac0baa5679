"""`python -m ptuning data convert`: what is written, what is said, what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ptuning.__main__ import main
from ptuning.commands import data_convert
from ptuning.data.prompts import RowFormat
from ptuning.data.reading import read_rows

ROWS = [
    {"instruction": "译成英文", "input": "苹果", "output": "apple"},
    {"instruction": "译成英文", "input": "梨", "output": "pear"},
    {"instruction": "你好", "input": "", "output": "你好，我是 {{name}}。"},
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def convert(*words: str) -> int:
    return main(["data", "convert", *words])


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_rows_are_written_in_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(write("a.jsonl", ROWS), "--out", "new/rows.jsonl") == 0
    assert read("new/rows.jsonl")[0] == {
        "id": "a:1",
        "prompt": "译成英文\n苹果",
        "response": "apple",
        "history": [],
        "source": "a.jsonl",
        "meta": {},
    }
    assert "苹果" in Path("new/rows.jsonl").read_text(encoding="utf-8")  # no escapes
    said = capsys.readouterr().out
    assert "a.jsonl: 3 rows read, 3 converted\n" in said
    assert "format alpaca: instruction + input -> output" in said
    assert "placeholders that were not filled in? {{name}} in 1 row (line 3)" in said
    assert "tokens are those of the embedded nano model" in said
    assert "wrote 3 rows to new/rows.jsonl, 0 rejected" in said
    rows = read_rows("new/rows.jsonl", RowFormat())
    assert [row.prompt for row in rows.kept] == ["译成英文\n苹果", "译成英文\n梨", "你好"]


def test_all_rejected_places_are_printed_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    empty = {"instruction": "甲", "output": ""}
    rows = [row for index in range(12) for row in (empty, ROWS[index % 3])]
    words = [write("a.jsonl", rows), "--out", "rows.jsonl"]
    assert convert(*words) == 0
    said = capsys.readouterr().out
    odd = ", ".join(str(line) for line in range(1, 24, 2))
    assert f'  12 rows (50.0%) rejected: empty "output" (lines {odd})' in said
    assert "wrote 12 rows to rows.jsonl, 12 rejected" in said
    assert convert(*words, "--overwrite", "--strict") == 1
    assert len(read("rows.jsonl")) == 12
    assert convert(write("b.jsonl", ROWS), "--out", "b-rows.jsonl", "--strict") == 0


def test_nothing_is_written_where_no_row_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    name = write("a.jsonl", [{"instruction": "甲", "output": ""}])
    assert convert(name, "--out", "rows.jsonl") == 2
    assert "--keep_unanswered keeps rows without an answer" in capsys.readouterr().err
    assert not Path("rows.jsonl").exists()
    assert convert(name, "--out", "rows.jsonl", "--keep_unanswered") == 0
    assert read("rows.jsonl")[0]["response"] == ""
    assert "answer it: --do_predict --test_file rows.jsonl" in capsys.readouterr().out


def test_files_and_patterns_are_joined_each_once() -> None:
    Path("one").mkdir()
    write("one/a.jsonl", ROWS[:1])
    write("a.jsonl", ROWS[1:2])
    write("b.csv", ["question,answer", "甲,一"])
    assert convert("*.jsonl", "a.jsonl", "b.csv", "one/*", "--out", "rows.json") == 0
    rows = read("rows.json")
    assert [row["prompt"] for row in rows] == ["译成英文\n梨", "甲", "译成英文\n苹果"]
    assert [row["id"] for row in rows] == ["a:1", "b:2", "a:1+1"]


def test_repeated_ids_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": "x", "prompt": "甲", "response": "一", "source": "s", "meta": {}}
    assert convert(write("a.jsonl", [row, row | {"prompt": "乙"}]), "--out", "rows.jsonl") == 0
    assert "1 id of several rows: the later ones end in +1" in capsys.readouterr().out
    assert [one["id"] for one in read("rows.jsonl")] == ["x", "x+1"]


def test_half_of_a_surrogate_pair_is_written_and_read_back() -> None:
    row = '{"content": "甲\\ud83d", "summary": "一", "note\\ud83d": "\\\\\\udc00"}'
    assert convert(write("a.jsonl", [row]), "--out", "rows.jsonl") == 0
    (made,) = read("rows.jsonl")
    assert made["prompt"] == "甲\ufffd"
    assert made["meta"] == {"note\ud83d": "\\\udc00"}


def test_the_lengths_of_adgen_are_the_measured_ones(shared, capsys) -> None:
    data = shared / "data"
    file = str(data / "AdvertiseGen" / "dev.json")
    words = [file, "--tokenizer_name", str(data / "chatglm-6b"), "--out", "rows.jsonl"]
    assert convert(*words) == 0
    said = capsys.readouterr().out
    assert "581 answers (54.3%)" in said
    assert "cut at      64     128" in said
    assert convert(*words, "--overwrite", "--max_target_length", "128") == 0
    assert "1 answer (0.1%)" in capsys.readouterr().out


def test_the_truncated_rows_are_counted_as_training_cuts_them(capsys, tmp_path) -> None:
    from ptuning.data.dataset import load_training_dataset
    from ptuning.tunings.loading import NANO_DIR, load_tokenizer

    turns = [["你好" * n, "再见" * n] for n in (1, 4, 30)]
    rows = [{"history": turns[: n + 1]} for n in range(3)]
    words = ["--max_source_length", "40", "--max_target_length", "20"]
    assert convert(write("a.jsonl", rows), "--out", "rows.jsonl", *words) == 0
    _, summary = load_training_dataset(
        "rows.jsonl",
        load_tokenizer(str(NANO_DIR)),
        RowFormat(max_source_length=40, max_target_length=20),
        cache_dir=tmp_path / "cache",
        show_progress=False,
    )
    assert 0 < summary.prompts_cut < summary.num_kept
    assert 0 < summary.answers_cut < summary.num_kept
    said = " ".join(capsys.readouterr().out.split())
    assert f"would truncate {summary.prompts_cut} prompt" in said
    assert f", {summary.answers_cut} answer" in said


def test_an_answer_without_a_token_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"content": "甲", "summary": "\u200b"}, {"content": "甲", "summary": "一"}]
    assert convert(write("a.jsonl", rows), "--out", "rows.jsonl") == 0
    assert "1 row with an answer of no token" in capsys.readouterr().out


def test_rows_that_differ_in_an_unused_column_alone_stop_it(capsys) -> None:
    columns = ["--prompt_column", "instruction", "--response_column", "output"]
    words = [write("a.jsonl", ROWS), "--out", "rows.jsonl", *columns]
    assert convert(*words) == 2
    said = capsys.readouterr()
    assert '2 rows differ only in the column "input"' in said.err
    assert "--input_column input" in said.err
    assert not Path("rows.jsonl").exists()
    assert convert(*words, "--allow_repeated_prompts") == 0
    assert "columns not used: input (filled in 2 of 3 rows)" in capsys.readouterr().out
    assert read("rows.jsonl")[0]["meta"] == {"input": "苹果"}


def test_an_existing_file_is_kept_unless_overwritten(capsys) -> None:
    words = [write("a.jsonl", ROWS), "--out", "rows.jsonl"]
    assert convert(*words) == 0
    before = Path("rows.jsonl").read_bytes()
    assert convert(*words) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert convert(*words, "--overwrite") == 0
    assert Path("rows.jsonl").read_bytes() == before


def test_an_input_is_never_overwritten(capsys) -> None:
    before = Path(write("a.jsonl", ROWS)).read_bytes()
    Path("link.jsonl").symlink_to("a.jsonl")
    for out in ("a.jsonl", "./a.jsonl", "link.jsonl"):
        assert convert("*.jsonl", "--out", out, "--overwrite") == 2
        assert f"--out is {Path(out)}, which is read as well" in capsys.readouterr().err
    assert Path("a.jsonl").read_bytes() == before


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, capsys) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    write("a.jsonl", ROWS)
    for place, name in (
        (data_convert, "convert_file"),
        (data_convert, "load_tokenizer"),
        (os, "fsync"),
        (os, "replace"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupt)
            assert convert("a.jsonl", "--out", "rows.jsonl") == 130
        assert capsys.readouterr().err == "ptuning data: interrupted.\n"
        assert [path.name for path in Path().iterdir()] == ["a.jsonl"]


def test_a_mixture_is_drawn_by_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", [{"content": f"甲{n}", "summary": "一"} for n in range(100)])
    write("b.jsonl", [{"question": f"乙{n}", "answer": "二"} for n in range(30)])
    mix = ["--mix", "a.jsonl:0.7,b.jsonl:0.3"]
    for out, more in (("1.jsonl", []), ("2.jsonl", []), ("3.jsonl", ["--seed", "7"])):
        assert convert(*mix, "--total", "50", "--out", out, *more) == 0
    said = capsys.readouterr().out
    assert "mixture of 50 rows, seed 42; without repeats at most 101\n" in said
    assert "  35 (70.0%) of the 100 of a.jsonl\n" in said
    assert "  15 (30.0%) of the 30 of b.jsonl\n" in said
    assert Path("1.jsonl").read_bytes() == Path("2.jsonl").read_bytes()
    assert Path("1.jsonl").read_bytes() != Path("3.jsonl").read_bytes()
    assert sum(row["prompt"].startswith("乙") for row in read("1.jsonl")) == 15
    assert convert(*mix, "--out", "4.jsonl") == 0
    assert len(read("4.jsonl")) == 101
    capsys.readouterr()
    assert convert(*mix, "--total", "200", "--out", "5.jsonl") == 0
    said = capsys.readouterr().out
    assert "  60 (30.0%) of the 30 of b.jsonl: each 2 times\n" in said
    assert "  140 (70.0%) of the 100 of a.jsonl: each once, 40 of them once more\n" in said
    ids = [row["id"] for row in read("5.jsonl")]
    assert len(set(ids)) == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["*.json"], "[*].json: no file matches this pattern"),
        ([], "no file is given; give files, or --mix"),
        (["a.jsonl", "--mix", "a.jsonl:0.5,a.jsonl:0.5"], "and a.jsonl is given too"),
        (["a.jsonl", "--total", "5"], "--total is 5, and only --mix draws"),
        (["--mix", "a.jsonl:0.5,a.jsonl:0.5", "--total", "0"], "--total is 0; use 1 or more"),
        (["--mix", "a.jsonl:0.5,a.jsonl:0.4"], "= 0.9; make them sum to 1"),
        (
            ["--mix", "a.jsonl:0.5,a.jsonl:0.5", "--input_column", "input"],
            "--input_column is input",
        ),
        (["a.jsonl", "--max_target_length", "2"], "--max_target_length is 2; use 3 or more"),
        (["a.jsonl", "--tokenizer_name", "/no/folder"], "--tokenizer_name is /no/folder"),
        (["a.jsonl", "--format", "lima"], "--format lima needs a column"),
        (["a.jsonl", "--format", "alpaca", "--prompt_column", "input"], "leave one of them out"),
        (["a.jsonl", "--prompt_column", "prompt"], 'no column "prompt"'),
    ],
)
def test_wrong_command_lines_are_refused_in_one_line(words, message, capsys) -> None:
    write("a.jsonl", ROWS)
    assert convert(*words, "--out", "rows.jsonl") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message.replace("[*]", "*") in said
    assert not Path("rows.jsonl").exists()


@pytest.mark.parametrize("out", ["rows.csv", "rows", "folder.jsonl", "a.jsonl/rows.jsonl"])
def test_a_name_that_rows_cannot_be_read_from_is_refused(out, capsys) -> None:
    Path("folder.jsonl").mkdir()
    assert convert(write("a.jsonl", ROWS), "--out", out) == 2
    assert f"--out is {out}" in capsys.readouterr().err


@pytest.mark.parametrize("named", [False, True])
def test_the_validation_file_is_named_where_its_columns_were(
    capsys: pytest.CaptureFixture[str], named: bool
) -> None:
    path = write("a.jsonl", [{"content": "甲", "summary": "乙"}])
    columns = ["--prompt_column", "content", "--response_column", "summary"] if named else []
    assert convert(path, *columns, "--out", "rows.jsonl") == 0
    assert ("(convert the validation file too)" in capsys.readouterr().out) == named
