"""Running the HTTP API: one process, one session, until Ctrl-C."""

import logging
import socket

import uvicorn
from fastapi import FastAPI

from ptuning.serve.addresses import check_guarded

GRACE_S = 3  # for answers that are on their way at Ctrl-C

logger = logging.getLogger(__name__)


def check_address(host: str, port: int, api_key: str | None) -> None:
    """Refuse to serve other machines without a key, and an address that cannot be listened on."""
    check_guarded(host, api_key, flag="--api_key")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be listened on: {error}; give another --port, or "
            "end what listens there."
        ) from error


def make_server(app: FastAPI, *, host: str, port: int) -> uvicorn.Server:
    """Return a server that is not running yet."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
        lifespan="off",
    )
    return uvicorn.Server(config)


def serve(server: uvicorn.Server) -> None:
    """Serve until Ctrl-C, SIGTERM, or until somebody sets `server.should_exit`."""
    config = server.config
    logger.info("Serving on http://%s:%d/v1 (Ctrl-C ends it)", config.host, config.port)
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn has shut down and passes the signal on
        logger.info("Stopped.")
