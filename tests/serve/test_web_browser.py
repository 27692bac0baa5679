"""The web demo in a real browser, as a person uses it: nothing may go wrong in its console."""

import os
import shutil
from contextlib import contextmanager

import pytest

from ptuning.serve.session import Session
from ptuning.serve.web_talk import WebTalk
from tests.serve.live_server import wait_until_idle
from tests.serve.slow_engine import slow_down

pytest.importorskip("gradio", reason="needs the extra `web`", exc_type=ImportError)
playwright_api = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")

from ptuning.serve import web  # noqa: E402
from scripts.local_server import free_port, running  # noqa: E402
from scripts.screenshots import BROWSER_FLAGS  # noqa: E402

pytestmark = pytest.mark.browser
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1120, "height": 900}
PASSWORD = "secret-钥匙"


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium on PATH")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield browser
        browser.close()


class Visit:
    """An open page, with all that its console and network complained about."""

    def __init__(self, browser, address, viewport):
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport=viewport)
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda said: said.type == "error" and self.note(said.text))
        self.page.on("pageerror", lambda error: self.note(str(error)))
        own = (address, "data:", "blob:")
        self.page.on("request", lambda sent: sent.url.startswith(own) or self.note(sent.url))
        self.page.goto(address)

    def note(self, complaint):
        self.complaints.append(complaint)


@pytest.fixture
def visit(chromium):
    """Open pages that must end without a complaint."""
    visits = []

    def open_page(address, viewport):
        visits.append(Visit(chromium, address, viewport))
        return visits[-1]

    yield open_page
    for one in visits:
        assert one.complaints == []
        one.page.close()


@contextmanager
def demo(session, password=None, cards=None):
    """Serve a session's page in this process; yield its address."""
    blocks = web.build_page(WebTalk(session, cards))
    try:
        yield web.launch(
            blocks, host="127.0.0.1", port=free_port(), password=password, wait=False
        ).rstrip("/")
    finally:
        blocks.close()


@pytest.fixture
def page(session, monkeypatch, visit):
    """The page of a session with four prefixes, slow enough to be stopped, on a phone."""
    slow_down(session, monkeypatch, step_s=0.06)
    with demo(session) as address:
        opened = visit(address, PHONE).page
        opened.wait_for_selector("#question textarea")
        yield opened


RECORD_ANSWERS = """() => {
  window.shown = [];
  new MutationObserver(() => {
    const text = document.querySelector("#chat [data-testid=bot]")?.innerText.trim();
    if (text && text !== window.shown.at(-1)) window.shown.push(text);
  }).observe(document.querySelector("#chat"), {childList: true, subtree: true, characterData: true});
}"""
LONG_ENOUGH = """place =>
  document.querySelectorAll('#chat [data-testid=bot]')[place]?.innerText.length > 3"""


def send(page, question):
    page.locator("#question textarea").fill(question)
    page.keyboard.press("Enter")
    expect_line(page, "")  # emptied with the first piece of the answer


def pick(page, model, new_tokens):
    page.locator("#model input").click()
    page.get_by_role("option", name=model).click()
    page.wait_for_function(
        "name => document.querySelector('#chat').innerText.startsWith(name)", arg=model
    )
    page.wait_for_function(
        "length => document.querySelector('#max-tokens input')?.value == length",
        arg=str(new_tokens),
    )


def wait_for_end(page):
    page.wait_for_selector("#stop[disabled]", state="attached")


def expect_status(page, word):
    page.wait_for_function(
        "word => document.querySelector('#status').innerText.includes(word)", arg=word
    )


def expect_line(page, text):
    page.wait_for_function(
        "text => document.querySelector('#question textarea').value == text", arg=text
    )


def answers(page, chat="#chat"):
    return page.locator(f"{chat} [data-testid=bot]").all_inner_texts()


