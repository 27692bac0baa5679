"""Where completions come from: the engine in this process, or an OpenAI-compatible endpoint.

Both take prompts with a seed each and yield completions as they finish.
"""

import asyncio
import logging
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.engine import Engine
from ptuning.engine.prefixes import PrefixMix, SharedPrefix, mix_prefixes
from ptuning.engine.request import Request, Sampling
from ptuning.model.chatglm import ChatGLMForConditionalGeneration

TRIES = 7  # of one request: without Retry-After, its waits add up to half a minute
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
TRANSIENT = {408, 409, 429}  # and every status from 500 on
CONTEXT_FIELDS = ("max_model_len", "context_length")  # as vLLM and as OpenRouter report it
CONTEXT_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class Ask(NamedTuple):
    """A prompt to complete, the number of its request, and the seed of its sampling."""

    request: int
    prompt: str
    seed: int


class Completion(NamedTuple):
    """A completion; text None is a reply that was none. Counts are in tokens."""

    text: str | None
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EndpointError(ValueError):
    """The endpoint refuses or keeps failing: more requests would not help."""


class EngineSource:
    """A loaded model, with its prefix if it has one; prompts share a batch of max_rows."""

    repeats = True  # equal prompts and seeds give equal completions
    num_retries = 0

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        *,
        name: str,
        max_rows: int,
    ) -> None:
        self.name = name
        self.context_length: int | None = model.config.max_sequence_length
        self._model, self._tokenizer, self._max_rows = model.eval(), tokenizer, max_rows
        with torch.no_grad():
            key_values = model.transformer.prefix_for(True)
        self._mix: PrefixMix = ()
        if key_values is not None:
            self._mix = mix_prefixes([(SharedPrefix(key_values), 1.0)])

    def num_tokens(self, prompt: str) -> int | None:
        """Return the length of a prompt, [gMASK] <sop> included."""
        return len(self._tokenizer(prompt)["input_ids"])

    def complete(
        self, asks: Sequence[Ask], sampling: Sampling, max_new_tokens: int
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (request, completion) as rows finish."""
        engine = Engine(self._model, max_rows=self._max_rows)
        requests = {}
        for ask in asks:
            ids = self._tokenizer(ask.prompt)["input_ids"]
            seeded = replace(sampling, seed=ask.seed)
            requests[engine.add(Request(ids, max_new_tokens, self._mix, seeded))] = ask.request
        while not engine.is_idle:
            for row in engine.step():
                if row.finish_reason is not None:
                    text = str(self._tokenizer.decode(row.answer, skip_special_tokens=True))
                    counts = (len(row.prompt), len(row.answer))
                    yield requests[row], Completion(text, row.finish_reason, *counts)


class EndpointSource:
    """An endpoint, asked through the openai package; transient failures are retried."""

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

        self.name = model
        self.num_retries = 0
        self._url, self._api, self._key_name = url, api, key_name
        self._openai: Any = openai
        self._client: Any = openai.AsyncOpenAI(
            base_url=url if urllib.parse.urlsplit(url).path.strip("/") else f"{url}/v1",
            api_key=key or "none",
            timeout=timeout_s,
            max_retries=0,  # the package would retry an exhausted quota
        )
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Semaphore(concurrency)
        self.context_length = self._loop.run_until_complete(self._find_context())

    def num_tokens(self, prompt: str) -> int | None:
        """Return None: the endpoint's tokenizer is unknown."""
        return None

    def complete(
        self, asks: Sequence[Ask], sampling: Sampling, max_new_tokens: int
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (request, completion) as replies arrive; after an error the rest is cancelled."""
        requests = {
            self._loop.create_task(self._complete(ask, sampling, max_new_tokens)): ask.request
            for ask in asks
        }
        pending = set(requests)
        try:
            while pending:
                done, pending = self._loop.run_until_complete(
                    asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                )
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    yield requests[task], task.result()
        finally:
            for task in pending:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))

    async def _find_context(self) -> int | None:
        """Return the context that the endpoint reports for its model; None if it does not."""
        try:
            found = await self._client.models.retrieve(self.name, timeout=CONTEXT_TIMEOUT_S)
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

    async def _complete(self, ask: Ask, sampling: Sampling, max_new_tokens: int) -> Completion:
        """Complete one prompt, with retries; EndpointError where they do not help."""
        options: dict[str, Any] = {
            "model": self.name,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": max_new_tokens,
            "seed": ask.seed,
        }
        create, options["prompt"] = self._client.completions.create, ask.prompt
        if self._api == "chat":
            create = self._client.chat.completions.create
            options["messages"] = [{"role": "user", "content": options.pop("prompt")}]
        async with self._free:
            for number in range(TRIES):
                try:
                    return self._read(await create(**options))
                except self._openai.APIConnectionError as error:  # a time-out is one
                    failure, wait = error, 0.0
                except self._openai.APIStatusError as error:
                    is_transient = error.status_code in TRANSIENT or error.status_code >= 500
                    if not is_transient or error.code == "insufficient_quota":
                        raise self._refusal(error) from error
                    failure, wait = error, _retry_after(error.response.headers)
                except EndpointError:
                    raise
                except (ValueError, TypeError, AttributeError, LookupError):
                    return Completion(None)  # no JSON, or without the fields of a completion
                if number < TRIES - 1:
                    wait = min(max(wait, FIRST_WAIT_S * 2**number), LONGEST_WAIT_S)
                    self.num_retries += 1
                    logger.info(
                        "Request %d: %s; again in %.3g s", ask.request, _short(failure), wait
                    )
                    await asyncio.sleep(wait)
        raise EndpointError(
            f"--endpoint {self._url} failed {TRIES} times for one request ({_short(failure)}); the "
            "same command continues from what is kept."
        ) from failure

    def _read(self, reply: Any) -> Completion:
        choice = reply.choices[0]
        text = choice.message.content if self._api == "chat" else choice.text
        if not isinstance(text, str):
            raise TypeError("the reply has no text")
        notices = (reply.model_extra or {}).get("notices")
        if notices:  # of `ptuning serve`: a prefix takes prompts as long as its training's
            raise EndpointError(
                f"the endpoint shortened the prompt ({notices[0]}); use --model base, or a prefix "
                "trained with a larger --max_source_length."
            )
        usage = reply.usage
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        return Completion(text, choice.finish_reason or "stop", *counts)

    def _refusal(self, error: Any) -> EndpointError:
        remedies = {
            401: f"check the key in {self._key_name} (--api_key_env)",
            403: f"check what the key in {self._key_name} (--api_key_env) may use",
            404: "check --endpoint, --model and --api",
            429: "the quota is used up; with a new one, the same command continues",
        }
        remedy = remedies.get(error.status_code, "check --endpoint, --model and the lengths")
        return EndpointError(f"--endpoint {self._url}: {_short(error)}; {remedy}.")


Source = EngineSource | EndpointSource


def _retry_after(headers: Any) -> float:
    """Return the wait that a reply asks for, in seconds; 0 without one."""
    try:
        return float(headers.get("retry-after", 0))
    except ValueError:  # a date
        return 0.0


def _short(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
