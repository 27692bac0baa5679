"""`python -m ptuning web`: the demo page, on this machine alone unless a password is set."""

import argparse
import importlib.util
import logging
import os

from ptuning.commands.registry import PASSWORD_VARIABLE
from ptuning.serve.addresses import check_guarded
from ptuning.serve.defaults import choose_served, loading_options

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Load, then show the page until Ctrl-C."""
    password = arguments.password
    if password is None:
        password = os.environ.get(PASSWORD_VARIABLE)
    check_guarded(arguments.host, password, flag="--password")
    served = choose_served(arguments.model, arguments.prefix)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "gradio is not installed; type: bash web_demo.sh, which brings it, or: "
            "python -m pip install 'gradio>=6,<7'"
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio looks whether it is up
    from ptuning.serve.session import Session  # heavy, and not needed to parse a command line
    from ptuning.serve.web import build_page, launch
    from ptuning.serve.web_talk import WebTalk

    with Session.load(served.model, **loading_options(arguments)) as session:
        for name, path in served.prefixes.items():
            session.add_prefix(name, path)
        blocks = build_page(WebTalk(session))
        logger.info("Opening http://%s:%d (Ctrl-C ends it)", arguments.host, arguments.port)
        launch(blocks, host=arguments.host, port=arguments.port, password=password, wait=True)
    return 0
