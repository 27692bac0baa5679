"""Completions from an endpoint: what is sent, retried, counted, and what ends a run."""

import os
import signal
import threading
import time

import pytest

from ptuning.completions import endpoint
from ptuning.completions.endpoint import EndpointError, EndpointSource
from ptuning.completions.source import Ask, Completion
from ptuning.engine.request import Sampling
from tests.completions.scripted import DROP, HANG, QUOTA, Reply, as_completion

QUICK_S = 2.0  # what cannot work is said within


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 2)


def open_source(server, **changes):
    options = {"api": "chat", "concurrency": 5, "timeout_s": 5.0, "key": None, "key_name": "MY_KEY"}
    return EndpointSource(server.address, "scripted", **options | changes)


def asks(count):
    return [Ask(number, f"prompt {number}", 40 + number) for number in range(count)]


def complete(source, count=1, *, top_logprobs=0):
    given = source.complete(asks(count), Sampling(0.9, 0.8), 64, top_logprobs=top_logprobs)
    return dict(given)


def refused(source, count=1, *, logprobs=0, within_s=QUICK_S):
    """Return the one line of the error that ends a run, which comes at once."""
    started = time.monotonic()
    with pytest.raises(EndpointError) as caught:
        complete(source, count, top_logprobs=logprobs)
    assert time.monotonic() - started < within_s
    assert "\n" not in str(caught.value)
    return str(caught.value)


OK = Reply(200, as_completion("fine"))
FINE = Completion("fine", "stop", 100, 40)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_request_carries_prompt_sampling_and_seed(server, api):
    server.script.append(OK)
    assert complete(open_source(server, api=api)) == {0: FINE}
    (asked,) = server.asked
    prompt = {"prompt": "prompt 0"}
    if api == "chat":
        prompt = {"messages": [{"role": "user", "content": "prompt 0"}]}
    assert asked.path == ("/v1/chat/completions" if api == "chat" else "/v1/completions")
    sampling = {"temperature": 0.9, "top_p": 0.8, "max_tokens": 64, "seed": 40}
    assert asked.body == {"model": "scripted", **sampling, **prompt}


IN_CHAT = {
    "content": [
        {"token": "5", "top_logprobs": [{"token": "5", "logprob": -0.5}, {"token": "6", "logprob": -1}]},
        {"token": "!", "top_logprobs": [{"token": "!", "logprob": -0.1}]},
    ]
}  # fmt: skip
IN_COMPLETIONS = {"tokens": [" ", "5"], "top_logprobs": [{" ": -0.1}, {"5": -0.5, "6": -1}]}


@pytest.mark.parametrize(
    ("api", "given", "flags"),
    [
        ("chat", IN_CHAT, {"logprobs": True, "top_logprobs": 2}),
        ("completions", IN_COMPLETIONS, {"logprobs": 2}),
    ],
)
def test_the_most_probable_first_tokens_are_named_where_asked_for(server, api, given, flags):
    server.script += [OK, Reply(200, as_completion("fine", given))]
    source = open_source(server, api=api)
    complete(source)
    (found,) = complete(source, top_logprobs=2).values()
    assert found == FINE._replace(logprobs={"5": -0.5, "6": -1.0})
    plain, asked = (asked.body for asked in server.asked)
    assert asked == plain | flags


@pytest.mark.parametrize(
    "given",
    [
        *(None, {}, [], "a", 3, {"content": None}, {"content": []}, {"content": [{}]}),
        {"content": [{"top_logprobs": []}]},
        {"content": [{"top_logprobs": [{"token": "5", "logprob": None}]}]},
        *({"top_logprobs": None}, {"top_logprobs": []}, {"top_logprobs": [None]}),
        *({"tokens": ["5"], "top_logprobs": tops} for tops in (None, [], [None], [{"5": None}])),
    ],
)
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_reply_without_log_probabilities_has_none(server, api, given):
    server.script.append(Reply(200, as_completion("fine", given)))
    assert complete(open_source(server, api=api), top_logprobs=5) == {0: FINE}


@pytest.mark.parametrize("status", [400, 422])
def test_an_endpoint_that_refuses_log_probabilities_is_asked_without_and_named_once(
    server, caplog, status
):
    server.answer = lambda asked: (
        Reply(status, {"error": {"message": "no logprobs"}}) if "logprobs" in asked.body else OK
    )
    source = open_source(server, concurrency=3)
    assert complete(source, 3, top_logprobs=5) == dict.fromkeys(range(3), FINE)
    before = len(server.asked)
    assert complete(source, 3, top_logprobs=5) == dict.fromkeys(range(3), FINE)
    assert not any("logprobs" in asked.body for asked in server.asked[before:])
    (said,) = caplog.messages
    assert said.startswith(f"--endpoint {server.address} gives no log-probabilities: Error code: ")


def test_what_is_refused_without_log_probabilities_too_is_another_fault(server, caplog):
    server.answer = lambda asked: Reply(400, {"error": {"message": "too long"}})
    assert "check --endpoint, --model and the lengths" in refused(open_source(server), logprobs=5)
    assert len(server.asked) == 2
    assert caplog.messages == []


