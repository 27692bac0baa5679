"""`python -m ptuning chat`, `serve` and `web`: one session and its three front ends.

Argument errors are reported before anything heavy is imported: torch, FastAPI and gradio are
imported by the function that needs them.
"""

import argparse
import importlib.util
import io
import logging
import os
import sys
from typing import Any

from ptuning.commands.registry import KEY_VARIABLE, PASSWORD_VARIABLE
from ptuning.serve.startup import check_address, check_guarded, choose_served

logger = logging.getLogger(__name__)


def _loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that `Session.load` takes."""
    return {
        "dtype": arguments.dtype,
        "device": arguments.device,
        "quantization_bit": arguments.quantization_bit,
    }


def _read_cards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read --cards, and return what the API and the page do with them."""
    top_k: int = arguments.top_k
    if arguments.cards is None:
        if top_k:
            raise ValueError("--top_k finds documents in --cards FILE; give that too.")
        return {}
    if top_k < 0:
        raise ValueError(f"--top_k is {top_k}; use 0 (no documents) or more.")
    from ptuning.apicalls.cards import read_common_cards
    from ptuning.apicalls.pairs import prompt_maker

    cards = read_common_cards(arguments.cards)
    return {"cards": cards, "to_prompt": prompt_maker(cards, top_k)}


def chat(arguments: argparse.Namespace) -> int:
    """Chat in the terminal, or over a pipe, until the end of the input."""
    served = choose_served(arguments.model, arguments.prefix)
    from ptuning.serve.cli import TerminalChat
    from ptuning.serve.session import Session

    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal and importlib.util.find_spec("readline") is not None:  # Windows has none
        importlib.import_module("readline")  # gives input() line editing and history
    elif not is_terminal:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):  # pipes are UTF-8 whatever the locale
                stream.reconfigure(encoding="utf-8", errors="replace")
    with Session.load(served.model, max_rows=1, **_loading_options(arguments)) as session:
        for name, path in served.prefixes.items():
            session.add_prefix(name, path)
        TerminalChat(
            session,
            prefix=next(iter(served.prefixes), None),
            sampling={
                "temperature": arguments.temperature,
                "top_p": arguments.top_p,
                "seed": arguments.seed,
            },
            read_line=input if is_terminal else read_piped_line,
            output=sys.stdout,
            notices=sys.stderr,
            is_terminal=is_terminal,
        ).run()
    return 0


def read_piped_line(prompt: str) -> str:
    """Read a line of standard input; EOFError at its end."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def serve(arguments: argparse.Namespace) -> int:
    """Load the model in a process of its own and serve the API until Ctrl-C."""
    served = choose_served(arguments.model, arguments.prefix)
    cards = _read_cards(arguments)
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}; type: python -m pip install {' '.join(missing)}"
        )
    from ptuning.serve.api import build_app, make_server
    from ptuning.serve.api import serve as run_server
    from ptuning.serve.client import EndedProcessError, EngineClient

    api_key = arguments.api_key
    if api_key is None:  # an empty one is refused, not replaced
        api_key = os.environ.get(KEY_VARIABLE)
    check_address(arguments.host, arguments.port, api_key)
    with EngineClient.load(
        served.model,
        max_rows=arguments.max_rows,
        max_queue=arguments.max_queue,
        **_loading_options(arguments),
    ) as session:
        for name, path in served.prefixes.items():
            session.add_prefix(name, path)
        app = build_app(
            session,
            api_key=api_key,
            timeout_s=arguments.timeout,
            max_body_bytes=arguments.max_body_kib * 1024,
            **cards,
        )
        server = make_server(app, host=arguments.host, port=arguments.port)
        session.when_ended(lambda: setattr(server, "should_exit", True))
        run_server(server)
        if session.failure is not None:
            raise EndedProcessError(session.failure)
    return 0


def web(arguments: argparse.Namespace) -> int:
    """Load, then show the demo page until Ctrl-C; only to this machine unless a password is set."""
    password = arguments.password
    if password is None:  # an empty one is refused, not replaced
        password = os.environ.get(PASSWORD_VARIABLE)
    check_guarded(arguments.host, password, flag="--password")
    served = choose_served(arguments.model, arguments.prefix)
    cards = _read_cards(arguments)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "gradio is not installed; type: bash web_demo.sh, which brings it, or: "
            "python -m pip install 'gradio>=6,<7'"
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio polls its own server
    from ptuning.serve.session import Session
    from ptuning.serve.web import build_page, launch
    from ptuning.serve.web_talk import WebTalk

    with Session.load(served.model, **_loading_options(arguments)) as session:
        for name, path in served.prefixes.items():
            session.add_prefix(name, path)
        blocks = build_page(WebTalk(session, **cards))
        logger.info("Opening http://%s:%d (Ctrl-C ends it)", arguments.host, arguments.port)
        launch(blocks, host=arguments.host, port=arguments.port, password=password, wait=True)
    return 0
