"""The terminal chat: its commands, Ctrl-C, and a pipe."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptuning.serve.cli import HELP, TerminalChat

ROOT = Path(__file__).resolve().parents[2]


def talk(session, lines, *, prefix=None, is_terminal=True, output=None):
    """Return what was answered, what was said besides, and the chat."""
    waiting = iter(lines)

    def read_line(prompt):
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    output, notices = output or io.StringIO(), io.StringIO()
    chat = TerminalChat(
        session,
        prefix=prefix,
        sampling={},
        read_line=read_line,
        output=output,
        notices=notices,
        is_terminal=is_terminal,
    )
    chat.run()
    return output.getvalue(), notices.getvalue(), chat


def test_answers_follow_the_conversation(session):
    first = session.chat("你好", prefix="other").read()
    second = session.chat("谢谢", [("你好", first)], "other").read()
    output, _, chat = talk(session, ["你好", "", "谢谢"], prefix="other")
    assert output == f"{first}\n{second}\n"
    assert chat.history == [("你好", first), ("谢谢", second)]


def test_an_empty_line_in_a_pipe_has_an_empty_answer(session):
    first = session.chat("你好").read()
    second = session.chat("谢谢", [("你好", first)]).read()
    lines = ["\n", "你好\n", " \n", "/base\n", "谢谢\n"]
    output, notices, chat = talk(session, lines, is_terminal=False)
    assert output == f"\n{first}\n\n{second}\n"  # a command is no question
    assert notices == ""
    assert chat.history == [("你好", first), ("谢谢", second)]


def test_commands_switch_clear_and_help(session):
    base, other = session.chat("你好").read(), session.chat("你好", prefix="other").read()
    lines = ["/prefix other", "你好", "/clear", "/base", "你好", "/prefix", "/help", "/fly"]
    lines += ["/prefix nobody", "/quit", "never read"]
    output, notices, chat = talk(session, lines)
    assert output == f"{other}\n{base}\n"
    assert chat.history == [("你好", base)]
    assert HELP in notices
    assert "adgen\nother\nshort\nchatty\nbase\n" in notices
    assert "no command /fly" in notices
    assert "there is no prefix 'nobody'" in notices


class Interrupted(io.StringIO):
    """Ctrl-C comes while the third piece is written."""

    def write(self, text):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_program(session):
    whole = session.chat("你好").read()
    output, notices, chat = talk(
        session, ["你好", KeyboardInterrupt(), "/clear", "你好"], output=Interrupted()
    )
    stopped, again, _ = output.split("\n")
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
    assert again == whole
    assert "[stopped]" in notices
    assert "/quit ends the chat" in notices
    assert chat.history == [("你好", whole)]


def test_what_was_left_out_is_said(session):
    _, notices, _ = talk(session, ["类型#裤" * 40], prefix="adgen", is_terminal=False)
    assert notices == "[The prompt may have 64 tokens: the end of the question was cut off.]\n"


@pytest.fixture
def run_in(prefix_dirs, tmp_path):
    """Run the program in an empty folder; it finds nothing but what is put there."""

    def run(*arguments, text="", **variables):
        return subprocess.run(
            [sys.executable, "-m", "ptuning", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
            input=text.encode("utf-8"),
            capture_output=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.mark.slow
def test_a_pipe_gets_answers_only_from_the_newest_prefix(run_in, tmp_path, session, prefix_dirs):
    folder = tmp_path / "output" / "run" / "checkpoint-3"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(prefix_dirs["other"])
    config = json.loads((folder / "prefix_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"]
    done = run_in("chat", text="你好\n谢谢\n", LC_ALL="C")
    assert done.returncode == 0, done.stderr.decode()
    first = session.chat("你好", prefix="other").read()
    second = session.chat("谢谢", [("你好", first)], "other").read()
    assert done.stdout.decode("utf-8") == f"{first}\n{second}\n"


@pytest.mark.slow
def test_without_a_prefix_the_nano_model_answers(run_in, session):
    done = run_in("chat", text="你好\n/quit\n谢谢\n")
    assert done.stdout.decode("utf-8") == session.chat("你好").read() + "\n"
