"""Completions from an OpenAI-compatible endpoint, through the openai package."""

import asyncio
import logging
import urllib.parse
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

from ptuning.completions.source import Ask, Completion
from ptuning.engine.request import Sampling

MAX_RETRIES = 6  # of one request, with the waits of the openai package: half a minute in all
CONTEXT_FIELDS = ("max_model_len", "context_length")  # as vLLM and as OpenRouter report it
CONTEXT_TIMEOUT_S = 10.0


Replies = SimpleQueue[tuple[int, "asyncio.Task[Completion]"]]


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
        self._openai: Any = openai
        self._options: dict[str, Any] = {
            "base_url": url if urllib.parse.urlsplit(url).path.strip("/") else f"{url}/v1",
            "api_key": key or "none",
            "timeout": timeout_s,
        }
        self.context_length = asyncio.run(self._find_context())

    def _new_client(self) -> Any:
        """Return a client for one event loop."""
        hooks: dict[str, Any] = {"request": [self._count_retry], "response": [end_on_quota]}
        client = self._openai.DefaultAsyncHttpxClient(event_hooks=hooks)
        return self._openai.AsyncOpenAI(
            **self._options, max_retries=MAX_RETRIES, http_client=client
        )

    def num_tokens(self, prompt: str) -> int | None:
        """Return None: the endpoint's tokenizer is unknown."""
        return None

    def complete(
        self, asks: Sequence[Ask], sampling: Sampling, max_new_tokens: int
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (request, completion) as replies arrive; after an error the rest is cancelled."""
        if not asks:
            return
        replies: Replies = SimpleQueue()
        cancel: Future[Callable[[], object]] = Future()
        everything = self._complete_all(asks, sampling, max_new_tokens, replies, cancel)
        # In a thread of its own: Ctrl-C in the middle of an event loop's code would break it.
        thread = Thread(target=_run, args=(everything,), daemon=True)
        thread.start()
        missing = len(asks)
        try:
            while missing:
                request, task = replies.get()
                missing -= 1
                yield request, task.result()
        finally:
            if missing:
                with suppress(RuntimeError):  # the loop has ended by itself
                    cancel.result()()
            thread.join()

    async def _complete_all(
        self,
        asks: Sequence[Ask],
        sampling: Sampling,
        max_new_tokens: int,
        replies: Replies,
        cancel: "Future[Callable[[], object]]",
    ) -> None:
        """Put each request's finished task into replies; cancel gets what ends this early."""
        client, free = self._new_client(), asyncio.Semaphore(self._concurrency)
        tasks = [
            asyncio.create_task(self._complete(client, free, ask, sampling, max_new_tokens))
            for ask in asks
        ]
        for ask, task in zip(asks, tasks, strict=True):
            task.add_done_callback(partial(_put, replies, ask.request))
        loop, this = asyncio.get_running_loop(), asyncio.current_task()
        assert this is not None, "a coroutine runs in a task"
        cancel.set_result(partial(loop.call_soon_threadsafe, this.cancel))
        with suppress(asyncio.CancelledError):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()

    async def _count_retry(self, request: Any) -> None:
        self.num_retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    async def _find_context(self) -> int | None:
        """Return the context that the endpoint reports for its model; None if it does not."""
        client = self._new_client()
        once = client.with_options(max_retries=0, timeout=CONTEXT_TIMEOUT_S)
        try:
            found = await once.models.retrieve(self.name)
        except self._openai.APITimeoutError:
            return None
        except self._openai.APIConnectionError as error:
            raise EndpointError(
                f"nothing answers at --endpoint {self._url} ({error.__cause__ or error}); start "
                "the server, or correct the address."
            ) from error
        except (self._openai.APIError, ValueError):
            return None  # many servers say nothing of their models
        finally:
            await client.close()
        extra = getattr(found, "model_extra", None) or {}
        lengths = (extra.get(field) for field in CONTEXT_FIELDS)
        return next((length for length in lengths if isinstance(length, int)), None)

    async def _complete(
        self,
        client: Any,
        free: asyncio.Semaphore,
        ask: Ask,
        sampling: Sampling,
        max_new_tokens: int,
    ) -> Completion:
        """Complete one prompt; EndpointError where the endpoint refuses or keeps failing."""
        options: dict[str, Any] = {
            "model": self.name,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": max_new_tokens,
            "seed": ask.seed,
        }
        create, options["prompt"] = client.completions.create, ask.prompt
        if self.kind == "chat":
            create = client.chat.completions.create
            options["messages"] = [{"role": "user", "content": options.pop("prompt")}]
        async with free:
            try:
                reply = await create(**options)
                choice = reply.choices[0]
                text = choice.message.content if self.kind == "chat" else choice.text
                text = text.encode("utf-8", "replace").decode()  # no file takes a lone surrogate
                notices = (reply.model_extra or {}).get("notices")
                counts = (
                    getattr(reply.usage, f"{name}_tokens", 0) for name in ("prompt", "completion")
                )
                counted = [count if isinstance(count, int) else 0 for count in counts]
                completion = Completion(text, choice.finish_reason or "stop", *counted)
            except self._openai.APIStatusError as error:
                remedies = {
                    401: f"check the key in {self._key_name} (--api_key_env)",
                    403: f"check what the key in {self._key_name} (--api_key_env) may use",
                    404: "check --endpoint, --model and --api",
                    429: "once the limit or quota allows, the same command continues",
                }
                default = (
                    "check --endpoint, --model and the lengths; if this prompt alone is refused, "
                    "another --seed with another --out asks others"
                )
                if error.status_code >= 500:
                    default = f"it failed {MAX_RETRIES + 1} times; the same command continues"
                raise self._failure(error, remedies.get(error.status_code, default)) from error
            except self._openai.APIConnectionError as error:  # a time-out is one
                remedy = f"tried {MAX_RETRIES + 1} times; the same command continues"
                if isinstance(error, self._openai.APITimeoutError):
                    remedy += ", with a larger --timeout if answers take longer"
                raise self._failure(error, remedy) from error
            except (ValueError, TypeError, AttributeError, LookupError):
                return Completion(None)  # no JSON, or without the fields of a completion
        if notices:  # of `ptuning serve`: a prefix takes prompts as long as its training's
            raise EndpointError(
                f"the endpoint shortened the prompt ({notices[0]}); use --model base, or a prefix "
                "trained with a larger --max_source_length."
            )
        return completion

    def _failure(self, error: Exception, remedy: str) -> EndpointError:
        said = " ".join(str(error).split()).rstrip(".")[:300]
        return EndpointError(f"--endpoint {self._url}: {said}; {remedy}.")


def _run(everything: Coroutine[Any, Any, None]) -> None:
    with suppress(asyncio.CancelledError):
        asyncio.run(everything)


def _put(replies: Replies, request: int, task: "asyncio.Task[Completion]") -> None:
    replies.put((request, task))


async def end_on_quota(response: Any) -> None:
    """Keep the openai package from retrying where a quota is exhausted, not a rate."""
    if response.status_code == 429 and b"insufficient_quota" in await response.aread():
        response.headers["x-should-retry"] = "false"
