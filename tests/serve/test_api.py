"""The official openai client against the running server."""

import json
from collections.abc import Iterator

import httpx2
import openai
import pytest

from ptuning.apicalls.pairs import prompt_maker
from tests.serve.live_server import KEY, client, running, wait_until_idle

QUESTION = "类型#裤*版型#宽松"
USER = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def address(session) -> Iterator[str]:
    with running(session) as found:
        yield found


@pytest.fixture(scope="module")
def api(address) -> Iterator[openai.OpenAI]:
    with client(address) as found:
        yield found


def http(address, method, path, **options):
    headers = {"Authorization": f"Bearer {KEY}"} | options.pop("headers", {})
    return httpx2.request(method, address + path, headers=headers, timeout=30, **options)


def test_models_are_the_base_and_the_prefixes(api):
    assert [model.id for model in api.models.list()] == [
        "base",
        "adgen",
        "other",
        "short",
        "chatty",
    ]
    assert api.models.retrieve("adgen").id == "adgen"


@pytest.mark.parametrize("model", ["base", "adgen"])
def test_a_chat_is_the_session_s_answer(api, session, model):
    reply = api.chat.completions.create(model=model, messages=USER, user="me", n=1)
    answer = session.chat(QUESTION, prefix=model)
    assert reply.choices[0].message.content == answer.read()
    assert reply.choices[0].finish_reason == answer.finish_reason
    assert reply.model == model
    assert reply.usage.prompt_tokens == answer.usage.prompt_tokens
    assert reply.usage.completion_tokens == answer.usage.completion_tokens


def test_what_was_left_out_of_a_prompt_is_said_whole_and_streamed(api):
    words = "The prompt may have 64 tokens: the end of the question was cut off."
    asked = {"model": "adgen", "messages": [{"role": "user", "content": "类型#裤" * 40}]}
    assert api.chat.completions.create(**asked).model_extra == {"notices": [words]}
    usage = {"include_usage": True}
    chunks = list(api.chat.completions.create(**asked, stream=True, stream_options=usage))
    assert [chunk.model_extra for chunk in chunks[-2:]] == [{"notices": [words]}, {}]
    assert chunks[-2].choices[0].finish_reason is not None
    assert not any(chunk.model_extra for chunk in chunks[:-2])

    prompt = {"model": "adgen", "prompt": "类型#裤" * 40, "stream": True}
    *pieces, end = api.completions.create(**prompt)
    assert end.model_extra == {"notices": [words]}
    assert not any(piece.model_extra for piece in pieces)
    *_, end = api.completions.create(**prompt | {"prompt": "你好"})
    assert not end.model_extra, "nothing was left out"


RIGHT = '<<<domain>>>: d\n<<<api_call>>>: shop.title( x, repo="a/short" )\n<<<api_provider>>>: P'
NO_MODEL = "<<<api_call>>>: shop.title(repo='made/up')\n<<<api_provider>>>: P"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (RIGHT, ("shop.title(x, repo='a/short')", None, ["Short titles"])),
        (NO_MODEL, ("shop.title(repo='made/up')", "unknown_model", [])),
        ("Call shop.sell(1).", ("shop.sell(1)", "unknown_callee", [])),
        ("<<<api_call>>>: shop.title(repo=", (None, "syntax", [])),
        (f"f(0x{'f' * 5000})", ("f(...)", "unknown_callee", [])),
        ("<<<domain>>>: None\n<<<api_call>>>: None", None),
        ("宽松（版型）藏肉又自在(很好", None),
    ],
)
def test_an_answer_s_api_call_is_checked_whole_and_streamed(
    session, cards, answer_with, text, shown
):
    answer_with(text)
    extra = {}
    if shown is not None:
        call, reason, names = shown
        extra = {"call": call, "valid": reason is None, "reason": reason, "cards": names}
        extra = {"api_call": extra}
    asked = {"model": "adgen", "messages": USER, "max_tokens": 2}
    with running(session, cards=cards) as address, client(address) as api:
        assert api.chat.completions.create(**asked).model_extra == extra
        *pieces, end = api.chat.completions.create(**asked, stream=True)
        assert end.model_extra == extra
        assert not any(piece.model_extra for piece in pieces)
        whole = api.completions.create(model="adgen", prompt=QUESTION, max_tokens=2)
        assert whole.model_extra == extra
        assert whole.choices[0].text == text


