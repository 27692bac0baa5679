"""OpenAI's forms of requests, replies and errors, with this project's additions.

A parameter that cannot be honoured is rejected, never ignored, unless its value requests nothing.
"""

import json
import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ptuning.apicalls.cards import Cards
from ptuning.apicalls.verdicts import to_shown_call
from ptuning.data.tokenizer import ChatGLMTokenizer, restore_whitespace
from ptuning.engine.request import TokenLogprob
from ptuning.serve.text_stream import Answer

MAX_STOPS = 16
# Who asks and how it is billed: no effect on the answer.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NO_OPS: dict[str, list[Any]] = {  # not supported: only values that request nothing
    "n": [1],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


class ChatRequest(NamedTuple):
    """A request as `AbstractSession.chat` takes it; options are fields of `ChatOptions`."""

    query: str
    history: list[tuple[str, str]]
    options: dict[str, Any]


class Strict(BaseModel):
    """Rejects unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream contains besides the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Blend(Strict):
    """A second prefix; weight 1 is the second alone."""

    model: str
    weight: Annotated[float, Field(ge=0, le=1)]


class CommonBody(Strict):
    """What both kinds of completion share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    # Not in OpenAI's API:
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    prefix_strength: Annotated[float, Field(ge=0, le=1000)] = 1.0
    blend: Blend | None = None
    clean: bool | None = None
    max_source_length: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_no_ops(cls, data: Any) -> Any:
        """Drop unsupported parameters whose value has no effect; reject other values."""
        if not isinstance(data, Mapping):
            return data
        for name, harmless in NO_OPS.items():
            value = data.get(name)
            if value is not None and value not in harmless:
                shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
                raise ValueError(f"{name} is {shown}, which is not supported; leave it out.")
        return {
            name: value
            for name, value in data.items()
            if name not in NO_OPS and name not in IGNORED
        }

    def stops(self) -> list[str]:
        """Return the stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def common_options(self) -> dict[str, Any]:
        """Return fields of `ChatOptions`: greedy unless the request has a sampling parameter."""
        samples = self.top_p is not None or self.top_k is not None
        sampling = {
            "temperature": 1.0 if samples and self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        return {
            "strength": self.prefix_strength,
            "blend": None if self.blend is None else (self.blend.model, self.blend.weight),
            "stop": self.stops(),
            "max_source_length": self.max_source_length,
            **{name: value for name, value in sampling.items() if value is not None},
        }


class TextPart(Strict):
    """A part of a message; the model reads text only."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(CommonBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def to_request(self) -> ChatRequest:
        """Return the request.

        ValueError unless user and assistant take turns and the user's message is the last.
        """
        messages = list(self.messages)
        system = []
        while messages and messages[0].role in ("system", "developer"):
            system.append(messages.pop(0).text)
        for index, message in enumerate(messages):
            expected = "assistant" if index % 2 else "user"
            if message.role != expected:
                raise ValueError(
                    f"messages[{index + len(system)}] has the role {message.role}, but {expected} "
                    "is expected; after system messages, user and assistant take turns."
                )
        if len(messages) % 2 == 0:
            raise ValueError("messages end without a question; the last one must be the user's.")
        pairs = zip(messages[:-1:2], messages[1::2], strict=True)
        options = self.common_options() | {
            "system": "\n".join(system),
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "num_logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "clean": self.clean is not False,
        }
        history = [(question.text, answer.text) for question, answer in pairs]
        return ChatRequest(messages[-1].text, history, options)


class CompletionBody(CommonBody):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def to_request(self) -> ChatRequest:
        """Return the request; like evaluation's, its answer is the raw text."""
        options = self.common_options() | {
            "max_new_tokens": self.max_tokens,
            "num_logprobs": self.logprobs,
            "clean": self.clean is True,
        }
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return ChatRequest(prompt, [], options)


class PrefixBody(Strict):
    """POST /v1/prefixes."""

    name: str
    path: str
    allow_other_base: bool = False


class ReplyFormatter:
    """Formats one answer as a chat completion or a plain one."""

    def __init__(
        self,
        tokenizer: ChatGLMTokenizer,
        *,
        model: str,
        is_chat: bool,
        cards: Cards | None = None,
    ) -> None:
        """Give the answer its id and time; an API call in it is checked against cards."""
        self.is_chat = is_chat
        self._tokenizer = tokenizer
        self._cards = cards
        self._kind = "chat.completion" if is_chat else "text_completion"
        self._chunk_kind = "chat.completion.chunk" if is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return a finished answer."""
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": answer.finish_reason,
            "logprobs": self.logprobs(answer.logprobs, 0),
        }
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        reply = {**self._head, "object": self._kind, "choices": [choice]}
        return reply | {"usage": _usage(answer)} | self._additions(answer)

    def chunk(
        self,
        text: str | None,
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
        is_first: bool = False,
    ) -> dict[str, Any]:
        """Return one chunk of a stream."""
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if self.is_chat:
            delta = {"role": "assistant"} if is_first else {}
            choice["delta"] = delta if text is None else delta | {"content": text}
        else:
            choice["text"] = text or ""
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def end_chunk(self, answer: Answer) -> dict[str, Any]:
        """Return the chunk with the finish reason and what OpenAI's API does not have."""
        return self.chunk(None, finish_reason=answer.finish_reason) | self._additions(answer)

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """Return the last chunk of a stream with `include_usage`."""
        return {
            **self._head,
            "object": self._chunk_kind,
            "choices": [],
            "usage": _usage(answer),
        }

    def logprobs(self, found: Sequence[TokenLogprob], text_offset: int) -> dict[str, Any] | None:
        """Return log-probabilities in this form, or None if there are none."""
        if not found:
            return None
        if self.is_chat:
            content = [
                self._entry(one.token_id, one.logprob)
                | {"top_logprobs": [self._entry(*pair) for pair in one.top]}
                for one in found
            ]
            return {"content": content, "refusal": None}
        texts = [self._token_text(one.token_id) for one in found]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(one.logprob) for one in found],
            "top_logprobs": [
                {self._token_text(token): _finite(value) for token, value in one.top}
                for one in found
            ],
            "text_offset": [
                text_offset + sum(map(len, texts[:index])) for index in range(len(texts))
            ],
        }

    def _additions(self, answer: Answer) -> dict[str, Any]:
        """Return what was left out of the prompt, and the answer's API call, if any."""
        found = {} if answer.notice is None else {"notices": [answer.notice]}
        shown = None if self._cards is None else to_shown_call(answer.text, self._cards)
        return found if shown is None else found | {"api_call": shown._asdict()}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        byte = BYTE_PIECE.fullmatch(text)
        encoded = [int(byte[1], 16)] if byte else list(text.encode("utf-8"))
        return {"token": text, "logprob": _finite(logprob), "bytes": encoded}

    def _token_text(self, token_id: int) -> str:
        """Return one token as text with its spaces; a single byte by its name `<0xE4>`."""
        piece = str(self._tokenizer.convert_ids_to_tokens(token_id))
        return restore_whitespace(piece).replace("▁", " ")


def _usage(answer: Answer) -> dict[str, int]:
    counts = answer.usage._asdict()
    return counts | {"total_tokens": sum(counts.values())}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


class ApiError(NamedTuple):
    """An error in OpenAI's form."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "invalid_request_error" if self.status < 500 else "server_error"
        message = self.message.encode("utf-8", "replace").decode("utf-8")
        kind = kinds.get(self.status, default)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)
