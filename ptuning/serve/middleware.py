"""What every HTTP request passes first: the key, the size limit, and the metrics."""

import asyncio
import hmac
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptuning.serve.api_schema import ApiError

OPEN_PATHS = {"/health"}  # served without a key
DRAINED_BYTES = 8 * 2**20  # read from an oversized body, so that its sender gets to the reply
BODY_TIMEOUT_S = 30.0
CLIENT_GONE = 499  # nginx's status for a client that disconnected before the reply
BUCKETS_S = ("0.1", "0.3", "1.0", "3.0", "10.0", "30.0", "100.0", "+Inf")


class Metrics:
    """Counters since the start; use them in the event loop only.

    Format: https://prometheus.io/docs/instrumenting/exposition_formats/
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()  # labels -> value
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens: Counter[str] = Counter()

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        label = f'path="{path}"'
        self._requests[f'{{{label},status="{status}"}}'] += 1
        for bound in BUCKETS_S:
            self._seconds[f'_bucket{{{label},le="{bound}"}}'] += seconds <= float(bound)
        self._seconds[f"_sum{{{label}}}"] += seconds
        self._seconds[f"_count{{{label}}}"] += 1

    def count_tokens(self, model: str, *, prompt: int, completion: int) -> None:
        """Count the tokens of one answer."""
        self._tokens[f'{{model="{model}",kind="prompt"}}'] += prompt
        self._tokens[f'{{model="{model}",kind="completion"}}'] += completion

    def to_text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all metrics; gauges are name -> (help, current value)."""
        lines = [
            *_metric("requests_total", "counter", "Requests by path and status.", self._requests),
            *_metric("request_seconds", "histogram", "Time to the last byte.", self._seconds),
            *_metric("tokens_total", "counter", "Tokens of prompts and answers.", self._tokens),
        ]
        for name, (help_text, value) in gauges.items():
            lines += _metric(name, "gauge", help_text, {"": value})
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, help_text: str, samples: Mapping[str, float]) -> list[str]:
    """Return the lines of one metric; samples are suffix and labels -> value."""
    head = [f"# HELP ptuning_{name} {help_text}", f"# TYPE ptuning_{name} {kind}"]
    return head + [f"ptuning_{name}{labels} {value}" for labels, value in samples.items()]


class AuthAndLimitsMiddleware:
    """ASGI middleware; it reads whole bodies, so that no handler receives one that is too large."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body_bytes: int,
        metrics: Metrics,
        paths: Collection[str],
    ) -> None:
        """Pass requests on to app; paths are counted by name, all others as `other`."""
        self.app = app
        self.api_key = api_key
        self.max_body_bytes = max_body_bytes
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request, pass it on, and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_s = time.monotonic()
        status = CLIENT_GONE

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._handle(scope, receive, send_and_note_status)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.count_request(path, status, time.monotonic() - started_s)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._checked_body(Request(scope, receive))
        if isinstance(body, ApiError):
            await body.response()(scope, receive, send)
        elif body is not None:
            await self.app(scope, _with_body(body, receive), send)

    async def _checked_body(self, request: Request) -> bytes | ApiError | None:
        """Return the body, the reason to refuse it, or None if the client disconnected."""
        if not self._has_key(request):
            return WRONG_KEY
        body, num_bytes = b"", 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    body = (body + chunk)[: self.max_body_bytes + 1]
                    if num_bytes > self.max_body_bytes + DRAINED_BYTES:
                        break
        except ClientDisconnect:
            return None
        except TimeoutError:
            return ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s.")
        if len(body) > self.max_body_bytes:
            limit = f"the request body exceeds the limit of {self.max_body_bytes} bytes"
            return ApiError(413, f"{limit}; send less history.", code="request_too_large")
        return body

    def _has_key(self, request: Request) -> bool:
        if self.api_key is None or request.scope["path"] in OPEN_PATHS:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
        return scheme.lower() == "bearer" and is_right


WRONG_KEY = ApiError(
    401,
    "the key is missing or wrong; send 'Authorization: Bearer KEY' with the server's --api_key.",
    code="invalid_api_key",
)


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Return a receive function that gives the body again, then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
