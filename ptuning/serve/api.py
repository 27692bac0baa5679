"""OpenAI's HTTP API for a session: `model` names a prefix, `base` is the model without one.

Requests that are open at the same time are decoded together, each with its own prefix.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive

from ptuning.apicalls.cards import Cards
from ptuning.serve.api_schema import (
    ApiError,
    ChatBody,
    CompletionBody,
    PrefixBody,
    ReplyFormatter,
    event,
)
from ptuning.serve.middleware import CLIENT_GONE, AuthAndLimitsMiddleware, Metrics
from ptuning.serve.scheduler import EngineError, QueueFullError, SessionClosedError
from ptuning.serve.session import BASE_NAME, AbstractSession, UnknownPrefixError
from ptuning.serve.text_stream import Answer

MAX_BODY_KIB = 256  # ChatGLM-6B's context of 2,048 tokens is about 10 KiB of Chinese
TIMEOUT_S = 300.0
GRACE_S = 3  # for answers in progress at Ctrl-C

logger = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The client disconnected."""


class AnswerTimeoutError(Exception):
    """The answer took longer than a request may."""


# kind of error -> HTTP status and OpenAI's code; the first match counts
STATUS_OF: dict[type[Exception], tuple[int, str | None]] = {
    UnknownPrefixError: (404, "model_not_found"),
    QueueFullError: (429, "queue_full"),
    SessionClosedError: (503, "shutting_down"),
    AnswerTimeoutError: (504, "timeout"),
    ClientGoneError: (CLIENT_GONE, None),
    EngineError: (500, "computation_failed"),
    FileNotFoundError: (400, None),
    ValueError: (400, None),
}


def to_api_error(error: Exception) -> ApiError:
    """Return OpenAI's form of what a handler raised."""
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        complaints = []
        for found in error.errors():
            field = ".".join(str(part) for part in found["loc"][1:])
            message = str(found["msg"]).removeprefix("Value error, ")
            complaints.append((field, f"{field}: {message}" if field else message))
        messages = "; ".join(message for _, message in complaints[:5])
        return ApiError(400, messages, param=complaints[0][0] or None)
    for kind, (status, code) in STATUS_OF.items():
        if isinstance(error, kind):
            param = "model" if kind is UnknownPrefixError else None
            return ApiError(status, str(error), code, param)
    return ApiError(500, "the server failed; its log says why.", "internal_error")


class EventNotifier:
    """Sets events of the event loop from another thread, waking the loop once for many of them.

    A wake-up is a system call of the engine's thread; one for every row would slow down its steps.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[asyncio.Event] = []

    def set_soon(self, loop: asyncio.AbstractEventLoop, progress: asyncio.Event) -> None:
        """Have the loop set an event."""
        with self._lock:
            self._pending.append(progress)
            is_first = len(self._pending) == 1
        if is_first:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._set_pending)

    def _set_pending(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        for progress in pending:
            progress.set()


class RequestMonitor:
    """Wakes the handler of one request: on new tokens, on its timeout, on a disconnect."""

    def __init__(
        self, receive: Receive, notifier: EventNotifier, *, timeout_s: float, every_token: bool
    ) -> None:
        """Start the timeout; every_token False wakes the handler at the end of the answer only."""
        self._notifier = notifier
        self._every_token = every_token
        self._loop = asyncio.get_running_loop()
        self._progress = asyncio.Event()
        self._error: Exception | None = None
        late = AnswerTimeoutError(f"the answer took over {timeout_s:g} s; ask for fewer tokens.")
        self._timer = self._loop.call_later(timeout_s, self._fail, late)
        self._watch = asyncio.create_task(self._watch_client(receive))

    def on_progress(self, finished: bool) -> None:
        """Wake the handler; called in another thread."""
        if (finished or self._every_token) and not self._progress.is_set():
            self._notifier.set_soon(self._loop, self._progress)

    async def wait(self) -> None:
        """Wait for progress; raises AnswerTimeoutError or ClientGoneError."""
        await self._progress.wait()
        self._progress.clear()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop watching."""
        self._timer.cancel()
        self._watch.cancel()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._progress.set()

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self._fail(ClientGoneError())


