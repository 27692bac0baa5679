"""The web demo: its events without a browser, who may reach it, and once in a real browser."""

import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from types import SimpleNamespace

import pytest

from ptuning.__main__ import main
from ptuning.commands import web as web_command
from ptuning.serve.web_access import check_address
from ptuning.serve.web_talk import EMPTY, WebTalk
from tests.serve.slow_engine import slow_down

gr = pytest.importorskip("gradio", reason="needs the extra `web`", exc_type=ImportError)

from ptuning.serve import web  # noqa: E402
from scripts.local_server import free_port  # noqa: E402
from scripts.screenshots import BROWSER_FLAGS  # noqa: E402

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
    check_address("127.0.0.1", None)
    check_address("0.0.0.0", "secret")


@pytest.mark.parametrize(
    "arguments", [["--host", "0.0.0.0"], ["--password", " "], ["--host", "example.org"]]
)
def test_an_open_address_without_a_password_is_refused_in_one_line(arguments, monkeypatch, capsys):
    monkeypatch.delenv(web_command.PASSWORD_VARIABLE, raising=False)
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


# In a browser


@pytest.fixture
def browser_page(session, monkeypatch):
    """A page of the running demo, with all that its console and network saw."""
    playwright_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on PATH")
    slow_down(session, monkeypatch)
    port = free_port()
    blocks = web.build_page(WebTalk(session))
    address = web.launch(blocks, host="127.0.0.1", port=port, password=None, wait=False)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_FLAGS)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        complaints: list[str] = []
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((address, "data:", "blob:"))
                else complaints.append(request.url)
            ),
        )
        page.goto(address)
        page.wait_for_selector("#question textarea")
        yield page
        assert complaints == []
        browser.close()
    blocks.close()


RECORD_ANSWERS = """() => {
  window.shown = [];
  new MutationObserver(() => {
    const text = document.querySelector("#chat [data-testid=bot]")?.innerText.trim();
    if (text && text !== window.shown.at(-1)) window.shown.push(text);
  }).observe(document.querySelector("#chat"), {childList: true, subtree: true, characterData: true});
}"""


def send(page, question):
    page.locator("#question textarea").fill(question)
    page.keyboard.press("Enter")
    expect_line(page, "")  # emptied with the first piece of the answer


def wait_for_end(page):
    page.wait_for_selector("#stop[disabled]", state="attached")


def answers(page, chat="#chat"):
    return page.locator(f"{chat} [data-testid=bot]").all_inner_texts()


@pytest.mark.browser
def test_page_streams_stops_switches_compares_and_clears(browser_page, session):
    page = browser_page
    page.set_default_timeout(15_000)
    expected = {
        name: session.chat("类型#裤", prefix=name, max_new_tokens=24).read()
        for name in ("adgen", "base")
    }
    page.evaluate(RECORD_ANSWERS)
    send(page, "类型#裤")
    wait_for_end(page)
    assert answers(page) == [expected["adgen"]]
    on_the_way = [
        text for text in page.evaluate("window.shown") if text not in ("…", expected["adgen"])
    ]
    assert len(on_the_way) >= 2
    assert all(expected["adgen"].startswith(text) for text in on_the_way)
    assert page.locator("#question textarea").input_value() == ""

    page.locator("#model input").click()
    page.get_by_role("option", name="chatty").click()
    page.wait_for_function("document.querySelector('#chat').innerText.startsWith('chatty')")
    page.locator("#sampling button").first.click()
    page.wait_for_function("document.querySelector('#max-tokens input')?.value == '40'")
    send(page, "你好")
    page.wait_for_function(
        "document.querySelectorAll('#chat [data-testid=bot]')[1]?.innerText.length > 3"
    )
    page.keyboard.press("Escape")
    wait_for_end(page)
    page.wait_for_function("document.querySelector('#status').innerText.includes('stopped')")
    stopped = answers(page)[1]
    assert session.chat("你好", prefix="chatty").read().startswith(stopped)

    page.locator("#clear").click()
    page.wait_for_function("!document.querySelector('#chat [data-testid=bot]')")
    page.locator("#model input").click()
    page.get_by_role("option", name="adgen").click()
    page.wait_for_function("document.querySelector('#max-tokens input')?.value == '24'")
    page.locator("#compare input").check()
    page.wait_for_selector("#other-chat")
    send(page, "类型#裤")
    wait_for_end(page)
    assert (answers(page), answers(page, "#other-chat")) == (
        [expected["adgen"]],
        [expected["base"]],
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_attribute_editor_and_line_follow_each_other(browser_page):
    page = browser_page
    page.set_default_timeout(15_000)
    line = page.locator("#question textarea")
    line.fill("类型#裙*颜色#红色")
    wait = "text => document.querySelector('#rows [role=grid], #rows').innerText.includes(text)"
    page.wait_for_function(wait, arg="红色")
    cells = page.locator("#rows [role=gridcell]")
    assert [text.strip() for text in cells.all_inner_texts()] == ["类型", "裙", "颜色", "红色"]
    type_into(page, cells.nth(3), "蓝色")
    expect_line(page, "类型#裙*颜色#蓝色")
    page.locator("#add-row").click()
    page.wait_for_selector("[data-testid=cell-2-0]")
    type_into(page, page.locator("[data-testid=cell-2-0]"), "版型")
    type_into(page, page.locator("[data-testid=cell-2-1]"), "修身")
    expect_line(page, "类型#裙*颜色#蓝色*版型#修身")


def type_into(page, cell, text):
    cell.dblclick()
    page.keyboard.press("Control+A")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def expect_line(page, text):
    page.wait_for_function(
        "text => document.querySelector('#question textarea').value == text", arg=text
    )
