"""Take the pictures of docs/web-demo.md in a real browser:  python scripts/screenshots.py

Needs playwright and a Chromium (`--browser`). The answers are greedy, so the pictures show the same
text each time; without `--prefix` they show what `bash web_demo.sh` would.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

ROOT = Path(__file__).resolve().parents[1]
START_S = 120  # loading, on a slow machine
DESKTOP = {"width": 1120, "height": 900}
PHONE = {"width": 390, "height": 844}
QUESTION = "类型#裤*版型#宽松*风格#简约*裤型#阔腿裤"
BROWSER_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_demo(arguments: list[str]) -> Iterator[str]:
    """Start the demo in a process of its own and yield its address once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "ptuning", "web", "--port", str(port), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as demo:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, demo)
            yield address
        finally:
            demo.terminate()


def _wait_for(address: str, demo: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + START_S
    while demo.poll() is None and time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except URLError:
            time.sleep(0.2)
    raise SystemExit(f"The demo did not start; type: {sys.executable} -m ptuning web")


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
    page.wait_for_timeout(300)  # the table follows what is typed
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#status').innerText.includes('tokens')")
    page.wait_for_selector("#stop:disabled", state="attached")


def take_pictures(address: str, browser_path: str, folder: Path) -> None:
    """Write web-compare.png and web-phone.png."""
    from playwright.sync_api import sync_playwright  # not needed to parse a command line

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=BROWSER_FLAGS)
        for name, size in (("web-compare", DESKTOP), ("web-phone", PHONE)):
            page = browser.new_page(viewport=size, device_scale_factor=1, locale="en-US")
            page.goto(address)
            page.wait_for_selector("#question textarea")
            if name == "web-compare":
                page.locator("#compare input").check()
                page.wait_for_selector("#other-chat")
            ask(page, QUESTION)
            page.locator("#question textarea").blur()
            page.wait_for_timeout(500)  # the last scroll and fade
            page.screenshot(path=folder / f"{name}.png", full_page=name == "web-compare")
            page.close()
        browser.close()


def main() -> None:
    """Start the demo, take the pictures, end it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", metavar="NAME=DIRECTORY", help="shown; unset: the newest")
    parser.add_argument("--browser", help="path of a Chromium; unset: the one on PATH")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    given = parser.parse_args()
    browser_path = find_browser(given.browser)
    given.output.mkdir(parents=True, exist_ok=True)
    with running_demo(["--prefix", given.prefix] if given.prefix else []) as address:
        take_pictures(address, browser_path, given.output)


if __name__ == "__main__":
    main()