async def _start_in_thread(start: Callable[[], Answer]) -> Answer:
    """Start an answer outside the event loop, since tokenizing a long prompt takes a while."""
    task = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        # The thread continues; its answer is dropped, which stops the computation.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise


async def _pieces(answer: Answer, monitor: RequestMonitor) -> AsyncIterator[str]:
    """Yield new text, at the end even if it is empty; SessionClosedError if the server stops."""
    while True:
        piece = answer.poll()
        if piece or answer.finish_reason is not None:
            yield piece
        if answer.finish_reason == "cancelled":
            raise SessionClosedError("the server is shutting down.")
        if answer.finish_reason is not None:
            return
        await monitor.wait()


class Api:
    """The handlers and what they share."""

    def __init__(
        self,
        session: AbstractSession,
        *,
        api_key: str | None,
        timeout_s: float,
        cards: Cards | None,
        to_prompt: Callable[[str], str],
    ) -> None:
        """Answer with session; a request may take timeout_s seconds, queueing included."""
        self.session = session
        self.has_key = api_key is not None
        self.timeout_s = timeout_s
        self.cards, self.to_prompt = cards, to_prompt
        self.metrics = Metrics()
        self.notifier = EventNotifier()
        self.started = int(time.time())

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """Answer a chat."""
        return await self._complete(body, request)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Answer a prompt as evaluation does: with the raw text."""
        return await self._complete(body, request)

    async def _complete(self, body: ChatBody | CompletionBody, request: Request) -> Response:
        query, history, options = body.to_request()
        if isinstance(body, ChatBody):
            query = self.to_prompt(query)
        formatter = ReplyFormatter(
            self.session.tokenizer,
            model=body.model,
            is_chat=isinstance(body, ChatBody),
            cards=self.cards,
        )
        monitor = RequestMonitor(
            request.receive,
            self.notifier,
            timeout_s=self.timeout_s,
            every_token=bool(body.stream or body.stops()),
        )
        try:
            start = partial(self.session.chat, query, history, body.model, **options)
            answer = await _start_in_thread(partial(start, on_progress=monitor.on_progress))
        except BaseException:
            monitor.close()
            raise
        if body.stream:
            stream = self._stream(body, answer, monitor, formatter)
            return StreamingResponse(stream, media_type="text/event-stream")
        with self._closing(body.model, answer, monitor):
            async for _ in _pieces(answer, monitor):
                continue
        return JSONResponse(formatter.whole(answer))

    async def _stream(
        self,
        body: ChatBody | CompletionBody,
        answer: Answer,
        monitor: RequestMonitor,
        formatter: ReplyFormatter,
    ) -> AsyncIterator[bytes]:
        """Yield the events of one answer; an error after the start is an event too."""
        num_sent = 0  # log-probabilities
        with self._closing(body.model, answer, monitor):
            try:
                if formatter.is_chat:
                    yield event(formatter.chunk("", is_first=True))
                async for piece in _pieces(answer, monitor):
                    new = answer.logprobs[num_sent:]
                    num_sent += len(new)
                    logprobs = formatter.logprobs(new, len(answer.text) - len(piece))
                    if piece or logprobs:
                        yield event(formatter.chunk(piece, logprobs=logprobs))
                yield event(formatter.end_chunk(answer))
                if body.stream_options is not None and body.stream_options.include_usage:
                    yield event(formatter.usage_chunk(answer))
                yield b"data: [DONE]\n\n"
            except ClientGoneError:
                return
            except (AnswerTimeoutError, EngineError, SessionClosedError) as error:
                yield event(to_api_error(error).body())

    @contextmanager
    def _closing(self, model: str, answer: Answer, monitor: RequestMonitor) -> Iterator[None]:
        """Stop the answer and count its tokens, however the block ends."""
        try:
            yield
        finally:
            answer.close()
            monitor.close()
            prompt, completion = answer.usage
            self.metrics.count_tokens(model, prompt=prompt, completion=completion)

    async def models(self) -> dict[str, Any]:
        """List the base and the prefixes."""
        names = [BASE_NAME, *self.session.prefixes]
        return {"object": "list", "data": [self._model(name) for name in names]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe one of them."""
        if name != BASE_NAME:
            self.session.find_prefix(name)
        return self._model(name)

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "ptuning",
            "max_model_len": self.session.context_length,  # vLLM's name: prompt and answer together
        }

    async def prefixes(self) -> dict[str, Any]:
        """List the prefixes with their directories."""
        self._require_key()
        data = [
            {
                "name": prefix.name,
                "path": str(prefix.path),
                "prefix_length": prefix.info.prefix_length,
                "step": prefix.info.step,
                "settings": prefix.info.settings,
            }
            for prefix in self.session.prefixes.values()
        ]
        return {"object": "list", "data": data}

    async def add_prefix(self, body: PrefixBody) -> dict[str, Any]:
        """Load a prefix from a directory of this machine."""
        self._require_key()
        info = await asyncio.to_thread(
            self.session.add_prefix, body.name, body.path, allow_other_base=body.allow_other_base
        )
        return {"name": body.name, "prefix_length": info.prefix_length, "step": info.step}

    async def remove_prefix(self, name: str) -> dict[str, Any]:
        """Remove a prefix; answers in progress keep it."""
        self._require_key()
        await asyncio.to_thread(self.session.remove_prefix, name)  # waits while one is loaded
        return {"name": name, "deleted": True}

    def _require_key(self) -> None:
        if not self.has_key:
            raise HTTPException(
                403, "prefixes can be managed with a key only; start the server with --api_key."
            )

    async def health(self) -> dict[str, Any]:
        """Say that the server answers, and how much work it has."""
        activity = self.session.activity
        return {"status": "ok", "rows": activity.num_rows, "waiting": activity.num_waiting}

    async def metrics_text(self) -> Response:
        """Return the metrics for Prometheus."""
        activity = self.session.activity
        gauges: dict[str, tuple[str, float]] = {
            "rows": ("Answers being decoded.", activity.num_rows),
            "waiting": ("Requests in the queue.", activity.num_waiting),
            "slot_bytes": ("Memory of keys and values.", activity.slot_bytes),
            "prefixes": ("Prefixes loaded.", len(self.session.prefixes)),
        }
        text = self.metrics.to_text(gauges)
        return PlainTextResponse(text, media_type=self.metrics.content_type)


