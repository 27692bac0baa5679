"""A session on the nano model with prefixes that change what it says."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ptuning
from ptuning.apicalls.cards import Cards, read_cards
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.serve.session import Session
from ptuning.serve.text_stream import Answer
from ptuning.tunings.loading import NANO_DIR
from tests.serve.live_server import KEY, Command, command, wait_until_gone

ADGEN = {"max_source_length": 64, "max_target_length": 24, "source_prefix": ""}


@pytest.fixture(scope="session")
def nano() -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(NANO_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def prefix_dirs(tmp_path_factory, nano) -> dict[str, Path]:
    """Four prefixes of different lengths, saved as training saves them."""
    made = {}
    for seed, name in enumerate(("adgen", "other", "short", "chatty")):
        torch.manual_seed(seed)
        encoder = nano.add_prefix((8, 5, 1, 12)[seed])
        with torch.no_grad():
            encoder.embedding.weight.mul_(3.0)  # random, so it has to be loud to be heard
        made[name] = tmp_path_factory.mktemp("prefixes") / name
        settings = ADGEN if name == "adgen" else {"max_source_length": 100, "max_target_length": 40}
        ptuning.save_prefix(nano, made[name], step=3, settings=settings)
        nano.remove_prefix()
    return made


@pytest.fixture(scope="session")
def session(prefix_dirs) -> Iterator[Session]:
    with Session.load(NANO_DIR, device="cpu") as loaded:
        for name, path in prefix_dirs.items():
            loaded.add_prefix(name, path)
        yield loaded
        assert loaded.scheduler.num_rows == loaded.scheduler.num_waiting == 0


@pytest.fixture(scope="session")
def cards_file(tmp_path_factory) -> Path:
    """API cards: a shop's two models, which share a function."""
    rows = [
        {"api_name": name, "api_call": f"shop.title(repo='{repo}')", "domain": "d"}
        for name, repo in (("Titles", "a/titles"), ("Short titles", "a/short"))
    ]
    file = tmp_path_factory.mktemp("cards") / "cards.jsonl"
    file.write_text("".join(json.dumps(row | {"description": "x"}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def cards(cards_file) -> Cards:
    return read_cards(cards_file)


@pytest.fixture
def answer_with(monkeypatch) -> Callable[[str], None]:
    """Make every answer of this process have a given text."""
    return lambda text: monkeypatch.setattr(Answer, "text", property(lambda answer: text))


@pytest.fixture(scope="session")
def served(tmp_path_factory, prefix_dirs) -> Iterator[Command]:
    """The real command with the same prefixes and a key; it answers."""
    prefixes = [f"--prefix={name}={path}" for name, path in prefix_dirs.items()]
    with command(tmp_path_factory.mktemp("served"), "--api_key", KEY, *prefixes) as started:
        started.wait_until_ready()
        model = started.wait_for_model()
        yield started
        started.process.kill()  # it cannot say good-bye, yet its other process ends with it
        started.process.wait()
        assert wait_until_gone(model) < 5
        assert "Traceback" not in started.text()
