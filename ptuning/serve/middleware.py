"""What every HTTP request passes first: the key, the size limit, and the count."""

import asyncio
import hmac
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptuning.serve.api_replies import error_response
from ptuning.serve.metrics import Metrics

OPEN_PATHS = {"/health"}  # answered without a key
DRAINED_BYTES = 8 * 2**20  # of an oversized body, so that its sender gets to read the answer
BODY_TIMEOUT_S = 30.0


class Guard:
    """ASGI middleware; bodies are read whole here, so no handler meets one that is too large."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body_bytes: int,
        metrics: Metrics,
        paths: Collection[str],
    ) -> None:
        """Let requests through to app; paths are those that are counted by name."""
        self.app = app
        self.api_key = api_key
        self.max_body_bytes = max_body_bytes
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, and count."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        status = 499  # the client went before any answer

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, watched_send)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.count_request(path, status, time.monotonic() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._has_key(scope):
            refusal = error_response(
                401,
                "the key is missing or wrong; send 'Authorization: Bearer KEY' with the server's "
                "--api_key.",
                code="invalid_api_key",
            )
            await refusal(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await self._read_body(receive)
        except TimeoutError:
            late = error_response(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s.")
            await late(scope, receive, send)
            return
        if body is None:
            return  # the client went
        if len(body) > self.max_body_bytes:
            refusal = error_response(
                413,
                f"the body has more than {self.max_body_bytes} bytes, which is all that is taken; "
                "send less history.",
                code="request_too_large",
            )
            await refusal(scope, receive, send)
            return
        await self.app(scope, _with_body(body, receive), send)

    def _has_key(self, scope: Scope) -> bool:
        if self.api_key is None or scope["path"] in OPEN_PATHS:
            return True
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
        return kind.lower() == "bearer" and right

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Return the body, one byte too much of an oversized one; None when the client left."""
        body = b""
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunk: bytes = message.get("body", b"")
            num_bytes += len(chunk)
            body = (body + chunk)[: self.max_body_bytes + 1]
            is_last = not message.get("more_body", False)
            if is_last or num_bytes > self.max_body_bytes + DRAINED_BYTES:
                return body


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Return a receive that gives the body once more, then what comes after it."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
