"""`python -m ptuning data check` and `data convert`: exit statuses, what is printed, written and refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ptuning.__main__ import main
from ptuning.commands import data
from ptuning.commands.registry import DEFAULT_PICTURE
from ptuning.data import conversion
from ptuning.data.checking.findings import NOTICES, PROBLEMS
from ptuning.data.dataset import load_training_dataset
from ptuning.data.prompts import RowFormat
from ptuning.data.reading import read_rows
from ptuning.tunings.loading import NANO_DIR, SAMPLE_DIR, load_tokenizer

CLEAN = [{"content": f"类型#裙*颜色#{c}色", "summary": f"姐妹们快看{c}色"} for c in "白黑红绿蓝"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, rows: list[Any], encoding: str = "utf-8") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    Path(name).write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return name


def test_a_clean_file_passes_and_leaves_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", write("train.json", CLEAN), "--strict"]) == 0
    text = capsys.readouterr().out
    assert "  rows      5 read, 5 used\n" in text
    assert text.endswith("1 file, 0 problems, 0 notices\n")
    assert DEFAULT_PICTURE.read_bytes().startswith(b"\x89PNG")


def test_the_sample_of_this_project_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(SAMPLE_DIR / "train.json"), str(SAMPLE_DIR / "dev.json")]
    assert main(["data", "check", *files, "--strict", "--picture", "none"]) == 0
    assert "nothing in common" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows",
    [
        [*CLEAN, CLEAN[0]],
        [*CLEAN, {"content": "", "summary": "乙"}],
        [*CLEAN, {"content": "甲<eop>", "summary": "乙"}],
        [*CLEAN, {"content": "甲", "summary": "<UNK>"}],
        [*CLEAN, '"no row"'],
        [*CLEAN, {"content": ["甲"], "summary": "乙"}],
        [*CLEAN, {"content": "甲", "summary": "我是{{name}}"}],
        [row | {"input": "一"} for row in CLEAN] + [row | {"input": "二"} for row in CLEAN],
    ],
)
def test_a_problem_fails_only_under_strict(rows: list[Any]) -> None:
    command = ["data", "check", write("a.json", rows), "--picture", "none"]
    assert main(command) == 0
    assert main([*command, "--strict"]) == 1


@pytest.mark.parametrize(
    "rows",
    [[{"question": "甲", "query": "丙", "answer": "乙"}], [{"content": [], "summary": "乙"}]],
)
def test_a_file_without_a_row_to_use_is_2(rows: list[Any]) -> None:
    assert main(["data", "check", write("a.json", rows), "--picture", "none"]) == 2


def test_a_test_set_passes_under_strict() -> None:
    path = write("a.json", [{"content": row["content"]} for row in CLEAN])
    assert main(["data", "check", path, "--picture", "none", "--strict"]) == 0


def test_a_notice_does_not_fail(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*CLEAN, {"content": CLEAN[0]["content"], "summary": "裙" * 100}]
    path = write("a.json", rows, "utf-8-sig")
    assert main(["data", "check", path, "--strict", "--picture", "none"]) == 0
    text = capsys.readouterr().out
    assert "notice   begins with a byte order mark" in text
    assert "notice   different answers to one prompt: 1 prompt, 2 rows" in text
    assert "--max_target_length 128 cuts none" in text


def test_gbk_is_named_checked_and_converted(capsys: pytest.CaptureFixture[str]) -> None:
    path = write("gbk.json", CLEAN, "gbk")
    assert main(["data", "check", path, "--strict", "--picture", "none"]) == 1
    text = capsys.readouterr().out
    assert "5 read, 5 used" in text
    assert "iconv -f GB18030 -t UTF-8 gbk.json > gbk-utf8.json" in text


def test_an_unreadable_file_is_2_and_the_others_are_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("folder.json").mkdir()
    good = write("good.json", CLEAN)
    assert main(["data", "check", "none.json", "folder.json", good, "--picture", "none"]) == 2
    text = capsys.readouterr().out
    assert "none.json: cannot be read (No such file" in text
    assert "folder.json: cannot be read: it is a folder; give its files" in text
    assert "5 read, 5 used" in text
    assert "3 files (2 without a row that can be used), 2 problems, 0 notices" in text


def test_train_and_dev_must_not_share_rows(capsys: pytest.CaptureFixture[str]) -> None:
    train = write("train.json", CLEAN)
    dev = write("dev.json", [{"content": "甲", "summary": "乙"}, CLEAN[3]])
    assert main(["data", "check", train, dev, "--strict", "--picture", "none"]) == 1
    text = capsys.readouterr().out
    assert "train.json and dev.json\n  problem  in both: 1 row\n           line 4 = line 2" in text


def test_the_flags_of_a_run_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": "那明天呢", "a": "有雨", "history": [["今天天气怎么样", "晴"]]}]
    path = write("chat.jsonl", rows)
    columns = ["--prompt_column", "q", "--response_column", "a", "--history_column", "history"]
    lengths = ["--max_source_length", "8", "--max_target_length", "40"]
    assert main(["data", "check", path, *columns, *lengths, "--picture", "none"]) == 0
    text = capsys.readouterr().out
    assert "  format    columns: history + q -> a\n" in text
    assert "q (prompt), a (response), history (history)" in text
    assert "longer than the 7 tokens of --max_source_length 8: 1 prompt" in text


def test_json_holds_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*CLEAN, CLEAN[1], {"content": "甲", "summary": "<UNK>", "\ud800": 1}]
    files = [write("a.json", CLEAN), "b.json", "none.json"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path("b.json").write_text(text, encoding="utf-8")
    assert main(["data", "check", *files, "--picture", "none", "--json", "out/found.json"]) == 2
    found = json.loads(Path("out/found.json").read_text(encoding="utf-8"))
    assert [file["rows_used"] for file in found["files"]] == [5, 7, 0]
    assert [file["readable"] for file in found["files"]] == [True, True, False]
    kinds = {one["kind"]: one for one in found["files"][1]["findings"]}
    assert kinds["duplicate_row"]["places"] == [6]
    assert kinds["unknown_mark"]["severity"] == "problem"
    assert found["pairs"][0]["files"] == ["a.json", "b.json"]
    assert found["pairs"][0]["findings"][0]["count"] == 5
    answers = found["files"][1]["lengths"]["answers"]
    assert sum(answers["histogram"]["counts"]) == 7
    assert set(answers["cut_share"]) == {"64", "128", "256", "512", "1024"}
    assert kinds["duplicate_row"]["message"] in capsys.readouterr().out


def test_json_says_what_the_columns_mean() -> None:
    path = write("a.json", [{"instruction": "译", "input": "梨", "output": "pear", "id": 1}])
    assert main(["data", "check", path, "--picture", "none", "--json", "found.json"]) == 0
    file = json.loads(Path("found.json").read_text(encoding="utf-8"))["files"][0]
    assert file["format"] == "alpaca"
    assert file["columns_used"] == {"prompt": "instruction", "input": "input", "response": "output"}
    assert file["columns"] == {"instruction": 1, "input": 1, "output": 1, "id": 1}


def test_a_pattern_stands_for_all_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.json", "b.json"):
        write(name, CLEAN[:2])
    assert main(["data", "check", "*.json", "none*.json", "--picture", "none"]) == 2
    text = capsys.readouterr().out
    assert "a.json and b.json" in text
    assert "3 files (1 without a row that can be used)" in text
    assert "none*.json: no file matches this pattern" in text


def test_a_test_set_without_answers_is_drawn_and_is_no_problem_of_reading(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write("test.json", [row | {"summary": ""} for row in CLEAN])
    assert main(["data", "check", path]) == 0
    text = capsys.readouterr().out
    assert "5 read, 5 to answer" in text
    assert "nothing to do for --do_predict" in text
    assert DEFAULT_PICTURE.is_file()


@pytest.mark.parametrize(
    ("flags", "context", "says_so"),
    [
        ([], 2048, False),
        (["--model_name_or_path", "base"], 300, False),
        (["--tokenizer_name", "nano"], 2048, True),
        (["--tokenizer_name", "nano", "--model_name_or_path", "base"], 300, False),
    ],
)
def test_the_context_is_that_of_the_base(
    flags: list[str], context: int, says_so: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(NANO_DIR, "base")
    config = json.loads(Path("base/config.json").read_text(encoding="utf-8"))
    config["max_sequence_length"] = 300
    Path("base/config.json").write_text(json.dumps(config), encoding="utf-8")
    path = write("a.json", [*CLEAN, {"content": "甲", "summary": "好" * 3000}])
    assert main(["data", "check", path, "--picture", "none", *flags]) == 0
    text = capsys.readouterr().out
    assert f"longer than the {context:,} tokens of the base model: 1 row" in text
    assert f"--max_target_length {context - 64} cuts" in text
    assert ("taken to read 2,048 tokens" in text) == says_so


def test_svg_holds_the_names_of_the_files() -> None:
    files = [write("train.json", CLEAN), write("训练.json", CLEAN)]
    assert main(["data", "check", *files, "--picture", "pictures/lengths.svg"]) == 0
    root = ElementTree.parse("pictures/lengths.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--picture", "a.gif"], "must end in .png or .svg"),
        (["--max_source_length", "2"], "--max_source_length is 2; use 3 or more"),
        (["--format", "alpaca", "--prompt_column", "content"], "leave one of them out"),
        (["--model_name_or_path", "nowhere/at-all/x"], "nowhere/at-all/x"),
    ],
)
def test_what_cannot_work_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", write("a.json", CLEAN), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ptuning data: ")
    assert words in error


def test_a_picture_in_a_place_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Path("output").write_text("a file, no folder", encoding="utf-8")
    path = write("a.json", CLEAN)
    assert main(["data", "check", path]) == 0
    assert "name one with --picture FILE" in caplog.text
    assert main(["data", "check", path, "--picture", "output/p.png"]) == 2
    assert "ptuning data: " in capsys.readouterr().err


def test_help_says_what_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["data", "check", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {kind} " in text for kind in (*PROBLEMS, *NOTICES))
    with pytest.raises(SystemExit, match="2"):
        main(["data"])


def test_the_document_names_every_kind() -> None:
    text = (SAMPLE_DIR.parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"`{kind}`" in text for kind in (*PROBLEMS, *NOTICES))


# Converting

ROWS = [
    {"instruction": "译成英文", "input": "苹果", "output": "apple"},
    {"instruction": "译成英文", "input": "梨", "output": "pear"},
    {"instruction": "你好", "input": "", "output": "你好，我是 {{name}}。"},
]


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
    folder = shared / "data"
    file = str(folder / "AdvertiseGen" / "dev.json")
    words = [file, "--tokenizer_name", str(folder / "chatglm-6b"), "--out", "rows.jsonl"]
    assert convert(*words) == 0
    said = capsys.readouterr().out
    assert "581 answers (54.3%)" in said
    assert "cut at      64     128" in said
    assert convert(*words, "--overwrite", "--max_target_length", "128") == 0
    assert "1 answer (0.1%)" in capsys.readouterr().out


def test_the_truncated_rows_are_counted_as_training_cuts_them(capsys, tmp_path) -> None:
    turns = [["你好" * n, "再见" * n] for n in (1, 4, 30)]
    rows = [{"history": turns[: n + 1]} for n in range(3)]
    words = ["--max_source_length", "40", "--max_target_length", "20"]
    assert convert(write("a.jsonl", rows), "--out", "rows.jsonl", *words) == 0
    _, summary = load_training_dataset(
        "rows.jsonl",
        load_tokenizer(str(NANO_DIR)),
        RowFormat(max_source_length=40, max_target_length=20),
        cache_dir=tmp_path / "cache",
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
        (conversion, "convert_file"),
        (data, "load_tokenizer"),
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