async def _on_error(request: Request, error: Exception) -> Response:
    return to_api_error(error).response()


def build_app(
    session: AbstractSession,
    *,
    api_key: str | None = None,
    timeout_s: float = TIMEOUT_S,
    max_body_bytes: int = MAX_BODY_KIB * 1024,
    cards: Cards | None = None,
    to_prompt: Callable[[str], str] = str,
) -> FastAPI:
    """Return the ASGI application; the caller closes the session.

    API calls in answers are checked against cards and never executed. to_prompt is applied to the
    last question of a chat.
    """
    api = Api(session, api_key=api_key, timeout_s=timeout_s, cards=cards, to_prompt=to_prompt)
    # FastAPI's documentation pages load scripts from the internet, so only the schema is served.
    app = FastAPI(title="ptuning", docs_url=None, redoc_url=None)
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name}", api.model),
        ("POST", "/v1/chat/completions", api.chat_completions),
        ("POST", "/v1/completions", api.completions),
        ("GET", "/v1/prefixes", api.prefixes),
        ("POST", "/v1/prefixes", api.add_prefix),
        ("DELETE", "/v1/prefixes/{name}", api.remove_prefix),
        ("GET", "/health", api.health),
        ("GET", "/metrics", api.metrics_text),
    ]
    for method, path, handler in routes:
        app.add_api_route(path, handler, methods=[method], response_model=None)
    for kind in (*STATUS_OF, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(
        AuthAndLimitsMiddleware,
        api_key=api_key,
        max_body_bytes=max_body_bytes,
        metrics=api.metrics,
        paths={path for _, path, _ in routes},
    )
    return app


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
    """Serve until Ctrl-C, SIGTERM, or `server.should_exit`."""
    config = server.config
    logger.info("Serving on http://%s:%d/v1 (Ctrl-C to stop)", config.host, config.port)
    try:
        server.run()
    except KeyboardInterrupt:  # raised again by uvicorn after its shutdown
        logger.info("Stopped.")
