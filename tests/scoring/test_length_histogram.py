"""The picture of lengths: one panel a side, a line a file, the limit across."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ptuning.data.checking.lengths import sides_of
from ptuning.data.prompts import RowFormat
from ptuning.scoring.pictures import COLOURS, draw_length_histogram


def draw(files: dict[str, tuple[Sequence[int], Sequence[int]]], path: Path) -> None:
    """Draw files by name, with the lengths of their prompts and answers."""
    sides = [
        (name, sides_of(RowFormat(), np.array([prompts, answers]).T))
        for name, (prompts, answers) in files.items()
    ]
    draw_length_histogram(sides, path)


def colours_in(path: Path) -> set[str]:
    pixels = (imread(path)[..., :3] * 255).round().astype(np.int64).reshape(-1, 3)
    return {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.unique(pixels, axis=0)}


def test_every_file_has_its_colour(tmp_path: Path) -> None:
    files = {
        "train.json": (range(20, 80), range(30, 90)),
        "dev.json": (range(10, 40), range(20, 50)),
    }
    draw(files, tmp_path / "new" / "a.png")
    colours = colours_in(tmp_path / "new" / "a.png")
    assert {*COLOURS[:2], "#b3261e"} <= colours
    assert COLOURS[2] not in colours


@pytest.mark.parametrize(
    "lengths", [[0], [1, 1, 1], [5, 100_000], [*range(1000)], [62, 63, 64]], ids=str
)
def test_any_lengths_can_be_drawn(tmp_path: Path, lengths: list[int]) -> None:
    draw({"a.json": (lengths, lengths)}, tmp_path / "a.png")
    height, width = imread(tmp_path / "a.png").shape[:2]
    assert (width, height) == (1440, 736)


def test_svg_is_chosen_by_the_ending(tmp_path: Path) -> None:
    draw({"a.json": ([3], [4])}, tmp_path / "a.SVG")
    assert b"<svg" in (tmp_path / "a.SVG").read_bytes()