def test_the_last_question_of_a_chat_gets_documents_and_a_raw_prompt_does_not(
    session, cards, monkeypatch
):
    asked, chat = [], session.chat
    monkeypatch.setattr(
        session,
        "chat",
        lambda question, *a, **k: (asked.append(question), chat(question, *a, **k))[1],
    )
    to_prompt = prompt_maker(cards, 2)
    with running(session, to_prompt=to_prompt) as address, client(address) as api:
        api.chat.completions.create(model="adgen", messages=USER, max_tokens=1)
        api.completions.create(model="adgen", prompt=QUESTION, max_tokens=1)
    assert asked == [to_prompt(QUESTION), QUESTION]
    assert asked[0].count('"api_call"') == 2


def test_without_cards_an_api_call_is_only_text(api, answer_with):
    answer_with(RIGHT)
    assert api.chat.completions.create(model="adgen", messages=USER).model_extra == {}


def test_history_and_system_reach_the_prompt(api, session):
    history = [("你好", "你好！")]
    messages = [
        {"role": "system", "content": "请简短"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}],
        },
        {"role": "assistant", "content": "你好！"},
        *USER,
    ]
    reply = api.chat.completions.create(model="base", messages=messages)
    answer = session.chat(QUESTION, history, system="请简短")
    assert reply.choices[0].message.content == answer.read()
    assert reply.usage.prompt_tokens == answer.usage.prompt_tokens


def test_what_was_left_out_is_said(api):
    messages = [
        {"role": "user", "content": QUESTION * 4},
        {"role": "assistant", "content": "好"},
        *USER,
    ]
    reply = api.chat.completions.create(
        model="adgen", messages=messages, extra_body={"max_source_length": 50}
    )
    assert "left out" in reply.notices[0]


def test_completions_are_raw_as_in_evaluation(api, session):
    reply = api.completions.create(model="adgen", prompt="hello, 你好")
    answer = session.chat("hello, 你好", prefix="adgen", clean=False)
    assert reply.choices[0].text == answer.read()
    again = api.completions.create(model="adgen", prompt=["hello, 你好"], max_tokens=3)
    assert again.usage.completion_tokens == 3
    assert again.choices[0].finish_reason == "length"
    assert answer.text.startswith(again.choices[0].text.rstrip("\ufffd"))


