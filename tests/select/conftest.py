"""Rows on their way through a selection, and the golden numbers of `lima.json`."""

import json
from pathlib import Path
from typing import Any

import pytest

from ptuning.data.conversion import ContractRow
from ptuning.select.cleaning import Fields
from ptuning.select.selection import PoolRow

GOLDEN = Path(__file__).parents[1] / "golden" / "lima.json"


@pytest.fixture(scope="session")
def lima() -> Any:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def candidate(prompt: str, response: str, row_id: str = "a:1", **more: Any) -> PoolRow:
    """Return a row as a file would give it."""
    row = ContractRow(
        id=row_id,
        prompt=prompt,
        response=response,
        history=more.pop("history", []),
        source=more.pop("source", "a.json"),
        meta={},
    )
    return PoolRow(row, Fields(prompt, "", response), **more)
