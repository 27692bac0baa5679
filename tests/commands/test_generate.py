"""`python -m ptuning generate`: its flags, and what is said of those that cannot work."""

import json

import pytest

from ptuning import __main__ as program
from ptuning.commands import asking_flags
from ptuning.instruct.templates import TEMPLATES
from tests.completions.scripted import ScriptedSource

ENDPOINT = ["--endpoint", "http://127.0.0.1:9", "--model", "any"]  # where nothing answers


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Files to name, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    (tmp_path / "gbk.txt").write_bytes("地理".encode("gbk"))
    (tmp_path / "questions.jsonl").write_text('{"instruction": "Say why."}\n', encoding="utf-8")
    half = '{"instruction": "Say why.", "output": "a"}\n{"instruction": "Say how.", "output": ""}\n'
    (tmp_path / "half.jsonl").write_text(half, encoding="utf-8")
    no_instance = '{"id": "1", "instruction": "Say why.", "instances": []}\n'
    (tmp_path / "no_instance.jsonl").write_text(no_instance, encoding="utf-8")
    (tmp_path / "folder.jsonl").mkdir()
    return tmp_path


def refused(capsys, *arguments):
    """Return the one line about arguments that cannot work; nothing is written."""
    given = ["generate", *arguments]
    if "--out" not in arguments:
        given += ["--out", "new.jsonl"]
    assert program.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("ptuning generate: ")


@pytest.fixture
def scripted(monkeypatch):
    """The source that stands in for the model of this process."""
    source = ScriptedSource()
    monkeypatch.setattr("ptuning.commands.generate._open_source", lambda arguments: source)
    return source


