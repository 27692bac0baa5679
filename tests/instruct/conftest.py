"""A scripted endpoint for each test, reached without any proxy."""

import pytest

from tests.instruct.scripted import ScriptedServer


@pytest.fixture
def server(monkeypatch):
    """An endpoint that answers by a script; a test may reprogram it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = ScriptedServer()
    yield made
    made.close()