def test_a_path_in_the_address_is_kept(server):
    server.script.append(OK)
    server.address += "/api/paas/v4"
    complete(open_source(server))
    assert server.asked[0].path == "/api/paas/v4/chat/completions"


@pytest.mark.parametrize(("key", "sent"), [("sk-1", "Bearer sk-1"), (None, "Bearer none")])
def test_the_key_is_sent(server, key, sent):
    server.script.append(OK)
    complete(open_source(server, key=key))
    assert server.asked[0].key == sent


@pytest.mark.parametrize(
    ("extra", "context"),
    [
        ({"max_model_len": 2048}, 2048),
        ({"context_length": 8192}, 8192),
        ({}, None),
        ({"max_model_len": "2048"}, None),
        ({"max_model_len": None, "context_length": 4096}, 4096),
    ],
)
def test_the_context_is_what_the_endpoint_says_of_its_model(server, extra, context):
    server.model = Reply(200, {"id": "scripted", "object": "model", **extra})
    assert open_source(server).context_length == context


@pytest.mark.parametrize(
    "reply",
    [Reply(404, {"error": {"message": "no such route"}}), Reply(200, "<html>"), Reply(200, "[]")],
)
def test_an_endpoint_may_say_nothing_of_its_models(server, reply):
    server.model = reply
    server.script.append(OK)
    source = open_source(server)
    assert source.context_length is None
    assert complete(source) == {0: FINE}


def test_429_is_asked_again_after_the_time_that_it_names(server):
    server.script += [Reply(429, {}, {"Retry-After": "0.25"}), OK]
    source = open_source(server)
    assert complete(source) == {0: FINE}
    first, second = server.asked
    assert second.at - first.at >= 0.25
    assert first.body == second.body
    assert source.num_retries == 1


@pytest.mark.parametrize("header", ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-3", "nan"])
def test_a_time_to_wait_that_is_none_is_ignored(server, header):
    server.script += [Reply(429, {}, {"Retry-After": header}), OK]
    started = time.monotonic()
    assert complete(open_source(server)) == {0: FINE}
    assert time.monotonic() - started < QUICK_S


def test_a_time_to_wait_that_is_too_long_ends_the_run(server):
    server.script.append(Reply(429, {}, {"Retry-After": "3600"}))
    assert "once the limit or quota allows, the same command continues" in refused(
        open_source(server)
    )


@pytest.mark.parametrize("failure", [Reply(500, {}), Reply(503, "<html>"), Reply(408, {}), DROP])
def test_two_transient_failures_are_retried(server, failure):
    server.script += [failure, failure, OK]
    source = open_source(server)
    assert complete(source) == {0: FINE}
    assert len(server.asked) == 3
    assert source.num_retries == 2


def test_waits_grow(server, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.1)
    server.script += [Reply(500, {}), Reply(500, {}), OK]
    complete(open_source(server))
    first, second, third = (asked.at for asked in server.asked)
    assert second - first >= 0.075  # less up to a quarter by chance
    assert third - second >= 0.15


@pytest.mark.parametrize(
    "error",
    [
        {"code": "content_filter", "message": "The response was filtered"},
        {"code": "content_policy_violation", "message": "Your request was rejected"},
        {"code": "data_inspection_failed", "message": "输入可能包含不当内容"},
        {"code": "context_length_exceeded", "message": "the context has 2048 tokens"},
    ],
)
def test_a_prompt_that_is_refused_by_itself_has_no_reply_and_the_others_have(server, error):
    server.script += [OK, Reply(400, {"error": error}), OK]
    found = complete(open_source(server, concurrency=1), 3)
    assert found == {0: FINE, 1: Completion(None, error["code"]), 2: FINE}


def test_an_endpoint_that_keeps_failing_ends_the_run(server):
    server.answer = lambda asked: Reply(502, {"error": {"message": "bad gateway"}})
    said = refused(open_source(server))
    assert len(server.asked) == 3
    assert said.startswith(f"--endpoint {server.address}: Error code: 502")
    assert "bad gateway" in said
    assert said.endswith("; it failed 3 times; the same command continues.")


@pytest.mark.parametrize(
    ("status", "body", "remedy"),
    [
        (401, {"error": {"message": "wrong key"}}, "check the key in MY_KEY (--api_key_env)."),
        (403, {"error": {"message": "not yours"}}, "what the key in MY_KEY (--api_key_env) may"),
        (404, {"error": {"message": "no model"}}, "check --endpoint, --model and --api."),
        (429, QUOTA, "once the limit or quota allows, the same command continues."),
        (429, {"error": {"type": "insufficient_quota"}}, "once the limit or quota allows"),
        (
            400,
            {"error": {"message": "too long"}},
            "check --endpoint, --model and the lengths; if this prompt alone",
        ),
        (401, "<html>\n<h1>Wrong\nkey</h1>", "check the key in MY_KEY (--api_key_env)."),
    ],
)
def test_a_refusal_stops_at_once_and_says_what_to_check(server, status, body, remedy):
    server.answer = lambda asked: Reply(status, body)
    source = open_source(server, concurrency=1)
    said = refused(source, count=8)
    assert f"--endpoint {server.address}" in said
    assert str(status) in said
    assert remedy in said
    assert source.num_retries == 0
    assert len(server.asked) <= 2  # the next one may start before it is cancelled


def test_a_refusal_cancels_what_is_in_flight_and_what_waits(server):
    server.script += [HANG, HANG, Reply(401, {})]
    refused(open_source(server, concurrency=3), count=9)
    assert len(server.asked) in (3, 4)


def test_what_arrived_before_a_refusal_is_handed_over(server):
    server.script += [OK, OK, Reply(401, {})]
    found = []
    with pytest.raises(EndpointError):
        found.extend(open_source(server, concurrency=1).complete(asks(5), Sampling(), 9))
    assert found == [(0, FINE), (1, FINE)]


MALFORMED = [
    *("<html>sign in</html>", '{"choices": [', "", "[]", "null", "3"),
    *({}, {"choices": None}, {"choices": []}, {"choices": "none"}, {"choices": {"0": 1}}),
    *({"choices": [None]}, {"choices": ["a"]}, {"choices": [{}]}),
    {"choices": [{"message": None, "text": None}]},
    {"choices": [{"message": "a", "text": {}}]},
    {"choices": [{"message": {"content": 3}, "text": 3}]},
    *(as_completion(None), as_completion(["a"]), as_completion({"a": "b"})),
    {"error": {"message": "a 200 that is none"}},
]


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_a_malformed_reply_has_no_text_and_the_rest_goes_on(server, api, kind):
    server.script += [Reply(200, content, {"Content-Type": kind}) for content in MALFORMED]
    server.script.append(OK)
    source = open_source(server, api=api, concurrency=1)
    found = complete(source, len(MALFORMED) + 1)
    last = found.pop(len(MALFORMED))
    assert {n: text for n, (text, *_) in found.items() if text is not None} == {}
    assert last == FINE
    assert source.num_retries == 0


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 5}, (7, 5)),
        (None, (0, 0)),
        ({}, (0, 0)),
        ({"prompt_tokens": 7, "completion_tokens": None}, (7, 0)),
        ({"prompt_tokens": "7", "completion_tokens": 5.0}, (0, 0)),
        ("7", (0, 0)),
        ([7], (0, 0)),
    ],
)
def test_a_usage_that_cannot_be_counted_loses_no_text(server, usage, counts):
    server.script.append(Reply(200, as_completion("fine", usage=usage)))
    assert complete(open_source(server)) == {0: Completion("fine", "stop", *counts)}


