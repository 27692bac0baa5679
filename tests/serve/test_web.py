"""The web demo without a browser: its events, and who may reach it."""

import socket
import urllib.error
import urllib.parse
import urllib.request
from types import SimpleNamespace

import pytest

from ptuning.__main__ import main
from ptuning.commands.registry import PASSWORD_VARIABLE
from ptuning.serve.startup import check_guarded
from ptuning.serve.web_talk import EMPTY, WebTalk

gr = pytest.importorskip("gradio", reason="needs the extra `web`", exc_type=ImportError)

from ptuning.serve import web  # noqa: E402
from scripts.local_server import free_port  # noqa: E402

VISITOR = SimpleNamespace(session_hash="one")
GREEDY = (0.0, 1.0, 24, False)


@pytest.fixture
def page(session):
    return web.Page(WebTalk(session))


def last(steps):
    *_, end = steps
    return end


def texts(messages):
    return [message["content"] for message in messages]


# Events


def test_sending_shows_the_answer_and_empties_the_line(page, session):
    end = last(page.send(VISITOR, " 你好 ", EMPTY, "adgen", False, "base", *GREEDY))
    panes, first, second, status, send, stop, question = end
    answer = session.chat("你好", prefix="adgen", max_new_tokens=24).read()
    assert panes == ((("你好", answer),), ())
    assert texts(first) == ["你好", answer]
    assert second == []
    assert "adgen" in status
    assert (send["interactive"], stop["interactive"], question) == (True, False, "")


def test_stop_can_be_pressed_only_while_an_answer_comes(page):
    first, *_ = page.send(VISITOR, "你好", EMPTY, "adgen", False, "base", *GREEDY)
    assert (first[4]["interactive"], first[5]["interactive"]) == (False, True)


def test_comparing_fills_both_sides(page, session):
    end = last(page.send(VISITOR, "你好", EMPTY, "adgen", True, "base", *GREEDY))
    for shown, name in ((end[1], "adgen"), (end[2], "base")):
        assert texts(shown)[1] == session.chat("你好", prefix=name, max_new_tokens=24).read()


def test_both_sides_show_the_verdict_on_an_api_call_once_it_is_complete(
    session, cards, answer_with
):
    answer_with("shop.title(repo='a/titles')")
    page = web.Page(WebTalk(session, cards))
    first, *_, end = page.send(VISITOR, "你好", EMPTY, "adgen", True, "base", *GREEDY)
    for side in (1, 2):
        assert [message.get("metadata") for message in first[side]] == [None, None]
        title = "✓ API 调用有效 valid API call: Titles"
        assert end[side][-1]["metadata"] == {"title": title}
        assert end[side][-1]["content"] == "shop.title(repo='a/titles')"


@pytest.mark.parametrize("typed", ["", "  \n"])
def test_an_empty_line_changes_nothing(page, typed):
    assert list(page.send(VISITOR, typed, EMPTY, "adgen", False, "base", *GREEDY)) == [
        tuple(gr.skip() for _ in range(7))
    ]


def test_regenerating_replaces_the_last_answer_and_keeps_what_is_typed(page, session):
    panes = ((("你好", "old"),), ())
    end = last(page.regenerate(VISITOR, "half a que", panes, "other", False, "base", *GREEDY))
    assert end[0] == (
        (("你好", session.chat("你好", prefix="other", max_new_tokens=24).read()),),
        (),
    )
    assert end[-1] == "half a que"
    nothing = list(page.regenerate(VISITOR, "", EMPTY, "other", False, "base", *GREEDY))
    assert nothing == [tuple(gr.skip() for _ in range(7))]


def test_clearing_forgets_both_sides(page):
    assert page.clear(VISITOR)[:4] == (EMPTY, [], [], "")


def test_picking_a_model_sets_its_length_and_history(page):
    label, length, sends_history = page.pick("adgen")
    assert (label["label"], length, sends_history) == ("adgen", 24, False)


def test_what_went_wrong_is_shown(page):
    with pytest.raises(gr.Error, match="no prefix 'gone'"):
        next(page.send(VISITOR, "你好", EMPTY, "gone", False, "base", *GREEDY))
    with pytest.raises(gr.Error, match="separates attributes"):
        web.show_question([["类#型", "裤"]])


def test_editor_follows_the_line_and_the_line_the_editor():
    assert web.show_rows("类型#裤*版型#宽松", [["", ""]]) == [["类型", "裤"], ["版型", "宽松"]]
    assert web.show_question([["类型", "裤"], ["版型", "宽松"], ["", ""]]) == "类型#裤*版型#宽松"
    assert web.show_rows("你好", [["类型", "裤"]]) == gr.skip()
    assert web.show_rows("类型#裤", [["类型", "裤"]]) == gr.skip(), (
        "an unchanged table is left alone"
    )
    half_typed = [["类型", "裤"], ["版型", ""]]
    assert web.show_rows(web.show_question(half_typed), half_typed) == gr.skip()


# Who may reach it


def test_this_machine_needs_no_password():
    check_guarded("127.0.0.1", None, flag="--password")
    check_guarded("0.0.0.0", "secret", flag="--password")


@pytest.mark.parametrize(
    "arguments", [["--host", "0.0.0.0"], ["--password", " "], ["--host", "example.org"]]
)
def test_an_open_address_without_a_password_is_refused_in_one_line(arguments, monkeypatch, capsys):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert main(["web", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ptuning web: --")


def test_password_is_asked_for(session):
    port = free_port()
    blocks = web.build_page(WebTalk(session))
    web.launch(blocks, host="127.0.0.1", port=port, password="secret-钥匙", wait=False)
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/info")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            log_in(port, "wrong")
        assert log_in(port, "secret-钥匙") == 200
    finally:
        blocks.close()


def test_a_port_that_is_taken_is_named(session):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        blocks = web.build_page(WebTalk(session))
        with pytest.raises(OSError, match=f"127.0.0.1:{port}.*--port"):
            web.launch(blocks, host="127.0.0.1", port=port, password=None, wait=False)


def log_in(port: int, password: str) -> int:
    form = urllib.parse.urlencode({"username": "anyone", "password": password}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/login", data=form) as answer:
        return answer.status
