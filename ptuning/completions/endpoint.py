"""Completions from an OpenAI-compatible endpoint, through the openai package."""

import logging
import urllib.parse
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

from ptuning.completions.source import Ask, Completion
from ptuning.engine.request import Sampling

logger = logging.getLogger(__name__)

MAX_RETRIES = 6  # of one request, with the waits of the openai package: half a minute in all
CONTEXT_FIELDS = ("max_model_len", "context_length")  # as vLLM and as OpenRouter report it
CONTEXT_TIMEOUT_S = 10.0
# Codes of a 400 that one prompt alone has: a filter of Azure, OpenAI, Alibaba Cloud; its length.
ALONE_REFUSED = (
    *("content_filter", "content_policy_violation", "data_inspection_failed"),
    "context_length_exceeded",
)
REMEDIES = {  # by the status of a refusal
    401: "check the key in {key_name} (--api_key_env)",
    403: "check what the key in {key_name} (--api_key_env) may use",
    404: "check --endpoint, --model and --api",
    429: "once the limit or quota allows, the same command continues",
}
OTHER_REFUSAL = (
    "check --endpoint, --model and the lengths; if this prompt alone is refused, leave out its "
    "row, or have generate ask others with another --seed and --out"
)
FAILING = "it failed {tries} times; the same command continues"
UNREACHED = "tried {tries} times; the same command continues"
TOO_SLOW = UNREACHED + ", with a larger --timeout if answers take longer"

Replies = SimpleQueue[tuple[int, Completion | Exception]]


class EndpointError(ValueError):
    """The endpoint refuses or keeps failing: more requests would not help."""


