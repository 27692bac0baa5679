"""Take the pictures of docs/:  python -m scripts.screenshots [--prefix NAME=DIRECTORY]

Runs the web demo, the terminal chat and the API with a trained prefix, such as that of
`bash train.sh`. Needs playwright, a Chromium (`--browser`), the openai package and curl. Answers
are greedy, so the text in the pictures is reproducible.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from ptuning.serve.startup import NEWEST_NAME, choose_served
from scripts.local_server import ROOT, free_port, running
from scripts.terminal_sessions import record_api, record_chat, to_page

DESKTOP = {"width": 1120, "height": 900}
PHONE = {"width": 390, "height": 844}
QUESTION = "类型#裤*版型#宽松*风格#简约*裤型#阔腿裤"
OTHER_QUESTION = "类型#裙*颜色#红色*版型#修身*裙长#长裙"
CHAT = [
    *("/prefix", QUESTION, "/clear", OTHER_QUESTION),
    *("/base", "/clear", OTHER_QUESTION, "/help", "/quit"),
]
BROWSER_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def find_browser(given: str | None) -> str:
    """Return the path of a Chromium or Chrome."""
    for name in [given] if given else ["chromium", "chromium-browser", "google-chrome"]:
        found = shutil.which(name)
        if found:
            return found
    raise SystemExit(f"Found no {given or 'chromium'}; install one, or name it with --browser.")


def ask(page: Any, question: str) -> None:
    """Send a question with Enter and wait for the end of the answer."""
    page.locator("#question textarea").fill(question)
    page.wait_for_timeout(300)  # the table is updated after typing
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#status').innerText.includes('tokens')")
    page.wait_for_selector("#stop:disabled", state="attached")


def take_web_pictures(browser: Any, address: str, folder: Path) -> None:
    """Write web-compare.png and web-phone.png."""
    for name, size in (("web-compare", DESKTOP), ("web-phone", PHONE)):
        page = browser.new_page(viewport=size, device_scale_factor=1, locale="en-US")
        page.goto(address)
        page.wait_for_selector("#question textarea")
        if name == "web-compare":
            page.locator("#compare input").check()
            page.wait_for_selector("#other-chat")
        ask(page, QUESTION)
        page.locator("#question textarea").blur()
        page.wait_for_timeout(500)  # scrolling and fading
        page.screenshot(path=folder / f"{name}.png", full_page=name == "web-compare")
        page.close()


def take_terminal_picture(browser: Any, title: str, session: str, file: Path) -> None:
    """Write a session as a picture of a terminal."""
    page = browser.new_page(viewport=DESKTOP, device_scale_factor=1)
    page.set_content(to_page(title, session))
    page.locator("#terminal").screenshot(path=file)
    page.close()


def choose_prefix(given: str | None) -> str:
    """Return NAME=DIRECTORY: as given, else the newest prefix under output/ as `adgen`."""
    if given is not None:
        return given
    newest = choose_served(None, output=ROOT / "output").prefixes.get(NEWEST_NAME)
    if newest is None:
        raise SystemExit("Found no trained prefix under output/; type: bash train.sh")
    return f"adgen={newest.relative_to(ROOT)}"


def main() -> None:
    """Run the three interfaces in turn and take their pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", metavar="NAME=DIRECTORY", help="shown; unset: the newest")
    parser.add_argument("--browser", help="path of a Chromium; unset: the one on PATH")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    given = parser.parse_args()
    browser_path, prefix = find_browser(given.browser), choose_prefix(given.prefix)
    from playwright.sync_api import sync_playwright  # not needed to parse a command line

    given.output.mkdir(parents=True, exist_ok=True)
    sessions = {
        "terminal-chat": record_chat(prefix, CHAT),
        "api": record_api(prefix, QUESTION),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=BROWSER_FLAGS)
        for name, session in sessions.items():
            take_terminal_picture(browser, "Terminal", session, given.output / f"{name}.png")
        with running(["web", "--prefix", prefix], port=free_port()) as address:
            take_web_pictures(browser, address, given.output)
        browser.close()


if __name__ == "__main__":
    main()
