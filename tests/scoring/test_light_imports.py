"""The room `evaluate` imports no heavy package when it is imported, and no other room at all."""

import ast
from pathlib import Path

import pytest

ROOM = Path(__file__).resolve().parents[2] / "ptuning" / "scoring"
HEAVY = {"torch", "transformers", "matplotlib", "jieba", "nltk", "rouge_chinese", "numpy"}


def imported_names(nodes: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_nothing_heavy_or_foreign_is_imported_at_the_top(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = imported_names(tree.body)
    assert not {name.split(".")[0] for name in at_top} & HEAVY
    anywhere = imported_names([node for node in ast.walk(tree) if isinstance(node, ast.stmt)])
    own = {name for name in anywhere if name.split(".")[0] == "ptuning"}
    own -= {"ptuning.storage", "ptuning.output"}
    assert all(name.startswith("ptuning.scoring.") for name in own)
    assert not {name.split(".")[0] for name in anywhere} & {"torch", "transformers"}
