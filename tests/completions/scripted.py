"""A model that answers by a script: behind a loopback HTTP server, or as a source in the process.

Its answers are a function of prompt and seed, so that a run can be interrupted and compared. They
are tasks in English, of invented words so that no two are similar; every ninth breaks a rule.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any, NamedTuple

from ptuning.completions.source import Ask, Completion
from ptuning.engine.request import Sampling

SYLLABLES = "ba ce di fo gu ka le mi no pu ra se ti vo wu".split()
HANG = "hang"  # no reply until the server closes
DROP = "drop"  # close the connection instead of a reply
QUOTA = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}


class QuietServer(ThreadingHTTPServer):
    """A server that says nothing of clients that have gone."""

    daemon_threads, block_on_close = True, False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


class Asked(NamedTuple):
    """A POST request as it arrived: time in s, body, and the value of its Authorization header."""

    at: float
    path: str
    body: dict[str, Any]
    key: str | None

    @property
    def prompt(self) -> str:
        """The text of a prompt or of the only message."""
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][0]["content"]


class Reply(NamedTuple):
    """A reply; content is JSON unless it is text."""

    status: int
    content: Any
    headers: dict[str, str] = {}  # noqa: RUF012  # never changed


def sentence(words: Random, count: int) -> str:
    """Return invented words."""
    return " ".join("".join(words.choices(SYLLABLES, k=3)) for _ in range(count))


def tasks_for(prompt: str, seed: int, count: int = 4) -> str:
    """Return the tasks that continue a prompt of the template `en`."""
    words = Random(f"{prompt}\n{seed}")
    blocks = []
    for number in range(7, 7 + count):
        verb = "Draw" if words.random() < 1 / 9 else words.choice(["Explain", "Compare", "Name"])
        task_input = words.choice(["<noinput>", sentence(words, 5)])
        blocks.append(
            f" {verb} {sentence(words, 7)}.\n{number}. Input:\n{task_input}\n"
            f"{number}. Output:\n{sentence(words, 9)}\n"
        )
    return "".join(
        text if n == 0 else f"###\n{7 + n}. Instruction:{text}" for n, text in enumerate(blocks)
    )


def as_completion(text: Any, logprobs: Any = None, **changes: Any) -> dict[str, Any]:
    """Return the body of a reply to either API."""
    choice = {"index": 0, "finish_reason": "stop", "text": text, "logprobs": logprobs}
    choice["message"] = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 100, "completion_tokens": 40, "total_tokens": 140}
    return {"id": "x", "object": "any", "choices": [choice], "usage": usage, **changes}


def answer(asked: Asked) -> Reply:
    """Reply with tasks."""
    return Reply(200, as_completion(tasks_for(asked.prompt, asked.body["seed"])))


class ScriptedServer:
    """An endpoint on a port of its own. The replies in `script` come first, then `answer`'s.

    model is the reply to GET /v1/models/NAME. Every reply takes pause_s.
    """

    def __init__(self, answer: Callable[[Asked], Reply | str] = answer) -> None:
        self.answer, self.pause_s = answer, 0.0
        self.script: deque[Reply | str] = deque()
        self.model = Reply(200, {"id": "scripted", "object": "model"})
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._http = QuietServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Free the port, and end what hangs."""
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def _reply_to(self, asked: Asked) -> Reply | str:
        with self._lock:
            self.asked.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            scripted = self.script.popleft() if self.script else None
        self._closing.wait(self.pause_s)
        try:
            return self.answer(asked) if scripted is None else scripted
        finally:
            with self._lock:
                self._at_once -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._send(server.model)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = self.headers["Authorization"]
                self._send(server._reply_to(Asked(time.monotonic(), self.path, body, key)))

            def _send(self, reply: Reply | str) -> None:
                if isinstance(reply, str):
                    if reply == HANG:
                        server._closing.wait(30)
                    self.close_connection = True
                    return
                is_text = isinstance(reply.content, str)
                content = (reply.content if is_text else json.dumps(reply.content)).encode()
                headers = {"Content-Type": "application/json", **reply.headers}
                with suppress(OSError):  # the client has gone
                    self.send_response(reply.status)
                    for name, value in {**headers, "Content-Length": len(content)}.items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class ScriptedSource:
    """A source in the process: `answer` makes a completion, replies arrive last first."""

    num_retries = 0
    kind = "scripted"

    def __init__(
        self,
        answer: Callable[[Ask], Completion] | None = None,
        *,
        context_length: int | None = None,
        repeats: bool = False,
    ) -> None:
        self.name, self.context_length, self.repeats = "scripted", context_length, repeats
        self.answer = answer or (lambda ask: completed(tasks_for(ask.prompt, ask.seed)))
        self.waves: list[list[Ask]] = []
        self.samplings: list[tuple[Sampling, int]] = []

    @property
    def asks(self) -> list[Ask]:
        """Every prompt asked, in order."""
        return [ask for wave in self.waves for ask in wave]

    def num_tokens(self, prompt: str) -> int | None:
        """Count words, unless the context is unknown."""
        return None if self.context_length is None else len(prompt.split())

    def complete(
        self, asks: Sequence[Ask], sampling: Sampling, max_new_tokens: int
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the answers."""
        if asks:
            self.waves.append(list(asks))
            self.samplings.append((sampling, max_new_tokens))
        for ask in reversed(asks):
            yield ask.request, self.answer(ask)


def completed(text: str | None, finish_reason: str = "stop") -> Completion:
    """Return a completion of 100 and 40 tokens."""
    return Completion(text, finish_reason, 100, 40)
