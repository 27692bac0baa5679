"""`python -m ptuning data check`: exit statuses, what is printed, the picture and the JSON."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ptuning.__main__ import main
from ptuning.commands.registry import DEFAULT_PICTURE
from ptuning.data.checking.findings import NOTICES, PROBLEMS
from ptuning.tunings.loading import NANO_DIR, SAMPLE_DIR

CLEAN = [{"content": f"类型#裙*颜色#{c}色", "summary": f"姐妹们快看{c}色"} for c in "白黑红绿蓝"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, rows: list[Any], encoding: str = "utf-8") -> str:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(name).write_bytes(lines.encode(encoding))
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
        [*CLEAN, "no row"],
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
