"""The HTTP face: OpenAI's API over a session. `model` names a prefix, `base` the untouched model.

Requests that arrive together are decoded together, each with its own prefix.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ptuning.serve.answer import Answer
from ptuning.serve.api_answers import (
    Alarm,
    AnswerTimeoutError,
    ClientGoneError,
    Waiter,
    follow,
    start_answer,
)
from ptuning.serve.api_replies import Reply, error_body, error_response, event
from ptuning.serve.api_schema import ChatBody, CommonBody, CompletionBody, PrefixBody
from ptuning.serve.metrics import CONTENT_TYPE, Metrics
from ptuning.serve.middleware import Guard
from ptuning.serve.scheduler import EngineError, QueueFullError, SessionClosedError
from ptuning.serve.session import BASE_NAME, SessionFront, UnknownPrefixError

MAX_BODY_KIB = 256  # ChatGLM-6B's context of 2,048 tokens is about 10 KiB of Chinese
TIMEOUT_S = 300.0
GONE = 499  # nginx's word for a client that left; nobody reads it


class Api:
    """The handlers and what they share."""

    def __init__(
        self, session: SessionFront[Any], *, api_key: str | None, timeout_s: float
    ) -> None:
        """Answer with session; a request may take timeout_s seconds, waiting included."""
        self.session = session
        self.has_key = api_key is not None
        self.timeout_s = timeout_s
        self.metrics = Metrics()
        self.alarm = Alarm()
        self.started = int(time.time())

    # Completions

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """Answer a chat."""
        turns = body.turns()

        def start(waiter: Waiter) -> Answer:
            return self.session.chat(
                turns.query,
                turns.history,
                system=turns.system,
                max_new_tokens=body.max_completion_tokens or body.max_tokens,
                num_logprobs=body.num_logprobs,
                clean=body.clean is not False,
                on_progress=waiter.on_progress,
                **_options(body),
            )

        return await self._answer(body, request, start, is_chat=True)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Answer a prompt as evaluation does: the raw text, not cleaned up."""

        def start(waiter: Waiter) -> Answer:
            return self.session.chat(
                body.query,
                max_new_tokens=body.max_tokens,
                num_logprobs=body.logprobs,
                clean=body.clean is True,
                on_progress=waiter.on_progress,
                **_options(body),
            )

        return await self._answer(body, request, start, is_chat=False)

    async def _answer(
        self,
        body: CommonBody,
        request: Request,
        start: Callable[[Waiter], Answer],
        *,
        is_chat: bool,
    ) -> Response:
        reply = Reply(self.session.tokenizer, model=body.model, is_chat=is_chat)
        waiter = Waiter(
            request.receive,
            self.alarm,
            timeout_s=self.timeout_s,
            each_token=bool(body.stream or body.stops()),
        )
        try:
            answer = await start_answer(lambda: start(waiter))
        except BaseException:
            waiter.close()
            raise
        if body.stream:
            stream = self._stream(body, answer, waiter, reply)
            return StreamingResponse(stream, media_type="text/event-stream")
        try:
            async for _ in follow(answer, waiter):
                continue
        finally:
            self._count(body, answer)
        if answer.finish_reason == "cancelled":
            raise SessionClosedError("the server is shutting down.")
        return JSONResponse(reply.whole(answer))

    async def _stream(
        self, body: CommonBody, answer: Answer, waiter: Waiter, reply: Reply
    ) -> AsyncIterator[bytes]:
        """Yield the events of one answer; an error after the start is an event too."""
        num_told = 0  # tokens whose log-probabilities went out
        try:
            if reply.is_chat:
                yield event(reply.chunk("", is_first=True))
            async for piece in follow(answer, waiter):
                logprobs = reply.logprobs(answer.logprobs[num_told:], len(answer.text) - len(piece))
                num_told = len(answer.logprobs)
                if piece or logprobs:
                    yield event(reply.chunk(piece, logprobs=logprobs))
            if answer.finish_reason == "cancelled":
                raise SessionClosedError("the server is shutting down.")
            yield event(reply.end_chunk(answer))
            if body.stream_options is not None and body.stream_options.include_usage:
                yield event(reply.usage_chunk(answer))
            yield b"data: [DONE]\n\n"
        except ClientGoneError:
            return
        except (AnswerTimeoutError, EngineError, SessionClosedError) as error:
            status, code = _status_of(error)
            yield event(error_body(status, self._words(error), code=code, param=None))
        finally:
            answer.close()
            waiter.close()
            self._count(body, answer)

    def _count(self, body: CommonBody, answer: Answer) -> None:
        usage = answer.usage
        self.metrics.count_tokens(
            body.model, prompt=usage.prompt_tokens, completion=usage.completion_tokens
        )

    # Models and prefixes

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
        return {"id": name, "object": "model", "created": self.started, "owned_by": "ptuning"}

    async def prefixes(self) -> dict[str, Any]:
        """List the prefixes with where they come from."""
        self._need_key()
        found = self.session.prefixes.values()
        data = [
            {
                "name": prefix.name,
                "path": str(prefix.path),
                "prefix_length": prefix.info.prefix_length,
                "step": prefix.info.step,
                "settings": prefix.info.settings,
            }
            for prefix in found
        ]
        return {"object": "list", "data": data}

    async def add_prefix(self, body: PrefixBody) -> dict[str, Any]:
        """Load a prefix from a folder of this machine."""
        self._need_key()
        info = await asyncio.to_thread(
            self.session.add_prefix,
            body.name,
            body.path,
            allow_other_base=body.allow_other_base,
        )
        return {"name": body.name, "prefix_length": info.prefix_length, "step": info.step}

    async def remove_prefix(self, name: str) -> dict[str, Any]:
        """Forget a prefix; answers that use it are finished."""
        self._need_key()
        await asyncio.to_thread(self.session.remove_prefix, name)  # waits while one is loaded
        return {"name": name, "deleted": True}

    def _need_key(self) -> None:
        if not self.has_key:
            raise HTTPException(
                403, "prefixes are managed with a key only; start the server with --api_key."
            )

    # The state of the server

    async def health(self) -> dict[str, Any]:
        """Say that the server answers, and how much it has to do."""
        load = self.session.load_now
        return {"status": "ok", "rows": load.num_rows, "waiting": load.num_waiting}

    async def metrics_text(self) -> Response:
        """Return the counters for Prometheus."""
        load = self.session.load_now
        gauges: dict[str, tuple[str, float]] = {
            "rows": ("Answers being decoded.", load.num_rows),
            "waiting": ("Requests waiting for their turn.", load.num_waiting),
            "slot_bytes": ("Memory of keys and values.", load.slot_bytes),
            "prefixes": ("Prefixes loaded.", len(self.session.prefixes)),
        }
        return PlainTextResponse(self.metrics.to_text(gauges), media_type=CONTENT_TYPE)

    # Errors

    async def on_error(self, request: Request, error: Exception) -> Response:
        """Turn what a handler raised into OpenAI's form of an error."""
        status, code = _status_of(error)
        return error_response(status, self._words(error), code=code, param=_param_of(error))

    def _words(self, error: Exception) -> str:
        if isinstance(error, RequestValidationError):
            return "; ".join(_words_of(found) for found in error.errors()[:5])
        if isinstance(error, HTTPException):
            return str(error.detail)
        if not isinstance(error, tuple(STATUS_OF)):
            return "the server failed; its log says why."
        if isinstance(error, AnswerTimeoutError):
            return f"the answer took longer than {self.timeout_s:g} s; ask for fewer tokens."
        return str(error)


