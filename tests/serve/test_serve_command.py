"""`python -m ptuning serve` as people start, use and end it: two processes that end together."""

import json
import signal

import httpx2
import openai
import pytest

from ptuning.__main__ import main
from tests.serve.live_server import KEY, client, command, wait_until_gone

QUESTION = "类型#裤*版型#宽松"
USER = [{"role": "user", "content": QUESTION}]


def test_the_official_client_gets_the_session_s_answers(served, session):
    expected = session.chat(QUESTION, prefix="adgen").read()
    with client(served.address) as api:
        assert [model.id for model in api.models.list()] == ["base", *session.prefixes]
        chunks = list(api.chat.completions.create(model="adgen", messages=USER, stream=True))
        assert len(chunks) > 5
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        text = api.completions.create(model="other", prompt=QUESTION).choices[0].text
        assert text == session.chat(QUESTION, prefix="other", clean=False).read()
        with pytest.raises(openai.NotFoundError):
            api.completions.create(model="nobody", prompt=QUESTION)


def test_prefixes_are_added_and_removed_with_the_key(served, session, prefix_dirs):
    body = {"name": "new", "path": str(prefix_dirs["adgen"])}
    url = f"{served.address}/v1/prefixes"
    assert httpx2.post(url, json=body).status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(headers=headers, timeout=30) as http, client(served.address) as api:
        assert http.post(url, json=body).json() == {"name": "new", "prefix_length": 8, "step": 3}
        assert "already" in http.post(url, json=body).json()["error"]["message"]
        text = api.completions.create(model="new", prompt=QUESTION, max_tokens=9).choices[0].text
        answer = session.chat(QUESTION, prefix="adgen", clean=False, max_new_tokens=9)
        assert text == answer.read()
        refused = http.post(url, json={"name": "lost", "path": "no/such"})
        assert refused.status_code == 400
        assert "no/such does not exist" in refused.json()["error"]["message"]
        assert http.delete(f"{url}/new").json() == {"name": "new", "deleted": True}
        assert http.delete(f"{url}/new").status_code == 404


def test_a_model_that_is_not_there_is_one_line_and_status_2(tmp_path):
    with command(tmp_path, model=tmp_path / "no-model") as server:
        assert server.process.wait(timeout=60) == 2
        said = server.text().strip().splitlines()
        assert said[-1].startswith("ptuning serve: ")
        assert "no-model" in said[-1]
        assert "Traceback" not in server.text()


@pytest.mark.parametrize("name", ["serve", "web"])
def test_documents_without_cards_or_fewer_than_none_are_refused(name, cards_file, capsys):
    for flags, words in (
        (["--top_k", "1"], "--top_k finds documents in --cards FILE; give that too."),
        (["--cards", str(cards_file), "--top_k", "-1"], "--top_k is -1; use 0 (no documents)"),
    ):
        assert main([name, "--model", "nano", *flags]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["serve", "web"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("", "no rows"),
        ('{"prompt": "a", "response": "b"}', 'an API card needs "api_name"'),
        (
            '{"id": "1", "function": [{"name": "f", "description": "", "parameters": '
            '{"properties": {}}}]}\n' * 2,
            "single questions",
        ),
    ],
)
def test_cards_that_are_none_are_one_line_and_status_2(name, text, words, tmp_path, capsys):
    file = tmp_path / "cards.jsonl"
    if text is not None:
        file.write_text(text)
    assert main([name, "--model", "nano", "--cards", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ptuning {name}: ")
    assert str(file) in line
    assert words in line


@pytest.mark.slow
def test_ctrl_c_while_the_model_is_loaded_is_status_130(tmp_path):
    with command(tmp_path) as server:
        model = server.wait_for_model()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=20) == 130
        assert wait_until_gone(model) < 1
        assert "Traceback" not in server.text()
        assert server.text().strip().endswith("ptuning serve: interrupted.")


@pytest.mark.slow
def test_the_server_ends_with_a_killed_model_and_everyone_is_told(tmp_path):
    body = {"model": "base", "prompt": "你好", "temperature": 2, "max_tokens": 1900, "seed": 1}
    with command(tmp_path) as server:
        server.wait_until_ready()
        url = f"{server.address}/v1/completions"
        with httpx2.stream("POST", url, json=body | {"stream": True}, timeout=30) as reply:
            lines = (line for line in reply.iter_lines() if line)
            assert "error" not in next(lines)
            server.wait_for_model().kill()
            *_, last = lines
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "computation_failed"
        assert "the process with the model has ended (signal 9, " in error["message"]
        assert server.process.wait(timeout=20) == 2
        said = server.text().strip().splitlines()[-1]
        assert said.startswith("ptuning serve: the process with the model has ended (signal 9, ")
        assert said.endswith("start the server again.")
        assert "Traceback" not in server.text()
