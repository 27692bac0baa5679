"""Write README.md's table of flags from ptuning/train/flags.py: `python -m scripts.readme_flags`.

README_zh.md has the same table with Chinese text, written by hand; tests/test_readme.py checks that
it names the same flags with the same defaults.
"""

import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from arguments import DataArguments, ModelArguments, TrainingArguments

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- flags: written by python -m scripts.readme_flags -->"
END = "<!-- end of flags -->"


def own_flags() -> list[Field[Any]]:
    """Return the flags that are not transformers' own, in the order of ptuning/train/flags.py."""
    parts: tuple[Any, ...] = (ModelArguments, DataArguments, TrainingArguments)
    return [field for part in parts for field in fields(part)]


def default_text(value: object) -> str:
    """Return a default as typed on a command line.

    >>> default_text(None), default_text(True), default_text("main")
    ('unset', 'true', 'main')
    """
    if value is None or value == "":
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def flag_table() -> str:
    """Return the table in Markdown, one row per flag."""
    rows = ["| Flag | Default | Meaning |", "|---|---|---|"]
    for field in own_flags():
        meaning = " ".join(field.metadata["help"].split()).replace("|", "\\|")
        meaning = meaning.replace("<", "&lt;")  # <sop> is not HTML
        rows.append(f"| `--{field.name}` | {default_text(field.default)} | {meaning} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """Return a README's text with the current table between its markers."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{flag_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stderr.write(f"{README.name}: {len(own_flags())} flags.\n")