def build_app(
    session: SessionFront[Any],
    *,
    api_key: str | None = None,
    timeout_s: float = TIMEOUT_S,
    max_body_bytes: int = MAX_BODY_KIB * 1024,
) -> FastAPI:
    """Return the ASGI application; the session stays the caller's to close."""
    api = Api(session, api_key=api_key, timeout_s=timeout_s)
    # Its pages for browsers load scripts from elsewhere, so only the schema is served.
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
        app.add_exception_handler(kind, api.on_error)
    app.add_middleware(
        Guard,
        api_key=api_key,
        max_body_bytes=max_body_bytes,
        metrics=api.metrics,
        paths={path for _, path, _ in routes},
    )
    return app


# kind of error -> HTTP status and OpenAI's code; the first that fits
STATUS_OF: dict[type[Exception], tuple[int, str | None]] = {
    UnknownPrefixError: (404, "model_not_found"),
    QueueFullError: (429, "queue_full"),
    SessionClosedError: (503, "shutting_down"),
    AnswerTimeoutError: (504, "timeout"),
    ClientGoneError: (GONE, None),
    EngineError: (500, "computation_failed"),
    FileNotFoundError: (400, None),
    ValueError: (400, None),
}


def _options(body: CommonBody) -> dict[str, Any]:
    """Return what both kinds of completion pass to `Session.chat`."""
    return {
        "prefix": body.model,
        "strength": body.prefix_strength,
        "blend": None if body.blend is None else (body.blend.model, body.blend.weight),
        "stop": body.stops(),
        "max_source_length": body.max_source_length,
        **body.sampling(),
    }


def _status_of(error: Exception) -> tuple[int, str | None]:
    if isinstance(error, HTTPException):
        return error.status_code, None
    if isinstance(error, RequestValidationError):
        return 400, None
    found = (known for kind, known in STATUS_OF.items() if isinstance(error, kind))
    return next(found, (500, "internal_error"))


def _param_of(error: Exception) -> str | None:
    if isinstance(error, UnknownPrefixError):
        return "model"
    if isinstance(error, RequestValidationError):
        places = error.errors()[0]["loc"][1:]
        return ".".join(map(str, places)) or None
    return None


def _words_of(found: Any) -> str:
    """Return one complaint of pydantic with the place it is about."""
    place = ".".join(str(part) for part in found["loc"][1:])
    message = str(found["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