@pytest.mark.parametrize(
    ("flag", "value", "needed"),
    [
        *((flag, "0", "1 or more") for flag in ("num", "tasks_per_request", "max_new_tokens")),
        *((flag, "0", "1 or more") for flag in ("concurrency", "max_requests")),
        *((flag, "-1", "0 or more") for flag in ("examples", "machine_examples")),
        *(("rouge_threshold", value, "more than 0, and 1 at most") for value in ("0.0", "1.1")),
        ("rouge_threshold", "nan", "more than 0, and 1 at most"),
        *(("top_p", value, "more than 0, and 1 at most") for value in ("0.0", "1.5", "nan")),
        *(("temperature", value, "0 (greedy) or more") for value in ("-1.0", "nan", "inf")),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_needed(capsys, flag, value, needed):
    said = refused(capsys, f"--{flag}", value, *ENDPOINT)
    assert said.removeprefix("--").startswith(f"{flag} is {value}; use {needed}")


def test_nothing_is_written_for_a_wrong_flag(capsys, folder):
    before = sorted(folder.iterdir())
    refused(capsys, "--temperature", "-1", *ENDPOINT)
    refused(capsys, *ENDPOINT)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("out", ["new.json", "new", ".jsonl"])
def test_out_ends_in_jsonl(capsys, out):
    said = refused(capsys, "--out", out, *ENDPOINT)
    assert said == f"--out is {out}; name a file that ends in .jsonl."


def test_out_is_not_a_folder_or_a_file_of_something_else(capsys, scripted, folder):
    (folder / "mine.jsonl").write_text("{}\n")
    said = refused(capsys, "--out", "mine.jsonl")
    assert said.startswith("--out mine.jsonl exists and is not of this command")
    assert refused(capsys, "--out", "folder.jsonl").startswith("--out is folder.jsonl, a folder")
    for other in ("mine.jsonl", "a.jsonl", "a.requests.jsonl", "folder.jsonl"):
        said = refused(capsys, "--out", "a.jsonl", "--alpaca_json", other)
        assert said == f"--alpaca_json {other} exists or is in use; give another name."
    assert scripted.asks == []


@pytest.mark.parametrize("flag", ["--topics", "--blocklist"])
@pytest.mark.parametrize(
    ("file", "fault"),
    [
        ("blank.txt", "has no text; write one entry on each line."),
        ("none.txt", "cannot be read (No such file or directory)."),
        ("gbk.txt", "is not UTF-8 text ('utf-8' codec can't decode"),
        ("folder.jsonl", "cannot be read ("),
    ],
)
def test_a_list_that_cannot_be_read_is_named_with_its_flag(capsys, flag, file, fault):
    assert refused(capsys, flag, file, *ENDPOINT).startswith(f"{flag} {file} {fault}")


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        ("none.jsonl", "cannot be read (No such file or directory)"),
        ("folder.jsonl", "it is a folder"),
        ("blank.txt", "blank.txt: "),
        ("questions.jsonl", "seeds need columns"),
        ("half.jsonl", "every seed needs an instruction and an output: 1 row (50.0%)"),
        ("no_instance.jsonl", "no_instance.jsonl:1: needs an instruction and instances"),
    ],
)
def test_seeds_are_whole_tasks_in_files_that_can_be_read(capsys, file, fault):
    said = refused(capsys, "--template", "en", "--seeds", file, *ENDPOINT)
    assert said.startswith(file)
    assert fault in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "x"], "--model is for --endpoint URL; give that too, or leave it out."),
        (["--api_key_env", "X"], "--api_key_env is for --endpoint URL; give that too, or"),
        ([*ENDPOINT, "--model_name_or_path", "x"], "--model_name_or_path loads a model in this"),
        ([*ENDPOINT, "--prefix", "x"], "--prefix loads a model in this process; leave it out with"),
        ([*ENDPOINT, "--quantization_bit", "4"], "--quantization_bit loads a model in this"),
        ([*ENDPOINT, "--template", "magpie"], "--template magpie leaves a user's turn open"),
        (["--template", "magpie", "--seeds", "half.jsonl"], "--seeds has no use with --template"),
        (["--template", "magpie", "--topics", "topics.txt"], "--topics has no use with --template"),
        (["--template", "magpie", "--tasks_per_request", "2"], "--tasks_per_request has no use"),
        (["--model_name_or_path", "none"], "--model_name_or_path is none, which is not a folder"),
        (["--prefix", "none"], "none does not exist, so it has no prefix"),
        (["--prefix", "folder.jsonl"], "folder.jsonl has no prefix"),
    ],
)
def test_flags_that_do_not_go_together_are_named(capsys, folder, arguments, said):
    (folder / "topics.txt").write_text("rivers\n", encoding="utf-8")
    assert refused(capsys, *arguments).startswith(said)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--num", "many"], ["--template", "fr"], ["--api", "soap"], ["--seeds"]),
        *(["--quantization_bit", "3"], ["--no_such_flag"]),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_argparse_refuses_is_status_2_and_names_the_flag(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        program.main(["generate", "--out", "new.jsonl", *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


def test_out_is_needed(capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(["generate"])
    assert caught.value.code == 2
    assert "--out" in capsys.readouterr().err.splitlines()[-1]


def test_the_templates_of_the_flag_are_those_there_are():
    assert list(asking_flags.TASK_TEMPLATES) == list(TEMPLATES)


def test_help_names_every_flag_its_default_and_the_exit_status(capsys):
    with pytest.raises(SystemExit, match="0"):
        program.main(["generate", "--help"])
    text = capsys.readouterr().out
    for flag in (
        *("out", "num", "template", "seeds", "alpaca_json", "model_name_or_path", "prefix"),
        *("quantization_bit", "endpoint", "model", "api", "api_key_env", "timeout", "examples"),
        *("machine_examples", "tasks_per_request", "topics", "temperature", "top_p"),
        *("max_new_tokens", "concurrency", "seed", "max_requests", "rouge_threshold", "blocklist"),
    ):
        assert f"--{flag}" in text
    assert "Exit status: 0 when --num rows are there, 1 when fewer could be made." in text


def test_hyphens_do_as_well_where_the_words_are_of_the_method(scripted, folder):
    flags = ("--machine-examples", "0", "--tasks-per-request", "4", "--template", "en")
    assert program.main(["generate", "--out", "new.jsonl", "--num", "40", *flags]) == 0
    report = json.loads((folder / "new.report.json").read_text(encoding="utf-8"))
    assert report["settings"]["machine_examples"] == 0
    assert report["settings"]["tasks_per_request"] == 4


def test_without_any_flag_the_shipped_tasks_are_shown_and_the_settings_are_the_published(
    scripted, folder
):
    assert program.main(["generate", "--out", "new.jsonl", "--max_requests", "1"]) == 1
    report = json.loads((folder / "new.report.json").read_text(encoding="utf-8"))
    assert {name: report["settings"][name] for name in list(report["settings"])[:10]} == {
        **{"template": "zh", "examples": 3, "machine_examples": 1, "tasks_per_request": 20},
        **{"topics": [], "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 3072},
        **{"concurrency": 8, "rouge_threshold": 0.7},
    }
    assert report["settings"]["seed"] == 42
    assert report["ended"] == "--max_requests 1 is used up"
    assert scripted.asks[0].prompt.count("指令：") == 4


def test_topics_and_blocked_words_are_lines_of_files(scripted, folder):
    (folder / "topics.txt").write_text("\ufeffrivers\n\n old bread \n", encoding="utf-8")
    (folder / "words.txt").write_text("Explain\nCompare\n", encoding="utf-8")
    lists = ("--topics", "topics.txt", "--blocklist", "words.txt", "--template", "en")
    command = ["generate", "--out", "new.jsonl", "--num", "12", "--tasks_per_request", "4", *lists]
    assert program.main(command) == 0
    report = json.loads((folder / "new.report.json").read_text(encoding="utf-8"))
    assert report["settings"]["topics"] == ["rivers", "old bread"]
    assert report["settings"]["blocklist"] == ["Explain", "Compare"]
    assert report["dropped"]["blocked_word"] > 0
    for line in (folder / "new.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["prompt"].split()[0] in ("Name", "Draw")


def test_seeds_of_self_instruct_are_shown(scripted, folder):
    seed = {
        "id": "seed_task_0",
        "instruction": "Name three rivers:",
        "instances": [{"input": "", "output": "Rhine, Nile, Amur"}],
        "is_classification": False,
    }
    (folder / "seeds.jsonl").write_text(json.dumps(seed) + "\n", encoding="utf-8")
    command = ["generate", "--out", "new.jsonl", "--num", "1", "--template", "en"]
    assert program.main([*command, "--seeds", "seeds.jsonl", "seeds.jsonl"]) == 0
    shown = "Instruction: Name three rivers\n1. Input:\n<noinput>\n1. Output:\nRhine, Nile, Amur\n"
    assert f"1. {shown}" in scripted.asks[0].prompt
    assert scripted.asks[0].prompt.count("Name three rivers") == 2


def test_a_terminal_gets_a_bar_with_rows_and_tokens(scripted, folder, capsys, monkeypatch):
    monkeypatch.setattr("ptuning.output.on_terminal", lambda: True)
    command = ["generate", "--out", "new.jsonl", "--num", "12", "--template", "en"]
    assert program.main(command) == 0
    bar = capsys.readouterr().err
    assert "generating with scripted: 100%" in bar
    assert "12/12" in bar
    assert " tokens]" in bar
