"""What scores text and draws imports no heavy package until it is used: `data check` starts at once."""

import ast
from pathlib import Path

import pytest

SCORING = Path(__file__).resolve().parents[2] / "ptuning" / "scoring"
HEAVY = {"torch", "transformers", "matplotlib", "jieba", "nltk", "rouge_chinese", "numpy"}


@pytest.mark.parametrize("name", ["metrics", "pictures", "predictions"])
def test_nothing_heavy_is_imported_at_the_top(name: str) -> None:
    names: set[str] = set()
    for node in ast.parse((SCORING / f"{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    assert not {name.split(".")[0] for name in names} & HEAVY
    own = {name for name in names if name.split(".")[0] == "ptuning"}
    assert own <= {"ptuning.storage", "ptuning.output", "ptuning.data.segmentation"}
