"""What every test may use: the golden numbers, the shared real data, one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: on tensors this small, more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
