"""`python -m ptuning serve --prefix NAME=DIRECTORY ...`: an OpenAI-compatible server."""

import argparse
import importlib.util
import os

from ptuning.serve.defaults import choose_served
from ptuning.serve.model_arguments import add_model_arguments, loading_options

KEY_VARIABLE = "PTUNING_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument(
        "--api_key",
        metavar="SECRET",
        help="key that clients must send; needed for any address but this machine's own. Unset: "
        f"the variable {KEY_VARIABLE}",
    )
    parser.add_argument("--max_rows", type=int, default=32, help="answers decoded together")
    parser.add_argument("--max_queue", type=int, default=128, help="requests that may wait besides")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds a request may take, waiting included"
    )
    parser.add_argument(
        "--max_body_kib", type=int, default=256, help="largest request body, in KiB"
    )


def run(arguments: argparse.Namespace) -> int:
    """Load in a process of its own, then serve until Ctrl-C."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}; type: python -m pip install {' '.join(missing)}"
        )
    from ptuning.serve.api import build_app  # heavy, and not needed to parse a command line
    from ptuning.serve.server import check_address, make_server, serve
    from ptuning.serve.session_process import EndedProcessError, SessionProcess

    api_key = arguments.api_key
    if api_key is None:
        api_key = os.environ.get(KEY_VARIABLE)
    check_address(arguments.host, arguments.port, api_key)
    served = choose_served(arguments.model, arguments.prefix)
    with SessionProcess.load(
        served.model,
        max_rows=arguments.max_rows,
        max_queue=arguments.max_queue,
        **loading_options(arguments),
    ) as session:
        for name, path in served.prefixes.items():
            session.add_prefix(name, path)
        app = build_app(
            session,
            api_key=api_key,
            timeout_s=arguments.timeout,
            max_body_bytes=arguments.max_body_kib * 1024,
        )
        server = make_server(app, host=arguments.host, port=arguments.port)
        session.when_ended(lambda: setattr(server, "should_exit", True))
        serve(server)
        if session.failure is not None:
            raise EndedProcessError(session.failure)
    return 0
