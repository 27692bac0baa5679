"""Answers in OpenAI's forms: whole, in chunks, with log-probabilities, and errors."""

import json
import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from ptuning.data.tokenizer import ChatGLMTokenizer, restore_whitespace
from ptuning.engine.sampling import TokenLogprob
from ptuning.serve.answer import Answer, Usage

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI's own stand-in for it


class Reply:
    """The form of one answer: chat or plain completion."""

    def __init__(self, tokenizer: ChatGLMTokenizer, *, model: str, is_chat: bool) -> None:
        """Give the answer its id and time."""
        self.tokenizer = tokenizer
        self.is_chat = is_chat
        kind = "chat.completion" if is_chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return a finished answer."""
        logprobs = self.logprobs(answer.logprobs, 0)
        choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        choice["logprobs"] = logprobs
        reply = {**self.head, "choices": [choice], "usage": usage_of(answer.usage)}
        return reply | notices_of(answer)

    def chunk(
        self,
        text: str | None,
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
        is_first: bool = False,
    ) -> dict[str, Any]:
        """Return one piece of a stream."""
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if self.is_chat:
            delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
            choice["delta"] = delta | ({} if text is None else {"content": text})
        else:
            choice["text"] = text or ""
        return {**self.head, "object": self._chunk_object, "choices": [choice]}

    def end_chunk(self, answer: Answer) -> dict[str, Any]:
        """Return the piece that says how a stream ended, and what was left out of the prompt."""
        return self.chunk(None, finish_reason=answer.finish_reason) | notices_of(answer)

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """Return the last piece of a stream whose client asked for the counts."""
        head = {**self.head, "object": self._chunk_object}
        return {**head, "choices": [], "usage": usage_of(answer.usage)}

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def logprobs(self, found: Sequence[TokenLogprob], text_offset: int) -> dict[str, Any] | None:
        """Return log-probabilities in this form; None where there are none."""
        if not found:
            return None
        if self.is_chat:
            content = [
                self._entry(one.token_id, one.logprob)
                | {"top_logprobs": [self._entry(*pair) for pair in one.top]}
                for one in found
            ]
            return {"content": content, "refusal": None}
        texts = [self.token_text(one.token_id) for one in found]
        offsets = [text_offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(one.logprob) for one in found],
            "top_logprobs": [
                {self.token_text(token): _finite(value) for token, value in one.top}
                for one in found
            ],
            "text_offset": offsets,
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token_id)
        byte = BYTE_PIECE.fullmatch(text)
        encoded = [int(byte[1], 16)] if byte else list(text.encode("utf-8"))
        return {"token": text, "logprob": _finite(logprob), "bytes": encoded}

    def token_text(self, token_id: int) -> str:
        """Return one token as text, blanks included; a lone byte by its name `<0xE4>`."""
        piece = str(self.tokenizer.convert_ids_to_tokens(token_id))
        return restore_whitespace(piece).replace("▁", " ")


def usage_of(usage: Usage) -> dict[str, int]:
    """Return OpenAI's form of the counts."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def notices_of(answer: Answer) -> dict[str, Any]:
    """Return what was left out of the prompt, under a key of our own; nothing in most cases."""
    return {} if answer.notice is None else {"notices": [answer.notice]}


def event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def error_body(status: int, message: str, *, code: str | None, param: str | None) -> dict[str, Any]:
    """Return OpenAI's form of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    clean = message.encode("utf-8", "replace").decode("utf-8")
    return {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def error_response(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> JSONResponse:
    """Return an error as a response."""
    headers = {"Retry-After": "1"} if status == 429 else None
    body = error_body(status, message, code=code, param=param)
    return JSONResponse(body, status_code=status, headers=headers)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB
