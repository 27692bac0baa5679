import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ptuning import __main__ as program
from ptuning.commands.registry import COMMANDS, Command


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_explains_itself(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(command.load())
    with pytest.raises(SystemExit, match="0"):
        program.main([command.name, "--help"])
    assert command.help in " ".join(capsys.readouterr().out.split())


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{command.name} " in text and command.help in text for command in COMMANDS)


def test_no_command_gets_one_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = [" ".join(line.split()) for line in said.err.splitlines()]
    assert [line for line in lines if line in {f"{c.name} {c.help}" for c in COMMANDS}] == [
        f"{c.name} {c.help}" for c in COMMANDS
    ]
    assert all(len(line) <= 100 for line in said.err.splitlines())
    assert "python -m ptuning COMMAND --help" in said.err


@pytest.mark.parametrize(
    "arguments", [["fly"], ["convert"], ["export", "a", "b", "--format", "onnx"]]
)
def test_wrong_command_lines_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(arguments)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "status", "text"),
    [
        (ValueError("bad\n  value"), 2, "ptuning convert: bad value\n"),
        (FileNotFoundError("no file"), 2, "ptuning convert: no file\n"),
        (KeyboardInterrupt(), 130, "ptuning convert: interrupted.\n"),
    ],
)
def test_user_errors_are_one_line_and_a_status(
    failure: BaseException,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(arguments: Namespace) -> int:
        raise failure

    monkeypatch.setattr(Command, "load", lambda self: run)
    assert program.main(["convert", "a", "b"]) == status
    assert capsys.readouterr().err == text


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Command, "load", lambda self: lambda arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        program.main(["convert", "a", "b"])


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ptuning", "convert", str(tmp_path / "none"), str(tmp_path / "out")],
        cwd=Path(__file__).resolve().parents[2],
        env={"PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "which is not a folder; give a folder with the published files" in done.stderr


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    rows = "".join(f'{{"content": "{n}", "summary": "{n}"}}\n' for n in range(30))
    files = [tmp_path / f"{name}.json" for name in range(60)]
    for file in files:
        file.write_text(rows, encoding="utf-8")
    command = [sys.executable, "-m", "ptuning", "data", "check", "--picture", "none"]
    with subprocess.Popen(
        [*command, *map(str, files)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141
