"""Loss curves: what is picked from the log, and that both pictures show what exists."""

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from ptuning.scoring.pictures import (
    Point,
    draw_loss_curve,
    load_log_history,
    read_log_history,
    smooth,
)
from ptuning.scoring.report import MOST_POINTS, render_report
from tests.scoring.test_report import report


def log_of(steps: int, *, validation: bool = True) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for index in range(1, steps + 1):
        step = 10 * index
        loss = 3.7 + 2 * math.exp(-index / 10)
        entries.append({"step": step, "loss": loss, "learning_rate": 0.02, "epoch": step / 1000})
        if validation and index % 5 == 0:
            entries.append({"step": step, "eval_loss": loss + 0.1, "eval_runtime": 1.0})
    return [*entries, {"step": 10 * steps, "train_loss": 4.0, "train_runtime": 9.0}]


def colours_in(path: Path) -> set[tuple[int, int, int]]:
    red, green, blue = np.moveaxis((imread(path)[..., :3] * 255).round().astype(np.int64), -1, 0)
    packed = np.unique(red << 16 | green << 8 | blue).tolist()
    return {(colour >> 16, colour >> 8 & 255, colour & 255) for colour in packed}


def svg_of(entries: list[dict[str, Any]]) -> str:
    """Return the curve on the report page, "" if it has none."""
    page = render_report(report(log_history=entries, rows=[]))
    return "".join(re.findall("<svg.*</svg>", page, flags=re.DOTALL))


BLUE, ORANGE, RED = (0x25, 0x63, 0xA8), (0xC2, 0x57, 0x1A), (0xB3, 0x26, 0x1E)


def test_totals_are_no_points() -> None:
    history = read_log_history(log_of(10))
    assert [len(history.train), len(history.validation), len(history.learning_rate)] == [10, 2, 10]
    assert history.last_epoch == 0.1
    assert history.best == history.validation[-1]
    assert history.remark == ""


def test_losses_that_are_not_finite_are_told_and_not_drawn() -> None:
    entries: list[dict[str, Any]] = [
        {"step": 10, "loss": 4.0},
        {"step": 20, "loss": float("nan")},
        {"step": 30, "eval_loss": float("inf")},
        {"step": 30, "loss": None},
        {"loss": 4.0},
    ]
    history = read_log_history(entries)
    assert history.train == [Point(10, 4.0)]
    assert history.best is None
    assert history.remark == "2 losses are NaN or infinite, first at step 20"


def test_smoothing_keeps_the_mean_level_of_noise_and_the_number_of_points() -> None:
    noisy = [Point(step, 4.0 + (-1) ** step) for step in range(200)]
    smoothed = smooth(noisy)
    assert [point.step for point in smoothed] == [point.step for point in noisy]
    # 11 alternating values sum to one of them: 1/11 off the level; at the right end 6 cancel out.
    assert max(abs(point.value - 4.0) for point in smoothed[5:]) <= 1 / 7 + 1e-12


def test_a_trainer_state_gives_its_log(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}), encoding="utf-8")
    assert load_log_history(path) == [{"step": 1, "loss": 2.0}]


def test_the_png_shows_both_losses_and_leaves_no_other_file(tmp_path: Path) -> None:
    draw_loss_curve(log_of(40), tmp_path / "loss.png")
    assert {BLUE, ORANGE} <= colours_in(tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    ("entries", "shown", "not_shown"),
    [
        ([], set(), {BLUE, ORANGE, RED}),
        ([{"step": 10, "loss": float("nan"), "learning_rate": 0.1}], set(), {BLUE, ORANGE, RED}),
        ([{"step": 10, "loss": 4.0, "learning_rate": 0.1}], {BLUE}, {ORANGE, RED}),
        ([{"step": 10, "eval_loss": 4.0}], {ORANGE}, {BLUE, RED}),
        ([{"step": 10, "loss": 4.0}, {"step": 20, "loss": float("inf")}], {BLUE, RED}, {ORANGE}),
    ],
)
def test_the_png_shows_just_what_exists(
    tmp_path: Path,
    entries: list[dict[str, Any]],
    shown: set[tuple[int, int, int]],
    not_shown: set[tuple[int, int, int]],
) -> None:
    draw_loss_curve(entries, tmp_path / "loss.png")
    colours = colours_in(tmp_path / "loss.png")
    assert shown <= colours
    assert not not_shown & colours
    assert len(colours) > 1  # an empty log still has its sentence


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    draw_loss_curve(log_of(3), tmp_path / "loss.png")
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 300])
def test_the_svg_is_well_formed_and_inside_its_frame(steps: int) -> None:
    root = ElementTree.fromstring(svg_of(log_of(steps)))
    assert root.get("viewBox") == "0 0 720 300"
    for line in root.iter("polyline"):
        numbers = [float(number) for number in re.split("[ ,]", line.get("points") or "")]
        assert 0 <= min(numbers[::2]) <= max(numbers[::2]) <= 720
        assert 0 <= min(numbers[1::2]) <= max(numbers[1::2]) <= 300
    assert len(list(root.iter("polyline"))) == {1: 0, 2: 1, 7: 1, 8: 2, 300: 3}[steps]


def test_the_svg_of_a_long_run_stays_small() -> None:
    svg = svg_of(log_of(20_000, validation=False))
    longest = max(len(line.split(" ")) for line in re.findall('points="([^"]+)"', svg))
    assert longest <= MOST_POINTS + 1
    assert len(svg) < 40_000


def test_no_loss_has_no_svg() -> None:
    assert svg_of([{"step": 1, "loss": float("nan")}]) == ""


@pytest.mark.parametrize(
    ("losses", "loss_ticks", "step_ticks"),
    [
        ([0.0, 1.0], ["0", "0.2", "0.4", "0.6", "0.8", "1"], ["10", "12", "14", "16", "18", "20"]),
        ([3.31, 5.72], ["3.5", "4", "4.5", "5", "5.5"], ["10", "12", "14", "16", "18", "20"]),
        ([4.0], ["3.6", "3.8", "4", "4.2", "4.4"], ["9", "10", "11"]),
    ],
)
def test_the_scales_of_the_svg_have_few_and_round_numbers(
    losses: list[float], loss_ticks: list[str], step_ticks: list[str]
) -> None:
    svg = svg_of([{"step": 10 * place, "loss": loss} for place, loss in enumerate(losses, 1)])
    assert re.findall('class="tick" [^>]*>([^<]*)<', svg) == loss_ticks
    assert re.findall('class="tick mid" [^>]*>([^<]*)<', svg)[:-1] == step_ticks
