"""Whole runs of `python -m ptuning generate --endpoint`: complete, refused, killed and continued."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ptuning import __main__ as program
from ptuning.completions import endpoint
from tests.completions.scripted import HANG, QUOTA, Reply, ScriptedServer, answer, as_completion

ROOT = Path(__file__).resolve().parents[2]
NUM = 60  # rows
TASKS = ("--template", "en", "--tasks_per_request", "4")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 2)


def arguments(server, out, *more, num=NUM):
    where = ("--endpoint", server.address, "--model", "scripted")
    return ["generate", "--out", str(out), "--num", str(num), *TASKS, *where, *more]


def run(server, out, *more, num=NUM):
    return program.main(arguments(server, out, *more, num=num))


def report_of(out):
    return json.loads(out.with_suffix(".report.json").read_text(encoding="utf-8"))


def rows_of(out):
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The rows of a run that nothing interrupted, and the number of its requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        server, out = ScriptedServer(), tmp_path_factory.mktemp("wanted") / "new.jsonl"
        assert run(server, out) == 0
        server.close()
    return out.read_bytes(), len(server.asked)


def test_a_run_says_what_became_of_its_requests(server, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ptuning")
    out, classic = tmp_path / "new.jsonl", tmp_path / "alpaca" / "new.json"
    server.script += [Reply(500, {}), Reply(200, "<html>")]
    assert run(server, out, "--alpaca_json", str(classic)) == 0
    report = report_of(out)
    assert len(rows_of(out)) == NUM == report["kept"]
    assert report["retries"] == 1
    assert report["requests"] == len(server.asked) - 1
    assert report["dropped"]["malformed_reply"] == 1
    assert report["prompt_tokens"] == 100 * (report["requests"] - 1)
    assert report["completion_tokens"] == 40 * (report["requests"] - 1)
    assert report["made"] == NUM + sum(report["dropped"].values())
    said = caplog.text
    assert f"{report['requests']} requests (1 retried in this run), " in said
    assert f"{report['made']} tasks made, {NUM} kept, dropped: " in said
    assert "1 malformed_reply" in said
    assert f"--mix {out}:0.3" in said
    tasks = json.loads(classic.read_text(encoding="utf-8"))
    names = ["instruction", "input", "output"]
    assert tasks == [{name: row["meta"][name] for name in names} for row in rows_of(out)]
    assert list(tasks[0]) == names


def test_rows_do_not_depend_on_the_order_of_replies(server, tmp_path, wanted):
    late = threading.Event()

    def reply(asked):
        late.wait(0.02 * (asked.body["seed"] % 3))
        return answer(asked)

    server.answer = reply
    out = tmp_path / "new.jsonl"
    assert run(server, out) == 0
    assert out.read_bytes() == wanted[0]


def test_base_models_are_asked_by_completions(server, tmp_path, wanted):
    out = tmp_path / "new.jsonl"
    assert run(server, out, "--api", "completions") == 0
    assert {asked.path for asked in server.asked} == {"/v1/completions"}
    assert out.read_bytes() == wanted[0]


def test_the_key_is_that_of_the_variable(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "one")
    monkeypatch.setenv("OTHER_KEY", "two")
    assert run(server, tmp_path / "a.jsonl", num=1) == 0
    assert run(server, tmp_path / "b.jsonl", "--api_key_env", "OTHER_KEY", num=1) == 0
    assert [asked.key for asked in server.asked] == ["Bearer one", "Bearer two"]


def test_concurrency_is_the_number_of_requests_in_flight(server, tmp_path):
    server.pause_s = 0.02
    assert run(server, tmp_path / "new.jsonl", "--concurrency", "2") == 0
    assert server.most_at_once == 2


def test_a_context_that_the_endpoint_names_bounds_the_completion(server, tmp_path):
    server.model = Reply(200, {"id": "scripted", "object": "model", "max_model_len": 2048})
    assert run(server, tmp_path / "new.jsonl", num=1) == 0
    assert server.asked[0].body["max_tokens"] == 1024


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(401, {}), "check the key in OPENAI_API_KEY (--api_key_env)."),
        (Reply(403, {}), "check what the key in OPENAI_API_KEY (--api_key_env) may use."),
        (Reply(404, {}), "check --endpoint, --model and --api."),
        (Reply(429, QUOTA), "once the limit or quota allows, the same command continues."),
        (Reply(500, {}), "it failed 3 times; the same command continues."),
        (HANG, "with a larger --timeout if answers take longer."),
        (Reply(200, as_completion("", notices=["kept 9 tokens"])), "larger --max_source_length."),
    ],
)
def test_what_cannot_work_ends_in_one_line_and_the_same_command_continues(
    server, tmp_path, wanted, capsys, reply, said
):
    out = tmp_path / "new.jsonl"
    served = iter(range(5))
    server.answer = lambda asked: reply if next(served, None) is None else answer(asked)
    started = time.monotonic()
    assert run(server, out, "--timeout", "0.2" if reply == HANG else "9") == 2
    assert reply == HANG or time.monotonic() - started < 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ptuning generate: ")
    assert line.endswith(said)
    server.answer = answer
    before = len(server.asked)
    assert run(server, out) == 0
    assert out.read_bytes() == wanted[0]
    assert wanted[1] - 5 <= len(server.asked) - before < wanted[1]


def test_an_endpoint_that_is_not_there_is_one_line_at_once(server, tmp_path, capsys):
    server.close()
    started = time.monotonic()
    assert run(server, tmp_path / "new.jsonl") == 2
    assert time.monotonic() - started < 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ptuning generate: nothing answers at --endpoint {server.address} (")
    assert list(tmp_path.iterdir()) == []


def test_too_few_rows_are_status_1(server, tmp_path, caplog):
    assert run(server, tmp_path / "new.jsonl", "--max_requests", "1") == 1
    assert f"of --num {NUM} rows: --max_requests 1 is used up." in caplog.text


class Forker:
    """Runs of the command in processes of their own."""

    def __init__(self, folder):
        self.log = folder / "log"
        environment = {**os.environ, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.instruct.forking"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, server, out, *, number=None, at=None):
        """Return the exit status; the signal `number` is sent as request `at` arrives."""
        started, seen = threading.Event(), iter(range(1, 10**6))

        def reply(asked):
            if next(seen) == at:
                started.wait(10)
                os.kill(self.pid, number)
                return HANG
            return answer(asked)

        server.answer = reply
        self.process.stdin.write(json.dumps([arguments(server, out), str(self.log)]) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        started.set()
        return int(self.process.stdout.readline())

    def said(self):
        return self.log.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module", autouse=True)
def forker(tmp_path_factory):
    """Start the process at once: it imports while other tests run."""
    made = Forker(tmp_path_factory.mktemp("forker"))
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(forker, server, tmp_path, wanted):
    out = tmp_path / "new.jsonl"
    for at in (1, 10, 4, 2, 5):  # the tenth request comes after a whole wave
        assert forker.run(server, out, number=signal.SIGKILL, at=at) == -signal.SIGKILL
        whole = wanted[0].splitlines(keepends=True)
        if out.exists():  # what is there is whole rows of the final file
            assert out.read_bytes().splitlines(keepends=True) == whole[: len(rows_of(out))]
    asked = len(server.asked)
    assert forker.run(server, out) == 0
    assert out.read_bytes() == wanted[0]
    assert report_of(out)["requests"] == wanted[1]
    assert 0 < len(server.asked) - asked < wanted[1]  # what was answered is not paid for twice


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ctrl_c_is_status_130_and_says_how_to_continue(forker, server, tmp_path, wanted):
    out = tmp_path / "new.jsonl"
    assert forker.run(server, out, number=signal.SIGINT, at=11) == 130
    assert not any(line.startswith("Traceback") for line in forker.said())
    first, last = forker.said()[-2:]
    assert first.startswith("Type the same command again to continue; what ")
    assert last == "ptuning generate: interrupted."
    asked = len(server.asked)
    assert forker.run(server, out) == 0
    assert out.read_bytes() == wanted[0]
    assert len(server.asked) - asked < wanted[1]