@pytest.mark.parametrize(("given", "found"), [("length", "length"), (None, "stop")])
def test_the_finish_reason_is_kept(server, given, found):
    body = as_completion("fine")
    body["choices"][0]["finish_reason"] = given
    server.script.append(Reply(200, body))
    assert complete(open_source(server))[0].finish_reason == found


def test_half_a_surrogate_pair_is_replaced(server):
    server.script.append(Reply(200, as_completion("a \ud83d b")))
    assert complete(open_source(server))[0].text == "a ? b"


def test_a_hang_is_timed_out_and_retried(server):
    server.script += [HANG, OK]
    source = open_source(server, timeout_s=0.1)
    assert complete(source) == {0: FINE}
    assert source.num_retries == 1


def test_an_endpoint_that_only_hangs_ends_the_run(server):
    server.answer = lambda asked: HANG
    said = refused(open_source(server, timeout_s=0.1), within_s=9)
    assert len(server.asked) == 3
    assert said.endswith(", with a larger --timeout if answers take longer.")


def test_an_address_where_nothing_answers_stops_at_once(server):
    server.close()
    started = time.monotonic()
    with pytest.raises(EndpointError) as caught:
        open_source(server)
    assert time.monotonic() - started < QUICK_S
    assert str(caught.value).startswith(f"nothing answers at --endpoint {server.address} (")
    assert str(caught.value).endswith("; start the server, or correct the address.")


def test_ctrl_c_in_the_middle_of_a_request_leaves_no_traceback(server, monkeypatch, caplog):
    def interrupted(*_):
        if not signals_sent:
            signals_sent.append(os.kill(os.getpid(), signal.SIGINT))
        over.wait(10)

    signals_sent, over = [], threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    source = open_source(server)
    monkeypatch.setattr(source, "_complete", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            complete(source, 3)
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
    assert caplog.records == []


@pytest.mark.parametrize("concurrency", [1, 3])
def test_concurrency_bounds_the_requests_in_flight(server, concurrency):
    server.pause_s = 0.02
    assert len(complete(open_source(server, concurrency=concurrency), 12)) == 12
    assert server.most_at_once == concurrency


def test_a_prompt_that_serve_shortened_stops_the_run(server):
    server.script.append(Reply(200, as_completion("fine", notices=["kept 64 of 900 tokens"])))
    said = refused(open_source(server))
    assert "the endpoint shortened the prompt (kept 64 of 900 tokens)" in said
    assert "--model base" in said
