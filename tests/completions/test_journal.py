"""A journal hands back what was finished, whatever byte a run was cut at, and refuses another run's."""

import json
from pathlib import Path
from typing import Any

import pytest

from ptuning.completions.journal import Journal

IDENTITY = {"model": "any", "digits": (1, 2, 3), "width": 8}
ITEMS = {"a:1": 0.1 + 0.2, "b\n": None, "c": [1, {"d": "\ud83d é"}], "é": "ok", "last": 1e-300}


def open_journal(path: Path, **changes: Any) -> tuple[Journal, dict[str, Any]]:
    """Return a journal and what it handed back."""
    items: dict[str, Any] = {}
    journal = Journal(path, IDENTITY | changes, items.__setitem__, at_least=["width"])
    return journal, items


def written(path: Path) -> bytes:
    """Write all items, and return the file."""
    journal, items = open_journal(path)
    for key, value in ITEMS.items():
        journal.add(key, value)
    assert items == ITEMS
    return path.read_bytes()


def test_items_of_any_json_value_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.jsonl"
    content = written(path)
    assert open_journal(path)[1] == ITEMS
    assert path.read_bytes() == content
    begun, *lines = content.splitlines()
    assert json.loads(begun) == IDENTITY | {"digits": [1, 2, 3]}
    assert [json.loads(line) for line in lines] == [list(item) for item in ITEMS.items()]


def test_a_journal_that_was_cut_at_any_byte_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    content = written(path)
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        journal, items = open_journal(path)
        assert list(items.items()) == list(ITEMS.items())[: max(content[:end].count(b"\n") - 1, 0)]
        for key in ITEMS.keys() - items.keys():
            journal.add(key, ITEMS[key])
        assert sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())


def test_another_identity_is_refused_by_name_and_a_larger_value_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    content = written(path)
    with pytest.raises(ValueError, match=r"other settings \(model any; now model new\)"):
        open_journal(path, model="new")
    with pytest.raises(ValueError, match=r"\(width 8; now width 9\)"):
        open_journal(path, width=9)
    assert open_journal(path, width=4)[0].identity["width"] == 8
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["{", "3", "[0]", "[0, 1, 2]", "[[0], 1]", '{"a": 1}'])
def test_a_line_of_another_form_is_damage(tmp_path: Path, line: str) -> None:
    path = tmp_path / "scores.jsonl"
    content = written(path) + line.encode() + b"\n"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"scores\.jsonl is damaged \(.*; delete it, or give"):
        open_journal(path)
    assert path.read_bytes() == content