@pytest.mark.parametrize("is_chat", [True, False])
def test_streams_join_to_the_whole_answer(api, is_chat):
    options = {"model": "base", "stream_options": {"include_usage": True}, "stream": True}
    if is_chat:
        whole = api.chat.completions.create(model="base", messages=USER)
        chunks = list(api.chat.completions.create(messages=USER, **options))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert text == whole.choices[0].message.content
    else:
        whole = api.completions.create(model="base", prompt=QUESTION)
        chunks = list(api.completions.create(prompt=QUESTION, **options))
        text = "".join(c.choices[0].text for c in chunks if c.choices)
        assert text == whole.choices[0].text
    assert len(chunks) > 5
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_log_probabilities_whole_and_streamed(api):
    options = {"model": "base", "messages": USER, "logprobs": True, "top_logprobs": 2}
    whole = api.chat.completions.create(**options)
    found = whole.choices[0].logprobs.content
    assert len(found) == whole.usage.completion_tokens
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in found)
    assert all(one.top_logprobs[0].token == one.token for one in found)  # greedy
    spoken = b"".join(bytes(one.bytes) for one in found).decode("utf-8")
    assert spoken.strip().replace(",", "，") == whole.choices[0].message.content
    streamed = [
        one
        for chunk in api.chat.completions.create(stream=True, **options)
        if chunk.choices and chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == found
    plain = api.completions.create(model="base", prompt=QUESTION, logprobs=1).choices[0].logprobs
    assert [len(top) for top in plain.top_logprobs] == [1] * len(plain.tokens)
    assert plain.token_logprobs == [one.logprob for one in found]
    assert plain.text_offset[0] == 0


def test_seed_temperature_and_stop(api):
    def say(**options):
        reply = api.chat.completions.create(model="base", messages=USER, **options)
        return reply.choices[0].message.content, reply.choices[0].finish_reason

    drawn = [say(temperature=1.5, seed=seed)[0] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert say(temperature=0)[0] == say()[0]
    whole = say()[0]
    assert say(stop=[whole[4:6]]) == (whole[: whole.index(whole[4:6])], "stop")


def test_strength_and_blend_over_http(api, session):
    def say(model, **extra):
        reply = api.chat.completions.create(
            model=model, messages=USER, max_tokens=16, extra_body=extra
        )
        return reply.choices[0].message.content

    assert say("adgen", prefix_strength=0) == say("base")
    assert say("adgen", blend={"model": "other", "weight": 1}) == say("other")


def test_errors_are_the_client_s_own_kinds(api, address):
    with pytest.raises(openai.NotFoundError, match="there is no prefix 'gpt-4'") as missing:
        api.chat.completions.create(model="gpt-4", messages=USER)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="n is 2, which is not supported"):
        api.chat.completions.create(model="base", messages=USER, n=2)
    with pytest.raises(openai.BadRequestError, match="last one must be the user"):
        api.chat.completions.create(
            model="base", messages=[*USER, {"role": "assistant", "content": "x"}]
        )
    with pytest.raises(openai.BadRequestError, match="temperature"):
        api.completions.create(model="base", prompt="x", temperature=3)
    with pytest.raises(openai.AuthenticationError) as refused:
        client(address, "wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError) as large:
        api.completions.create(model="base", prompt="x" * 300_000)
    assert large.value.status_code == 413


def test_prefixes_are_added_and_removed_at_run_time(address, api, prefix_dirs):
    body = {"name": "new", "path": str(prefix_dirs["adgen"])}
    assert http(address, "POST", "/v1/prefixes", json=body).json()["prefix_length"] == 8
    said = [
        api.completions.create(model=m, prompt=QUESTION, max_tokens=9) for m in ("new", "adgen")
    ]
    assert said[0].choices[0].text == said[1].choices[0].text
    listed = http(address, "GET", "/v1/prefixes").json()["data"]
    assert listed[-1]["name"] == "new"
    assert listed[-1]["settings"]["max_source_length"] == 64
    assert "already" in http(address, "POST", "/v1/prefixes", json=body).json()["error"]["message"]
    nowhere = {"name": "lost", "path": "nowhere"}
    assert http(address, "POST", "/v1/prefixes", json=nowhere).status_code == 400
    assert http(address, "DELETE", "/v1/prefixes/new").json() == {"name": "new", "deleted": True}
    assert http(address, "DELETE", "/v1/prefixes/new").status_code == 404
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="new", prompt=QUESTION)


def test_without_a_key_prefixes_cannot_be_managed(session):
    with running(session, api_key=None) as address:
        assert httpx2.get(f"{address}/v1/models").status_code == 200
        refused = httpx2.post(f"{address}/v1/prefixes", json={"name": "x", "path": "y"})
        assert refused.status_code == 403
        assert "--api_key" in refused.json()["error"]["message"]


def test_health_is_open_and_metrics_count(address, api):
    before = metric(address, 'ptuning_tokens_total{model="other",kind="completion"}')
    used = api.completions.create(model="other", prompt="你好", max_tokens=4).usage
    after = metric(address, 'ptuning_tokens_total{model="other",kind="completion"}')
    assert after - before == used.completion_tokens
    assert metric(address, 'ptuning_requests_total{path="/v1/completions",status="200"}') >= 1
    assert metric(address, "ptuning_rows") == 0
    assert httpx2.get(f"{address}/health").json() == {"status": "ok", "rows": 0, "waiting": 0}
    assert httpx2.get(f"{address}/metrics").status_code == 401


def metric(address, name):
    lines = http(address, "GET", "/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


def test_unknown_paths_and_methods_are_errors_in_the_same_form(address):
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)):
        reply = http(address, method, path)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_late_answer_is_given_up(session):
    # With seed 2 the answer has 55 tokens; others end within the 20 ms now and then.
    body = {"model": "base", "prompt": "你好", "temperature": 2, "max_tokens": 1900, "seed": 2}
    with running(session, timeout_s=0.02) as address:
        reply = http(address, "POST", "/v1/completions", json=body)
        assert reply.status_code == 504
        assert "over 0.02 s" in reply.json()["error"]["message"]
        wait_until_idle(session)
        streamed = http(address, "POST", "/v1/completions", json=body | {"stream": True})
        last = json.loads(streamed.text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["code"] == "timeout"
        wait_until_idle(session)
