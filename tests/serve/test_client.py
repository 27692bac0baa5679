"""A session in a process of its own answers as one in this process, and neither outlives the other."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from ptuning.engine.request import Request
from ptuning.serve.client import END_S, EndedProcessError, EngineClient
from ptuning.serve.scheduler import (
    EngineError,
    QueueFullError,
    SessionClosedError,
    TokenBuffer,
)
from ptuning.serve.session import Activity, Session, UnknownPrefixError
from ptuning.serve.worker import portable
from ptuning.tunings.artefact import PREFIX_CONFIG_NAME
from ptuning.tunings.loading import NANO_DIR

QUESTION = "类型#裤*版型#宽松"
LONG = {"temperature": 5.0, "seed": 1, "max_new_tokens": 1500}
THREAD_NAME = "engine client"


def load(**options) -> EngineClient:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as in this process, see tests/conftest.py
        return EngineClient.load(str(NANO_DIR), device="cpu", **options)


@pytest.fixture(scope="module")
def apart(prefix_dirs) -> Iterator[EngineClient]:
    """As `session`, but in a process of its own; the last test closes it."""
    with load(max_rows=32) as loaded:
        for name, path in prefix_dirs.items():
            loaded.add_prefix(name, path)
        yield loaded


@pytest.fixture(scope="module")
def tight() -> Iterator[EngineClient]:
    """One row, and one that may wait; the last of its tests kills the process."""
    with load(max_rows=1, max_queue=1) as loaded:
        yield loaded


def wait_until_idle(session):
    deadline = time.monotonic() + 10
    while session.activity != Activity(0, 0, 0):
        assert time.monotonic() < deadline, f"a row is left: {session.activity}"
        time.sleep(0.01)


def model_processes():
    return [child for child in multiprocessing.active_children() if child.name == "model"]


def readers():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def error_of(act):
    with pytest.raises(Exception) as caught:  # noqa: PT011  (compared with another one)
        act()
    return type(caught.value), str(caught.value)


# The same answers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix": "adgen"},
        {"prefix": "chatty", "max_new_tokens": 7},
        {"prefix": "adgen", "strength": 0.5},
        {"prefix": "adgen", "blend": ("other", 0.4)},
        {"prefix": "other", "temperature": 1.5, "top_p": 0.9, "top_k": 40, "seed": 7},
        {"prefix": "short", "repetition_penalty": 1.3, "history": [("你好", "你好！")]},
        {"prefix": "adgen", "clean": False, "max_source_length": 20, "system": "请简短"},
    ],
)
def test_answers_are_those_of_a_session_in_this_process(apart, session, options):
    found, expected = (s.chat(QUESTION, **options) for s in (apart, session))
    pieces = list(found)
    assert "".join(pieces) == found.text == expected.read()
    assert found.finish_reason == expected.finish_reason
    assert found.usage == expected.usage
    assert found.notice == expected.notice
    assert found.logprobs == []


def test_pieces_come_while_the_answer_is_being_written(apart):
    answer = apart.chat("你好", **LONG)
    for _ in range(5):
        assert next(answer)
    assert answer.finish_reason is None
    assert apart.activity.num_rows == 1
    assert apart.activity.slot_bytes > 0
    answer.close()


def test_stop_strings_end_the_answer_and_its_row(apart, session):
    whole = session.chat("你好").read()
    stop = whole[6:8]
    found, expected = (s.chat("你好", stop=[stop, "never"]) for s in (apart, session))
    assert found.read() == expected.read() == whole[: whole.index(stop)]
    assert (found.finish_reason, found.usage) == (expected.finish_reason, expected.usage)
    wait_until_idle(apart)


def test_log_probabilities_arrive_with_their_tokens(apart, session):
    found, expected = (
        s.chat(QUESTION, prefix="adgen", num_logprobs=2, max_new_tokens=8) for s in (apart, session)
    )
    next(found)
    assert len(found.logprobs) == found.usage.completion_tokens
    assert found.read() == expected.read()
    assert len(found.logprobs) == found.usage.completion_tokens
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [one[0] for one in ours.top] == [one[0] for one in theirs.top]


def test_32_threads_get_what_they_get_alone(apart, session):
    names = ["base", "adgen", "other", "short", "chatty"]
    jobs = [(f"{QUESTION}*颜色#{'黑白红蓝'[i % 4]}色{i}", names[i % 5]) for i in range(32)]
    progressed = [threading.Event() for _ in jobs]

    def ask(place):
        question, name = jobs[place]
        tell = progressed[place].set
        answer = apart.chat(
            question, prefix=name, max_new_tokens=15, on_progress=lambda done: done and tell()
        )
        return "".join(answer)

    alone = [session.chat(q, prefix=name, max_new_tokens=15).read() for q, name in jobs]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert together == alone
    assert len(set(together)) > 10
    assert all(event.wait(5) for event in progressed)
    wait_until_idle(apart)


# Stopping


def test_closing_cancelling_and_dropping_an_answer_free_its_row(apart):
    cancel = threading.Event()
    answers = [apart.chat("你好", cancel=cancel, **LONG) for _ in range(3)]
    for answer in answers:
        next(answer)
    closed, cancelled, dropped = answers
    closed.close()
    del answer, dropped, answers[2]
    assert list(closed) == []
    cancel.set()
    list(cancelled)
    assert [closed.finish_reason, cancelled.finish_reason] == ["cancelled"] * 2
    assert cancelled.usage.completion_tokens < 1500
    wait_until_idle(apart)


class CollectedWhenSent(list):
    """A prompt that has the garbage collector run in the middle of being sent."""

    def __reduce__(self):
        gc.collect()
        return list, (list(self),)


def test_an_answer_that_the_garbage_collector_ends_while_another_is_sent_hangs_nobody(apart):
    gc.disable()
    try:
        answer = apart.chat("你好", **LONG)
        next(answer)
        ring: list[object] = [answer]
        ring.append(ring)
        del answer, ring
        assert apart.activity.num_rows == 1, "nobody collected it yet"
        prompt = CollectedWhenSent(apart.tokenizer("你好")["input_ids"])
        sender = threading.Thread(
            target=apart.start,
            args=(Request(prompt, 2), (), TokenBuffer().update),
            daemon=True,
        )
        sender.start()
        sender.join(10)
        assert not sender.is_alive(), "it waits for itself"
    finally:
        gc.enable()
    wait_until_idle(apart)


# Prefixes


def test_what_cannot_be_added_is_refused_in_the_same_words(apart, session, prefix_dirs, tmp_path):
    other_base = tmp_path / "other-base"
    shutil.copytree(prefix_dirs["adgen"], other_base)
    description = other_base / PREFIX_CONFIG_NAME
    said = json.loads(description.read_text(encoding="utf-8")) | {"base_fingerprint": "0" * 64}
    description.write_text(json.dumps(said), encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, path in (
        ("new", tmp_path / "nowhere"),
        ("new", empty),
        ("new", other_base),
        ("a/b", prefix_dirs["adgen"]),
        ("base", prefix_dirs["adgen"]),
        ("adgen", prefix_dirs["adgen"]),
    ):
        found, expected = (error_of(lambda s=s: s.add_prefix(name, path)) for s in (apart, session))  # noqa: B023
        assert found == expected
        assert issubclass(found[0], (ValueError, OSError))
    assert "new" not in apart.prefixes
    with pytest.raises(UnknownPrefixError, match="there is no prefix 'new'; there are: adgen"):
        apart.chat("你好", prefix="new")
    with pytest.raises(UnknownPrefixError, match="there is no prefix 'new'; there are: adgen"):
        apart.remove_prefix("new")
    assert apart.prefixes.keys() == session.prefixes.keys()


def test_prefixes_come_and_go_while_answers_run(apart, prefix_dirs, monkeypatch):
    expected = apart.chat("你好", prefix="adgen").read()
    monkeypatch.chdir(prefix_dirs["adgen"].parent)  # the other process stays where it was
    for _ in range(5):
        info = apart.add_prefix("again", prefix_dirs["adgen"].name)
        assert info == apart.find_prefix("adgen").info
        answer = apart.chat("你好", prefix="again")
        apart.remove_prefix("again")
        with pytest.raises(UnknownPrefixError, match="'again'"):
            apart.chat("你好", prefix="again")
        assert answer.read() == expected
    assert "again" not in apart.prefixes


def test_a_prefix_removed_while_it_is_asked_for_is_unknown(apart, prefix_dirs, monkeypatch):
    look = apart._weighted

    def look_and_lose(*asked):
        found = look(*asked)
        apart.remove_prefix("lost")
        return found

    apart.add_prefix("lost", prefix_dirs["adgen"])
    monkeypatch.setattr(apart, "_weighted", look_and_lose)
    with pytest.raises(UnknownPrefixError, match="there is no prefix 'lost'"):
        apart.chat("你好", prefix="lost").read()


def test_removing_beside_asking_is_an_answer_or_an_unknown_prefix(apart, prefix_dirs):
    expected = apart.chat(QUESTION, prefix="adgen", max_new_tokens=2).read()
    done = threading.Event()

    def ask():
        kinds = set()
        while not done.is_set():
            try:
                kinds.add(apart.chat(QUESTION, prefix="now", max_new_tokens=2).read())
            except UnknownPrefixError:
                kinds.add("unknown")
        return kinds

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask) for _ in range(2)]
        try:
            for _ in range(15):
                apart.add_prefix("now", prefix_dirs["adgen"])
                apart.remove_prefix("now")
        finally:
            done.set()
    assert set.union(*(each.result() for each in asked)) <= {expected, "unknown"}
    wait_until_idle(apart)


# Failures


class TwoWordsError(FileNotFoundError):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def test_errors_that_cannot_be_sent_keep_their_words_and_their_kind():
    whole = ValueError("as it is")
    assert portable(whole) is whole
    sent = portable(TwoWordsError("no", "file"))
    assert (type(sent), str(sent)) == (FileNotFoundError, "no file")
    nested = portable(RuntimeError(threading.Lock()))
    assert type(nested) is RuntimeError
    assert "lock" in str(nested)


def test_a_request_that_fails_there_is_an_engine_error_and_the_next_is_answered(apart, session):
    wrong = Request([10**7], 4)  # no such token: nothing checks ids on their way

    def compute(s):
        tokens = TokenBuffer()
        s.start(wrong, (), tokens.update)
        tokens.wait(0, 30)
        return tokens.read(0)

    found, expected = (error_of(lambda s=s: compute(s)) for s in (apart, session))
    assert found == expected
    assert found[0] is EngineError
    assert "could not be computed: " in found[1]
    assert apart.failure is None
    assert apart.chat("你好").read() == session.chat("你好").read()


def test_a_full_queue_refuses(tight):
    held = [tight.chat("你好", **LONG) for _ in range(2)]
    with pytest.raises(QueueFullError, match="1 requests are being answered and 1 wait"):
        tight.chat("你好")
    next(held[0])
    assert (tight.activity.num_rows, tight.activity.num_waiting) == (1, 1)
    for answer in held:
        answer.close()
    wait_until_idle(tight)
    assert tight.chat("你好", max_new_tokens=2).read()


def test_a_killed_process_is_told_to_everyone(tight, prefix_dirs):
    told = threading.Event()
    tight.when_ended(told.set)
    before = len(readers())
    held = [tight.chat("你好", **LONG) for _ in range(2)]
    next(held[0])
    process = next(p for p in model_processes() if p.pid == tight._process.pid)
    os.kill(process.pid, signal.SIGKILL)
    for answer in held:
        with pytest.raises(
            EngineError, match=r"ended \(signal 9, .*start the server again"
        ) as lost:
            answer.read()
        assert isinstance(lost.value.__cause__, EndedProcessError)
    assert told.wait(5)
    assert "signal 9" in tight.failure
    again = threading.Event()
    tight.when_ended(again.set)
    assert again.is_set(), "whoever asks late is told at once"
    assert tight.activity == Activity(0, 0, 0)
    for act in (
        lambda: tight.chat("你好"),
        lambda: tight.add_prefix("adgen", prefix_dirs["adgen"]),
    ):
        with pytest.raises(SessionClosedError, match="start the server again"):
            act()
    held[0].close()
    started = time.monotonic()
    tight.close()
    tight.close()
    assert time.monotonic() - started < 1
    assert len(readers()) == before - 1
    assert not psutil.pid_exists(process.pid)
    assert "signal 9" in tight.failure


@pytest.mark.slow
def test_a_worker_that_does_not_read_neither_holds_callers_nor_the_close():
    client = load(max_rows=1)
    pid = client._process.pid
    returned = []

    def ask():
        client.chat("你好，请问" * 150, max_source_length=1000)
        returned.append(True)

    os.kill(pid, signal.SIGSTOP)
    threads = [threading.Thread(target=ask, daemon=True) for _ in range(150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(0.2)
    assert len(returned) >= 149, "one thread at most is sending"
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 2 * END_S
    assert not psutil.pid_exists(pid)


def test_a_model_that_is_not_there_is_refused_in_the_same_words_and_leaves_nothing(tmp_path):
    missing = str(tmp_path / "no-model")
    before = (len(model_processes()), len(readers()))
    found = error_of(lambda: EngineClient.load(missing, max_rows=1, device="cpu"))
    assert found == error_of(lambda: Session.load(missing, device="cpu"))
    assert issubclass(found[0], (ValueError, OSError))
    assert (len(model_processes()), len(readers())) == before


def test_closing_ends_what_runs_the_process_and_the_thread(apart):
    told = threading.Event()
    apart.when_ended(told.set)
    pid = apart._process.pid
    before = len(readers())
    held = [apart.chat("你好", **LONG) for _ in range(3)]
    next(held[0])
    apart.close()
    apart.close()
    for answer in held:
        answer.read()
        assert answer.finish_reason == "cancelled"
    assert not psutil.pid_exists(pid)
    assert len(readers()) == before - 1
    assert apart.failure is None
    assert not told.is_set(), "it was closed, so nobody needs to hear"
    with pytest.raises(SessionClosedError, match="the session is closed"):
        apart.chat("你好")
