"""The flags of an endpoint, checked before it is asked, and numbers that are below the least."""

import argparse
import math
from typing import Any

import pytest

from ptuning.commands.asking import check_least, open_endpoint
from ptuning.commands.asking_flags import add_endpoint_flags
from tests.completions.scripted import ScriptedServer


def flags(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_endpoint_flags(parser, "an endpoint")
    return parser.parse_args(["--endpoint", "http://127.0.0.1:9", *given])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--endpoint needs the name of a model: --model NAME."),
        *(
            (["--model", "any", "--endpoint", url], f"--endpoint is {url}; give it as http://local")
            for url in ("localhost:8000", "http://", "http://host:80OO", "http:///v1")
        ),
        (["--model", "any", "--api_key_env", "NO_KEY"], "--api_key_env is NO_KEY, a variable that"),
        (["--model", "any", "--timeout", "nan"], "--timeout is nan; use 0.001 or more."),
        (["--model", "any", "--concurrency", "0"], "--concurrency is 0; use 1 or more."),
    ],
)
def test_a_flag_that_cannot_work_is_named(given: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared below
        open_endpoint(flags(*given))
    assert str(caught.value).startswith(said)


def test_the_openai_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="openai is not installed; type: python -m pip install"):
        open_endpoint(flags("--model", "any"))


def test_an_endpoint_that_is_there_is_opened(server: ScriptedServer) -> None:
    source = open_endpoint(flags("--endpoint", f"{server.address}/", "--model", "scripted"))
    assert (source.name, source.kind, source.num_retries) == ("scripted", "chat", 0)


@pytest.mark.parametrize("value", [0, -1, 0.5, math.nan])
def test_a_number_below_the_least_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^--budget is {value}; use 1 or more\.$"):
        check_least(argparse.Namespace(seed=3, unset=None, budget=value), seed=3, unset=1, budget=1)
