"""The picture of lengths: one panel a side, a line a file, the limit across."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ptuning.scoring.pictures import COLOURS, Lengths, Limit, draw_length_histogram

SOURCE, TARGET = Limit("--max_source_length", 64, 63), Limit("--max_target_length", 64, 62)


def draw(files: list[Lengths], path: Path) -> None:
    draw_length_histogram(files, path, prompt_limit=SOURCE, answer_limit=TARGET)


def colours_in(path: Path) -> set[str]:
    pixels = (imread(path)[..., :3] * 255).round().astype(np.int64).reshape(-1, 3)
    return {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.unique(pixels, axis=0)}


def test_every_file_has_its_colour(tmp_path: Path) -> None:
    files = [
        Lengths("train.json", list(range(20, 80)), list(range(30, 90))),
        Lengths("dev.json", list(range(10, 40)), list(range(20, 50))),
    ]
    draw(files, tmp_path / "new" / "a.png")
    colours = colours_in(tmp_path / "new" / "a.png")
    assert {*COLOURS[:2], "#b3261e"} <= colours
    assert COLOURS[2] not in colours


@pytest.mark.parametrize(
    "lengths", [[0], [1, 1, 1], [5, 100_000], [*range(1000)], [62, 63, 64]], ids=str
)
def test_any_lengths_can_be_drawn(tmp_path: Path, lengths: list[int]) -> None:
    draw([Lengths("a.json", lengths, lengths)], tmp_path / "a.png")
    height, width = imread(tmp_path / "a.png").shape[:2]
    assert (width, height) == (1440, 736)


def test_svg_is_chosen_by_the_ending(tmp_path: Path) -> None:
    draw([Lengths("a.json", [3], [4])], tmp_path / "a.SVG")
    assert b"<svg" in (tmp_path / "a.SVG").read_bytes()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg"):
        draw([Lengths("a.json", [3], [4])], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="no row"):
        draw([Lengths("a.json", [], [])], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
