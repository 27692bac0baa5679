"""Cards of the published hubs where they are, and small ones of our own."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.apicalls.cards import Cards, read_cards

HUBS = {  # name in the golden file: cards, references
    "torchhub": ("torchhub_api.jsonl", "torchhub_eval.json"),
    "huggingface": ("huggingface_api.jsonl", "huggingface_eval.json"),
    "tensorflowhub": ("tensorflowhub_api.jsonl", "tensorflow_eval.json"),
}


@pytest.fixture(scope="session")
def apicall(golden: Path) -> Any:
    return json.loads((golden / "apicall.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def gorilla(shared: Path) -> Path:
    return shared / "data" / "gorilla"


def find(folder: Path, name: str) -> Path:
    """Return a file, or its compressed form."""
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"


def read_lines(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def hubs(gorilla: Path) -> dict[str, Cards]:
    """The published cards by hub."""
    return {hub: read_cards(find(gorilla, files[0])) for hub, files in HUBS.items()}


@pytest.fixture
def write_cards(tmp_path: Path) -> Callable[..., Path]:
    """Write cards from (api_call, domain) pairs, or whole ones, and return their file."""

    def write(cards: Sequence[tuple[str, str] | dict[str, Any]], **more: Any) -> Path:
        rows = []
        for number, card in enumerate(cards):
            fields = card if isinstance(card, dict) else {"api_call": card[0], "domain": card[1]}
            named = {"api_name": f"api-{number}", "description": f"does thing {number}", **more}
            rows.append(json.dumps({**named, **fields}, ensure_ascii=False) + "\n")
        path = tmp_path / "cards.jsonl"
        path.write_text("".join(rows), encoding="utf-8")
        return path

    return write
