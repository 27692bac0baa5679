"""Serving speed over HTTP: one request at a time and 32 at once, over four prefixes and the base.

    python -m benchmarks.serve [--json FILE]

A real server in its own process answers sample rows greedily; the client on the same machine is
minimal. Both modes ask the same questions and must get the same answers. OMP_NUM_THREADS sets the
server's threads.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ptuning
from benchmarks.setting import ROOT, json_file, machine, write_json
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.tunings.loading import NANO_DIR
from scripts.local_server import free_port, running

NUM_PREFIXES = 4
PREFIX_LENGTH = 32  # tokens
LOUDNESS = 3.0  # scales a random prefix so that answers differ
LENGTHS = {"max_source_length": 64, "max_target_length": 64}  # tokens, as published
AT_ONCE = 32
REQUESTS = 160  # at once; the first AT_ONCE of them one at a time
ROUNDS = 5


class Reply(NamedTuple):
    """An answer and its number of tokens."""

    text: str
    num_tokens: int


class Measured(NamedTuple):
    """Tokens per second, and the answers."""

    tokens_per_s: float
    replies: list[Reply]


class Client:
    """One keep-alive connection; a request waits for its whole reply."""

    def __init__(self, port: int, *, stream: bool) -> None:
        self.port = port
        self.stream = stream

    async def open(self) -> None:
        """Connect."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, model: str, question: str) -> Reply:
        """Send one prompt and read the answer."""
        body: dict[str, Any] = {"model": model, "prompt": question}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        kind = "Content-Type: application/json\r\n\r\n"
        self.writer.write((head + kind).encode() + data)
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        if " 200 " not in lines[0]:
            raise RuntimeError(f"the server answered {lines[0]}")
        if not self.stream:
            length = next(line for line in lines if line.startswith("content-length:"))
            reply = json.loads(await self.reader.readexactly(int(length.partition(":")[2])))
            return Reply(reply["choices"][0]["text"], reply["usage"]["completion_tokens"])
        events = (await self._read_chunks()).decode().split("\n\n")
        chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        return Reply(text, chunks[-1]["usage"]["completion_tokens"])

    async def _read_chunks(self) -> bytes:
        """Return a body in chunked transfer encoding."""
        pieces = []
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            pieces.append((await self.reader.readexactly(size + 2))[:-2])
        await self.reader.readexactly(2)
        return b"".join(pieces)


async def measure(
    port: int, jobs: Sequence[tuple[str, str]], *, at_once: int, stream: bool
) -> Measured:
    """Ask all jobs (model, question) over at_once connections."""
    clients = [Client(port, stream=stream) for _ in range(at_once)]
    for client in clients:
        await client.open()
    replies: dict[int, Reply] = {}
    waiting = iter(enumerate(jobs))

    async def work(client: Client) -> None:
        for index, (model, question) in waiting:
            replies[index] = await client.ask(model, question)

    started_s = time.perf_counter()
    await asyncio.gather(*map(work, clients))
    took_s = time.perf_counter() - started_s
    for client in clients:
        client.writer.close()
    ordered = [replies[index] for index in range(len(jobs))]
    return Measured(sum(reply.num_tokens for reply in ordered) / took_s, ordered)


def make_prefixes(folder: Path) -> list[str]:
    """Save random prefixes of the nano model; return them as NAME=DIRECTORY."""
    model = ChatGLMForConditionalGeneration.from_pretrained(NANO_DIR)
    made = []
    for seed in range(NUM_PREFIXES):
        torch.manual_seed(seed)
        encoder = model.add_prefix(PREFIX_LENGTH)
        with torch.no_grad():
            encoder.embedding.weight.mul_(LOUDNESS)
        ptuning.save_prefix(model, folder / f"p{seed}", settings=LENGTHS)
        model.remove_prefix()
        made.append(f"p{seed}={folder / f'p{seed}'}")
    return made


def read_jobs(names: Sequence[str], rows_file: Path) -> list[tuple[str, str]]:
    """Return a model and a question for each request."""
    rows = rows_file.read_text(encoding="utf-8").splitlines()
    questions = [str(json.loads(row)["content"]) for row in rows[:REQUESTS]]
    return [(names[i % len(names)], questions[i % len(questions)]) for i in range(REQUESTS)]


def main(argv: list[str]) -> int:
    """Print the table: medians of the rounds; the ratio is the median over adjacent rounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--prefix", metavar="DIRECTORY", help="take this trained prefix 4 times")
    parser.add_argument("--rows_file", type=Path, default=ROOT / "AdvertiseGen/sample/dev.json")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the median counts")
    parser.add_argument("--json", type=json_file, help="write the figures here too")
    flags = parser.parse_args(argv)
    names = [f"p{index}" for index in range(NUM_PREFIXES)]
    jobs = read_jobs([*names, "base"], flags.rows_file)
    figures: dict[str, object] = {"machine": machine()}
    sys.stdout.write(f"{machine()}\n{'':<12}{'one at a time':>16}{AT_ONCE:>10} at once\n")
    with tempfile.TemporaryDirectory() as folder:
        given = [f"{name}={flags.prefix}" for name in names] if flags.prefix else None
        prefixes = given or make_prefixes(Path(folder))
        words = [word for prefix in prefixes for word in ("--prefix", prefix)]
        port = free_port()
        with running(["serve", *words], port=port, page="/health"):
            for kind in ("whole", "streamed"):
                figures |= _compare(port, jobs, kind, flags.rounds)
    write_json(flags, figures)
    return 0


def _compare(
    port: int, jobs: Sequence[tuple[str, str]], kind: str, rounds: int
) -> dict[str, float]:
    """Measure both modes alternately, print a line, and return the figures."""
    stream = kind == "streamed"
    found: dict[int, list[Measured]] = {1: [], AT_ONCE: []}
    for _ in range(rounds):
        for at_once, some in ((1, jobs[:AT_ONCE]), (AT_ONCE, jobs)):
            one = asyncio.run(measure(port, some, at_once=at_once, stream=stream))
            found[at_once].append(one)
    replies = {at_once: some[0].replies for at_once, some in found.items()}
    if replies[1] != replies[AT_ONCE][: len(replies[1])]:
        raise RuntimeError("an answer given among others is not the one given alone")
    speeds = {at_once: [one.tokens_per_s for one in some] for at_once, some in found.items()}
    ratios = [many / one for one, many in zip(speeds[1], speeds[AT_ONCE], strict=True)]
    alone, together, ratio = map(statistics.median, (speeds[1], speeds[AT_ONCE], ratios))
    sys.stdout.write(
        f"{kind:<12}{alone:>16.0f}{together:>10.0f} tokens/s{ratio:>8.2f} times "
        f"({min(ratios):.2f} to {max(ratios):.2f})\n"
    )
    sys.stdout.flush()
    head = "" if kind == "whole" else "streamed_"
    return {
        f"{head}one_tokens_per_s": alone,
        f"{head}tokens_per_s": together,
        f"{head}ratio": ratio,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
