"""`python -m ptuning serve --prefix NAME=DIRECTORY ...`: an OpenAI-compatible server."""

import argparse
import importlib.util
import os

from ptuning.commands.registry import KEY_VARIABLE
from ptuning.serve.defaults import choose_served, loading_options


def run(arguments: argparse.Namespace) -> int:
    """Load in a process of its own, then serve until Ctrl-C."""
    served = choose_served(arguments.model, arguments.prefix)
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
