"""The embedded base model generates rows, in this process and over HTTP."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

from ptuning.__main__ import main
from ptuning.data.prompts import RowFormat
from ptuning.data.reading import read_rows
from ptuning.data.similarity import Pool
from ptuning.instruct.templates import TEMPLATES, read_seeds, shipped_seeds
from scripts.local_server import free_port, running


def generate(out: Path, template: str, *more: str, num: int = 20) -> list[str]:
    """Run the command, and return the prompts of the rows that training reads."""
    flags = ["--template", template, "--out", str(out), "--num", str(num), *more]
    assert main(["generate", *flags]) == 0
    rows = read_rows(out, RowFormat())
    assert (rows.num_read, rows.unused, dict(rows.dropped)) == (num, {}, {})
    return [row.prompt for row in rows.kept]


def check_diverse(prompts: Sequence[str], template: str) -> None:
    """No two are alike, and none is a seed."""
    seeds = {task.instruction for task in read_seeds([shipped_seeds(TEMPLATES[template])])}
    instructions = [prompt.split("\n")[0] for prompt in prompts]
    assert not seeds & set(instructions)
    for first, second in combinations(instructions, 2):
        assert Pool([first]).scores(second)[0] <= 0.7, (first, second)


@pytest.mark.parametrize("template", [pytest.param("adgen", marks=pytest.mark.slow), "zh"])
def test_nano_makes_twenty_rows_that_differ(tmp_path: Path, template: str) -> None:
    check_diverse(generate(tmp_path / "new.jsonl", template), template)


def test_nano_asks_itself(tmp_path: Path) -> None:
    prompts = generate(tmp_path / "new.jsonl", "magpie", num=6)
    assert len(set(prompts)) == 6


@pytest.mark.slow
def test_nano_makes_twenty_rows_over_http(tmp_path: Path) -> None:
    port = free_port()
    with running(["serve"], port=port, page="/v1/models", folder=tmp_path) as address:
        served = ("--endpoint", address, "--model", "base")
        check_diverse(generate(tmp_path / "new.jsonl", "adgen", *served), "adgen")
        questions = generate(
            tmp_path / "asked.jsonl", "magpie", *served, "--api", "completions", num=3
        )
    assert len(set(questions)) == 3
