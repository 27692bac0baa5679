"""Fixtures every test may use: where the golden numbers and the shared real data lie."""

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers made by the published code; always there."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data beside the checkout; the test skips where it is absent."""
    folder = TESTS.parents[1] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real tokenizer and ADGEN rows), which is not here")
    return folder