class EndpointSource:
    """An endpoint; the openai package retries transient failures."""

    repeats = False

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: str,
        concurrency: int,
        timeout_s: float,
        key: str | None,
        key_name: str,
    ) -> None:
        """Connect, and ask for the model's context; EndpointError if nothing answers.

        api is "chat" or "completions". /v1 is added to a url without a path. key_name is where the
        key is from.
        """
        import openai

        for name in ("httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log every request
        self.name, self.kind = model, api
        self.num_retries = 0
        self._url, self._key_name = url, key_name
        self._concurrency = concurrency
        self._gives_logprobs = True
        self._openai: Any = openai
        self._options: dict[str, Any] = {
            "base_url": url if urllib.parse.urlsplit(url).path.strip("/") else f"{url}/v1",
            "api_key": key or "none",
            "timeout": timeout_s,
        }
        self.context_length = self._find_context()

    def _new_client(self) -> Any:
        hooks: dict[str, Any] = {"request": [self._count_retry], "response": [end_on_quota]}
        client = self._openai.DefaultHttpxClient(event_hooks=hooks)
        return self._openai.OpenAI(**self._options, max_retries=MAX_RETRIES, http_client=client)

    def num_tokens(self, prompt: str) -> int | None:
        """Return None: the endpoint's tokenizer is unknown."""
        return None

    def complete(
        self,
        asks: Sequence[Ask],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        top_logprobs: int = 0,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (request, completion) as replies arrive; after an error nothing more is asked.

        top_logprobs: how many of the most probable first tokens each completion names, where the
        endpoint gives their log-probabilities.
        """
        if not asks:
            return
        options: dict[str, Any] = {
            "model": self.name,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": max_new_tokens,
        }
        if top_logprobs:
            in_chat = {"logprobs": True, "top_logprobs": top_logprobs}
            options |= in_chat if self.kind == "chat" else {"logprobs": top_logprobs}
        client, waiting, replies = self._new_client(), deque(asks), Replies()
        for _ in asks[: self._concurrency]:  # daemons: the process may end before their replies
            values = (client, options, waiting, replies)
            Thread(target=self._work, args=values, daemon=True).start()
        try:
            for _ in asks:
                request, reply = replies.get()
                if isinstance(reply, Exception):
                    raise reply
                yield request, reply
        finally:
            waiting.clear()
        client.close()  # only now: a thread whose client is closed would try again

    def _work(
        self, client: Any, options: Mapping[str, Any], waiting: deque[Ask], replies: Replies
    ) -> None:
        """Complete one prompt after another; after an error no thread begins another."""
        while True:
            try:
                ask = waiting.popleft()
            except IndexError:
                return
            try:
                replies.put((ask.request, self._complete(client, ask, options)))
            except Exception as error:  # noqa: BLE001  # raised again by the caller
                waiting.clear()
                replies.put((ask.request, error))

    def _count_retry(self, request: Any) -> None:
        is_retry = request.headers.get("x-stainless-retry-count", "0") != "0"
        self.num_retries += is_retry

    def _find_context(self) -> int | None:
        """Return the context that the endpoint reports for its model; None if it does not."""
        try:
            with self._new_client() as client:
                once = client.with_options(max_retries=0, timeout=CONTEXT_TIMEOUT_S)
                found = once.models.retrieve(self.name)
        except self._openai.APITimeoutError:
            return None
        except self._openai.APIConnectionError as error:
            raise EndpointError(
                f"nothing answers at --endpoint {self._url} ({error.__cause__ or error}); start "
                "the server, or correct the address."
            ) from error
        except (self._openai.APIError, ValueError):
            return None  # many servers say nothing of their models
        extra = getattr(found, "model_extra", None) or {}
        lengths = (extra.get(field) for field in CONTEXT_FIELDS)
        return next((length for length in lengths if isinstance(length, int)), None)

    def _complete(self, client: Any, ask: Ask, options: Mapping[str, Any]) -> Completion:
        """Complete one prompt; EndpointError where the endpoint refuses or keeps failing."""
        try:
            reply = self._create(client, ask, options)
            choice = reply.choices[0]
            text = choice.message.content if self.kind == "chat" else choice.text
            text = text.encode("utf-8", "replace").decode()  # no file takes a lone surrogate
            notices = (reply.model_extra or {}).get("notices")
            completion = Completion(
                text,
                choice.finish_reason or "stop",
                _count(reply.usage, "prompt_tokens"),
                _count(reply.usage, "completion_tokens"),
                first_logprobs(choice),
            )
        except self._openai.APIStatusError as error:
            if error.status_code == 400 and error.code in ALONE_REFUSED:
                return Completion(None, str(error.code))
            default = FAILING if error.status_code >= 500 else OTHER_REFUSAL
            raise self._failure(error, REMEDIES.get(error.status_code, default)) from error
        except self._openai.APITimeoutError as error:
            raise self._failure(error, TOO_SLOW) from error
        except self._openai.APIConnectionError as error:
            raise self._failure(error, UNREACHED) from error
        except (ValueError, TypeError, AttributeError, LookupError):
            return Completion(None)  # no JSON, or without the fields of a completion
        if notices:  # of `ptuning serve`: a prefix takes prompts as long as its training's
            raise EndpointError(
                f"the endpoint shortened the prompt ({notices[0]}); use --model base, or a prefix "
                "trained with a larger --max_source_length."
            )
        return completion

    def _create(self, client: Any, ask: Ask, options: Mapping[str, Any]) -> Any:
        """Return the reply; an endpoint that refuses log-probabilities is asked without them."""
        if self.kind == "chat":
            create = client.chat.completions.create
            own: dict[str, Any] = {"messages": [{"role": "user", "content": ask.prompt}]}
        else:
            create, own = client.completions.create, {"prompt": ask.prompt}
        own["seed"] = ask.seed
        plain = {name: options[name] for name in options if "logprobs" not in name}
        if plain == options or not self._gives_logprobs:
            return create(**plain, **own)
        try:
            return create(**options, **own)
        except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
            reply = create(**plain, **own)
            if self._gives_logprobs:
                self._gives_logprobs = False
                logger.warning(
                    "--endpoint %s gives no log-probabilities: %s", self._url, _said(error)
                )
            return reply

    def _failure(self, error: Exception, remedy: str) -> EndpointError:
        remedy = remedy.format(key_name=self._key_name, tries=MAX_RETRIES + 1)
        return EndpointError(f"--endpoint {self._url}: {_said(error)}; {remedy}.")


def first_logprobs(choice: Any) -> dict[str, float] | None:
    """Return those of the first token that is not blank, in a choice of either API; None without.

    Tokenizers such as ChatGLM's begin many answers with a token for a blank.
    """
    try:
        found = choice.logprobs
        if getattr(found, "content", None):
            tokens = [one.token for one in found.content]
            tops = [{top.token: top.logprob for top in one.top_logprobs} for one in found.content]
        else:
            tokens, tops = found.tokens, found.top_logprobs
        place = next((place for place, token in enumerate(tokens) if token.strip()), 0)
        return {token: float(logprob) for token, logprob in tops[place].items()} or None
    except (ValueError, TypeError, AttributeError, LookupError):
        return None


def _count(usage: Any, name: str) -> int:
    found = getattr(usage, name, 0)
    return found if isinstance(found, int) else 0


def _said(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]


def end_on_quota(response: Any) -> None:
    """Keep the openai package from retrying where a quota is exhausted, not a rate."""
    if response.status_code == 429 and b"insufficient_quota" in response.read():
        response.headers["x-should-retry"] = "false"