def is_as_wide_as_its_window(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_page_streams_stops_switches_compares_and_clears(page, session):
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

    page.locator("#sampling button").first.click()
    pick(page, "chatty", 40)
    send(page, "你好")
    page.wait_for_function(LONG_ENOUGH, arg=1)
    page.keyboard.press("Escape")
    wait_for_end(page)
    expect_status(page, "stopped")
    assert session.chat("你好", prefix="chatty").read().startswith(answers(page)[1])

    page.locator("#clear").click()
    page.wait_for_function("!document.querySelector('#chat [data-testid=bot]')")
    pick(page, "adgen", 24)
    page.locator("#compare input").check()
    page.wait_for_selector("#other-chat")
    send(page, "类型#裤")
    wait_for_end(page)
    assert (answers(page), answers(page, "#other-chat")) == (
        [expected["adgen"]],
        [expected["base"]],
    )
    assert is_as_wide_as_its_window(page)


def test_stop_button_ends_an_answer_and_regenerate_gives_it_whole(page, session):
    page.locator("#sampling button").first.click()
    pick(page, "chatty", 40)
    answer = session.chat("你好", prefix="chatty")
    whole = answer.read()
    computed_before = session.scheduler.num_tokens
    send(page, "你好")
    page.wait_for_function(LONG_ENOUGH, arg=0)
    page.locator("#stop").click()
    expect_status(page, "stopped")
    wait_for_end(page)
    (stopped,) = answers(page)
    assert whole.startswith(stopped)
    assert 3 < len(stopped) < len(whole)
    wait_until_idle(session)
    computed = session.scheduler.num_tokens - computed_before
    assert computed < answer.usage.completion_tokens, "it is stopped, not only no longer shown"

    page.locator("#question textarea").fill("half a que")
    page.locator("#regenerate").click()
    expect_status(page, f"chatty: {answer.usage.completion_tokens} ")
    wait_for_end(page)
    assert answers(page) == [whole]
    assert page.locator("#question textarea").input_value() == "half a que"

    pick(page, "adgen", 24)
    page.locator("#regenerate").click()
    expect_status(page, "adgen")
    wait_for_end(page)
    assert answers(page) == [session.chat("你好", prefix="adgen", max_new_tokens=24).read()]


def test_wrong_password_is_refused_and_the_right_one_let_in(session, visit):
    with demo(session, PASSWORD) as address:
        opened = visit(address, DESKTOP)
        page = opened.page
        page.locator("input[type=password]").wait_for()
        assert page.locator("#question").count() == 0
        log_in(page, "wrong")
        page.get_by_text("Incorrect Credentials").wait_for()
        assert page.locator("#question").count() == 0
        # A browser notes every refused request in the console, this one by right.
        assert len(opened.complaints) == 1
        assert "400" in opened.complaints.pop()
        log_in(page, PASSWORD)
        page.wait_for_selector("#question textarea")
        send(page, "类型#裤")
        expect_status(page, "adgen")
        wait_for_end(page)
        assert answers(page) == [session.chat("类型#裤", prefix="adgen").read()]


def test_markup_is_text_and_an_api_call_has_its_verdict(session, cards, answer_with, visit):
    text = (
        "<<<api_call>>>: shop.title(repo='a/titles', "
        "note='<img src=https://example.org/x onerror=alert(1)>')\n<<<code>>>: 1 < 2 &amp; 3"
    )
    call = text.partition(": ")[2].partition("\n")[0]
    answer_with(text)
    with demo(session, cards=cards) as address:
        page = visit(address, DESKTOP).page
        page.wait_for_selector("#question textarea")
        page.locator("#compare input").check()
        page.wait_for_selector("#other-chat")
        send(page, "<b>你好</b>")
        wait_for_end(page)
        for chat in ("#chat", "#other-chat"):
            page.wait_for_selector(f"{chat} .thought-group")
            asked, said, shown = page.locator(f"{chat} .message-content").all_inner_texts()
            assert (asked, said, shown) == ("<b>你好</b>", text, call)
            title = page.locator(f"{chat} .thought-group .title").inner_text().strip()
            assert title == "✓ API 调用有效 valid API call: Titles"
            assert page.locator(f"{chat} .message-content img").count() == 0
            page.context.grant_permissions(["clipboard-read", "clipboard-write"])
            page.locator(f"{chat} [aria-label='Copy message']").last.click()
            copied = page.evaluate("navigator.clipboard.readText()")
            assert [line.strip() for line in copied.splitlines()] == [
                *text.split("\n"),
                title,
                call,
            ]
        assert is_as_wide_as_its_window(page)


def log_in(page, password):
    page.locator("input").first.fill("anyone")
    page.locator("input[type=password]").fill(password)
    page.get_by_role("button").last.click()


def test_page_without_a_prefix_talks_to_the_base(nano, session, visit):
    with Session(nano, session.tokenizer) as alone, demo(alone) as address:
        page = visit(address, DESKTOP).page
        page.wait_for_selector("#question textarea")
        assert page.locator("#model input").input_value() == "base"
        send(page, "你好")
        expect_status(page, "base")
        wait_for_end(page)
        greeting = alone.chat("你好").read()
        assert answers(page) == [greeting]
        page.locator("#compare input").check()
        page.wait_for_selector("#other-chat")
        send(page, "再见")
        wait_for_end(page)
        farewell = alone.chat("再见", [("你好", greeting)]).read()
        assert answers(page) == [greeting, farewell]
        assert answers(page, "#other-chat") == [alone.chat("再见").read()]
        assert is_as_wide_as_its_window(page)


def test_command_alone_shows_the_newest_prefix_under_output(prefix_dirs, session, tmp_path, visit):
    for written, name in enumerate(("adgen", "other")):
        made = tmp_path / "output" / name
        shutil.copytree(prefix_dirs[name], made)
        os.utime(made / "prefix_config.json", (1_000_000 + written, 1_000_000 + written))
    with running(["web"], port=free_port(), folder=tmp_path) as address:
        page = visit(address, PHONE).page
        page.wait_for_selector("#question textarea")
        assert page.locator("#model input").input_value() == "newest"
        send(page, "类型#裤")
        expect_status(page, "newest")
        wait_for_end(page)
        assert answers(page) == [session.chat("类型#裤", prefix="other").read()]


def test_attribute_editor_and_line_follow_each_other(page):
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
