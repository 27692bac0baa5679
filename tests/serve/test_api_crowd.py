"""Many clients at once, bad ones among them: everyone gets their own answer, and no row is left."""

import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest

from ptuning.serve.session import Session
from tests.serve.live_server import (
    KEY,
    client,
    command,
    health,
    running,
    wait_for,
    wait_until_gone,
    wait_until_idle,
)

NAMES = ["base", "adgen", "other", "short", "chatty"]
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def address(session) -> Iterator[str]:
    with running(session) as found:
        yield found


def test_32_requests_over_4_prefixes_and_base_answer_as_alone(address):
    jobs = [
        (NAMES[i % 5], f"类型#{'裤裙'[i % 2]}*版型#宽松*颜色#{'黑白红蓝'[i % 4]}色{i}")
        for i in range(32)
    ]

    def ask(job):
        with client(address) as api:
            model, question = job
            message = {"role": "user", "content": question}
            if len(question) % 2:
                reply = api.chat.completions.create(model=model, messages=[message])
                return reply.choices[0].message.content
            chunks = api.chat.completions.create(model=model, messages=[message], stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, jobs))
    assert together == alone
    assert len(set(together)) > 10


def test_a_full_queue_is_429(nano, session):
    small = Session(nano, session.tokenizer, max_rows=1, max_queue=1)
    held = [small.chat("你好", temperature=5.0, max_new_tokens=1900, seed=s) for s in (1, 2)]
    with running(small) as address, client(address) as api:
        with pytest.raises(openai.RateLimitError) as refused:
            api.completions.create(model="base", prompt="你好")
        assert refused.value.response.headers["retry-after"] == "1"
        for answer in held:
            answer.close()
        wait_until_idle(small)
        assert api.completions.create(model="base", prompt="你好", max_tokens=2).choices
    small.close()


BODY = {"model": "base", "temperature": 2, "max_tokens": 1900, "seed": 1}


def leave_early(address, rng):
    """Connect, ask, and go at some moment: while sending, waiting, or reading."""
    port = int(address.rpartition(":")[2])
    body = BODY | {"prompt": "你好" * rng.randrange(1, 9), "stream": rng.random() < 0.6}
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        if rng.random() < 0.2:
            connection.sendall((head + data)[: rng.randrange(len(head + data))])
            return
        connection.sendall(head + data)
        time.sleep(rng.random() * 0.1)
        if rng.random() < 0.5:
            connection.settimeout(0.2)
            try:
                connection.recv(200)
            except TimeoutError:
                return


def test_clients_that_leave_at_any_moment_leave_no_row(address, session):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: leave_early(address, random.Random(seed)), range(60)))
    wait_until_idle(session)
    with client(address) as api:
        text = api.completions.create(model="base", prompt="你好").choices[0].text
    assert text == session.chat("你好", clean=False).read()


BAD_VALUES = [
    None, True, -1, 0, 3.5, 10**30, -(10**400), "", "x", "\ud800", [], {}, [[]], [1], ["a", 1],
    {"role": "user"}, [{"role": "user", "content": None}], [{"role": "cook", "content": "x"}],
    [{"role": "assistant", "content": "x"}], float("nan"), float("inf"), "[gMASK]" * 3,
]  # fmt: skip
FIELDS = [
    "model", "messages", "prompt", "temperature", "top_p", "n", "stop", "seed", "max_tokens", "logprobs",
    "top_logprobs", "stream", "stream_options", "blend", "prefix_strength", "tools", "unknown", "top_k",
    "max_source_length", "logit_bias", "response_format", "max_completion_tokens", "clean",
]  # fmt: skip


def malformed(rng):
    """Return one path and body; most are wrong in some way, none may be the server's fault."""
    path = rng.choice(["/v1/chat/completions", "/v1/completions", "/v1/prefixes"])
    body = {"model": "base", "max_tokens": 1}
    body |= (
        {"messages": [{"role": "user", "content": "你好"}]}
        if "chat" in path
        else {"prompt": "你好"}
    )
    kind = rng.random()
    if kind < 0.1:
        return path, rng.choice(
            [b"", b"{", b"[]", b"nul", b"\xff\xfe", b"[" * 5000, b'{"a":' * 5000]
        )
    if kind < 0.13:
        return path, b'{"model":"' + b"x" * rng.randrange(262_144, 400_000) + b'"}'
    for field in rng.sample(FIELDS, rng.randrange(1, 4)):
        body[field] = rng.choice(BAD_VALUES)
    if rng.random() < 0.1:
        del body["model"]
    return path, json.dumps(body).encode()


def send_malformed(address, count, seed):
    rng = random.Random(seed)
    statuses = []
    with httpx2.Client(base_url=address, headers=HEADERS, timeout=60) as connection:
        for _ in range(count):
            path, data = malformed(rng)
            headers = {"Content-Type": "application/json"}
            reply = connection.post(path, content=data, headers=headers)
            assert reply.status_code < 500, (path, data[:300], reply.text)
            if reply.status_code != 200:
                assert reply.json()["error"]["message"], (path, data[:300])
            statuses.append(reply.status_code)
    return statuses


def test_malformed_requests_are_the_client_s_fault(address, session):
    statuses = send_malformed(address, 300, seed=0)
    assert {400, 413} <= set(statuses)
    assert sum(status == 200 for status in statuses) < 60  # some values are right by chance
    wait_until_idle(session)


@pytest.mark.slow
def test_memory_stays_flat_over_2000_malformed_requests(address, session):
    def memory_mib():
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    send_malformed(address, 500, seed=1)
    before = memory_mib()
    send_malformed(address, 2000, seed=2)
    wait_until_idle(session)
    assert memory_mib() - before < 15  # the oversized bodies alone, if kept, would be 18 MiB


@pytest.mark.slow
def test_a_crowd_leaves_no_row_of_the_real_command(served):
    """Its model is in another process, so what a client leaves has two places to stay in."""
    with ThreadPoolExecutor(8) as pool:
        leaving = [
            pool.submit(leave_early, served.address, random.Random(seed)) for seed in range(20)
        ]
        statuses = send_malformed(served.address, 200, seed=3)
        for each in leaving:
            each.result()
    assert {400, 413} <= set(statuses)
    idle = {"status": "ok", "rows": 0, "waiting": 0}
    wait_for(lambda: health(served.address) == idle, served)
    assert "Traceback" not in served.text()


@pytest.mark.slow
def test_ctrl_c_ends_the_command_in_the_middle_of_a_stream(tmp_path):
    with command(tmp_path) as server:
        server.wait_until_ready()
        model = server.wait_for_model()
        body = BODY | {"prompt": "你好", "stream": True}

        def read_on():
            try:
                with httpx2.stream("POST", f"{server.address}/v1/completions", json=body) as reply:
                    for _ in reply.iter_bytes():
                        continue
            except httpx2.HTTPError:
                return  # the server went away, as it was told to

        reader = threading.Thread(target=read_on)
        reader.start()
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=20) == 0
        reader.join(timeout=10)
        assert wait_until_gone(model) < 1
        assert "Traceback" not in server.text()
