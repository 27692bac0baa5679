"""The loss curve as inline SVG for the report page.

Drawn here and not by matplotlib, for three reasons: its colours come from the page's style sheet
and so follow a dark screen, its words are text that can be read out, and it weighs a few kilobytes.
"""

import math
from typing import NamedTuple

from ptuning.evaluate.loss_history import LossHistory, Point, smooth

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 24, 12, 52  # room around the plot for the scales
MOST_POINTS = 600  # of one line; more cannot be told apart at this width
MOST_TICKS = 6


class Scale(NamedTuple):
    """Values from `low` to `high` laid out on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return the pixel of a value, to a tenth.

        >>> Scale(0, 10, 0, 500).place(2.5)
        125.0
        """
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def loss_svg(history: LossHistory) -> str:
    """Return an `<svg>` element; a run without a finite loss has nothing to draw: ''."""
    if not history.steps:
        return ""
    values = [point.value for point in (*history.train, *history.validation)]
    across = Scale(*_range_around(history.steps, margin=0.0), LEFT, WIDTH - RIGHT)
    upward = Scale(*_range_around(values, margin=0.08), HEIGHT - BOTTOM, TOP)
    smoothed = smooth(history.train)
    parts = [
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="loss by optimiser step">',
        *_grid(across, upward),
        _line("train raw" if smoothed else "train", history.train, across, upward),
        _line("train", smoothed, across, upward),
        _line("validation", history.validation, across, upward),
        *(_dot("validation", point, across, upward) for point in _thin(history.validation)),
    ]
    if len(history.train) == 1:  # too few for a line
        parts.append(_dot("train", history.train[0], across, upward))
    if history.best is not None:
        parts.append(_best_mark(history.best, across, upward))
    return "\n".join(part for part in (*parts, "</svg>") if part)


def round_steps(low: float, high: float) -> list[float]:
    """Return at most 7 round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart.

    >>> round_steps(0, 3000)
    [0.0, 500.0, 1000.0, 1500.0, 2000.0, 2500.0, 3000.0]
    """
    rough = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _range_around(values: list[float], *, margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    spread = high - low or max(abs(high), 1.0) * 0.1  # a single value gets a scale around it
    if high == low:
        return low - spread, high + spread
    return low - margin * spread, high + margin * spread


def _grid(across: Scale, upward: Scale) -> list[str]:
    parts = []
    for value in round_steps(upward.low, upward.high):
        y = upward.place(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}">{value:g}</text>')
    for value in round_steps(across.low, across.high):
        if value == int(value):  # there is no half step
            x = across.place(value)
            parts.append(f'<text class="tick mid" x="{x}" y="{HEIGHT - 30}">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick mid" x="{middle}" y="{HEIGHT - 7}">步数 optimiser step</text>')
    return parts


def _line(style: str, points: list[Point], across: Scale, upward: Scale) -> str:
    if len(points) < 2:
        return ""
    places = (f"{across.place(p.step)},{upward.place(p.value)}" for p in _thin(points))
    return f'<polyline class="{style}" points="{" ".join(places)}"/>'


def _dot(style: str, point: Point, across: Scale, upward: Scale) -> str:
    x, y = across.place(point.step), upward.place(point.value)
    return f'<circle class="{style}" cx="{x}" cy="{y}" r="3.5"/>'


def _best_mark(best: Point, across: Scale, upward: Scale) -> str:
    """Ring the best point and name it on the side that has room, below unless it lies low."""
    x, y = across.place(best.step), upward.place(best.value)
    is_right = x > WIDTH / 2
    words_x, side = (x - 4, " end") if is_right else (x + 4, "")
    words_y = y + 24 if y < HEIGHT - BOTTOM - 28 else y - 14
    return (
        f'<circle class="best" cx="{x}" cy="{y}" r="7"/>'
        f'<text class="best{side}" x="{words_x:.1f}" y="{words_y:.1f}">'
        f"最佳 best {best.value:.3f} @ {best.step:g}</text>"
    )


def _thin(points: list[Point]) -> list[Point]:
    """Keep every k-th point, and the last, so that at most about `MOST_POINTS` remain."""
    stride = math.ceil(len(points) / MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]
