"""Pictures of a run's losses and of the lengths of prompts and answers, drawn with matplotlib.

Losses come from transformers' `log_history` (trainer_state.json), a list of entries that carry
"step" and either "loss" with "learning_rate" and "epoch", or "eval_loss"; its last entry holds
totals. matplotlib is used through its object interface: no display, no pyplot state.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptuning.storage import read_json, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ptuning.data.checking.lengths import Side

TEXT_COLOUR, QUIET_COLOUR, FAINT_COLOUR = "#333a42", "#7a828c", "#d9dde2"
ALARM_COLOUR = "#b3261e"
COLOURS = ("#2563a8", "#c2571a", "#3c7d3f", "#7d4fa3", "#8a6d1f", "#4a8f95")
FIRST_COLOUR, SECOND_COLOUR = COLOURS[:2]
STYLE: Any = {  # matplotlib's rcParams
    "figure.dpi": 160,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT_COLOUR,
    "axes.labelcolor": TEXT_COLOUR,
    "axes.titlesize": 10,
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    "grid.color": FAINT_COLOUR,
    "grid.linewidth": 0.8,
    **{f"{axis}tick.color": QUIET_COLOUR for axis in "xy"},
    **{f"{axis}tick.labelsize": 9 for axis in "xy"},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": TEXT_COLOUR,
}
# For file names: fonts with Chinese characters on Linux, Windows and macOS.
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC")
NUM_BINS = 30
SUFFIXES = (".png", ".svg")
SMOOTHING_SHARE = 20  # a smoothed point is the mean over 1/20 of the run
FEWEST_TO_SMOOTH = 8  # fewer points are not smoothed


class Point(NamedTuple):
    """A logged value and its optimizer step."""

    step: float
    value: float


class LossHistory(NamedTuple):
    """The curves of a run, finite values in step order."""

    train: list[Point]
    validation: list[Point]
    learning_rate: list[Point]
    non_finite_steps: list[float]  # of losses that were NaN or infinite
    last_epoch: float | None  # None: not logged

    @property
    def best(self) -> Point | None:
        """The first of the lowest validation losses; None without validation."""
        return min(self.validation, key=lambda point: point.value, default=None)

    @property
    def steps(self) -> list[float]:
        """The steps of all finite losses."""
        return [point.step for point in (*self.train, *self.validation)]

    @property
    def remark(self) -> str:
        """A one-line warning to show with the curve, or ""."""
        if not self.train and not self.validation:
            return "no finite loss logged"
        if not self.non_finite_steps:
            return ""
        count = len(self.non_finite_steps)
        losses = "loss is" if count == 1 else "losses are"
        return f"{count} {losses} NaN or infinite, first at step {self.non_finite_steps[0]:g}"


def read_log_history(entries: Iterable[Mapping[str, Any]]) -> LossHistory:
    """Return the curves of a `log_history`.

    >>> history = read_log_history([{"step": 10, "loss": 4.5}, {"step": 10, "eval_loss": 4.25}])
    >>> history.train, history.best
    ([Point(step=10, value=4.5)], Point(step=10, value=4.25))
    """
    curves: dict[str, list[Point]] = {"loss": [], "eval_loss": [], "learning_rate": []}
    epochs = []
    for entry in entries:
        if entry.get("step") is None:
            continue
        for name, points in curves.items():
            if entry.get(name) is not None:
                points.append(Point(entry["step"], entry[name]))
        if entry.get("epoch") is not None:
            epochs.append(entry["epoch"])
    losses = curves["loss"] + curves["eval_loss"]
    return LossHistory(
        train=_drawable(curves["loss"]),
        validation=_drawable(curves["eval_loss"]),
        learning_rate=_drawable(curves["learning_rate"]),
        non_finite_steps=sorted({p.step for p in losses if not math.isfinite(p.value)}),
        last_epoch=max(epochs, default=None),
    )


def load_log_history(trainer_state_path: Path) -> list[dict[str, Any]]:
    """Return the "log_history" list of a `trainer_state.json`."""
    history: list[dict[str, Any]] = read_json(trainer_state_path)["log_history"]
    return history


def smooth(points: list[Point]) -> list[Point]:
    """Return the centred moving mean of each point; [] for fewer than FEWEST_TO_SMOOTH points.

    At the left end, where a loss falls steeply, the window shrinks and stays centred. At the right
    end it is only cut off, so that no single noisy point ends the curve.

    >>> line = [Point(step, 2.0 * step) for step in range(40)]
    >>> smooth(line)[:-1] == line[:-1], smooth(line)[-1], smooth(line[:7])
    (True, Point(step=39, value=77.0), [])
    """
    if len(points) < FEWEST_TO_SMOOTH:
        return []
    widest_reach = max(1, len(points) // (2 * SMOOTHING_SHARE))
    smoothed = []
    for centre, point in enumerate(points):
        reach = min(widest_reach, centre)
        window = points[centre - reach : centre + reach + 1]
        smoothed.append(Point(point.step, math.fsum(p.value for p in window) / len(window)))
    return smoothed


def _drawable(points: list[Point]) -> list[Point]:
    return sorted((p for p in points if math.isfinite(p.value)), key=lambda point: point.step)


@contextmanager
def _picture(path: Path, width: float, height: float) -> "Iterator[Figure]":
    """Yield a figure of width x height inches; write it as PNG or SVG, by the path's suffix."""
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)]
    content = io.BytesIO()
    with rc_context(STYLE | {"font.family": fonts}):
        figure = Figure(figsize=(width, height))
        yield figure
        figure.savefig(content, format=path.suffix.lower().removeprefix("."))
    write_atomically(path, content.getvalue())


def draw_loss_curve(log_history: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw the losses, with the learning rate below; without a finite loss, say so."""
    history = read_log_history(log_history)
    with _picture(path, 8.0, 5.0) as figure:
        if not history.steps:
            figure.text(0.5, 0.5, history.remark, ha="center", va="center", fontsize=14)
            return
        if history.learning_rate:
            axes, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
            _draw_learning_rate(bottom, history.learning_rate)
        else:
            axes = bottom = figure.add_subplot()
        _draw_losses(axes, history)
        epoch = history.last_epoch
        epochs = "" if epoch is None else f"  ({epoch:.2f} epochs in all)"
        bottom.set_xlabel(f"optimizer step{epochs}")
        bottom.locator_params(axis="x", integer=True)


def _draw_losses(axes: "Axes", history: LossHistory) -> None:
    smoothed = smooth(history.train)
    if history.train:
        label = "training loss, as logged" if smoothed else "training loss"
        marker = "" if len(history.train) > 1 else "o"
        axes.plot(
            *zip(*history.train, strict=True),
            color=FIRST_COLOUR,
            alpha=0.3 if smoothed else 1.0,
            linewidth=1.0 if smoothed else 1.8,
            marker=marker,
            label=label,
        )
    if smoothed:
        axes.plot(
            *zip(*smoothed, strict=True),
            color=FIRST_COLOUR,
            linewidth=2.2,
            label="training loss, smoothed",
        )
    if history.best is not None:
        best = f"best {history.best.value:.3f} at step {history.best.step:g}"
        axes.plot(
            *zip(*history.validation, strict=True),
            color=SECOND_COLOUR,
            linewidth=1.8,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label=f"validation loss, {best}",
        )
    if history.non_finite_steps:
        # A cross on the lower edge for each loss that the scale cannot show.
        axes.plot(
            history.non_finite_steps,
            [0.015] * len(history.non_finite_steps),
            transform=axes.get_xaxis_transform(),
            linestyle="none",
            marker="x",
            color=ALARM_COLOUR,
            markersize=6,
            clip_on=False,
            label=history.remark,
        )
    axes.margins(x=0.02, y=0.06)
    axes.set_ylabel("loss per token (nats)")
    axes.legend(loc="best")


def _draw_learning_rate(axes: "Axes", points: list[Point]) -> None:
    marker = "" if len(points) > 1 else "o"
    steps, rates = zip(*points, strict=True)
    axes.plot(steps, rates, color=QUIET_COLOUR, linewidth=1.5, marker=marker, markersize=4)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.locator_params(axis="y", nbins=3)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    axes.yaxis.get_offset_text().set(fontsize=8)
    axes.set_ylabel("learning rate", fontsize=9)


def draw_length_histogram(files: "Sequence[tuple[str, Sequence[Side]]]", path: Path) -> None:
    """Draw the prompt and answer lengths of files with their names, 6 files at most."""
    drawn = files[: len(COLOURS)]
    with _picture(path, 9.0, 4.6) as figure:
        panels = figure.subplots(1, 2)
        for index, axes in enumerate(panels):
            _draw_side(axes, [(name, sides[index]) for name, sides in drawn])
        panels[0].set_ylabel("share of rows (%)")


def check_picture_name(path: Path) -> None:
    """Raise ValueError unless the suffix is that of a picture format: .png or .svg."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the picture {path} must end in {' or '.join(SUFFIXES)}.")


def _draw_side(axes: "Axes", files: "Sequence[tuple[str, Side]]") -> None:
    """Draw one panel: a stepped line per file, and the limit."""
    import numpy as np

    noun, flag, limit, reserve, _ = files[0][1]
    longest = max(int(side.lengths.max()) for _, side in files)
    usual = max(int(np.percentile(side.lengths, 99.5, method="higher")) for _, side in files)
    high = max(usual, min(longest, limit - reserve + 1))
    width = max(1, -(-(high + 1) // NUM_BINS))  # tokens of a bin
    edges = np.arange(0, high + width + 1, width)
    for (name, side), colour in zip(files, COLOURS, strict=False):
        counts, _ = np.histogram(np.minimum(side.lengths, edges[-1] - 1), bins=edges)
        shares = 100 * counts / len(side.lengths)
        axes.stairs(shares, edges, color=colour, alpha=0.14, fill=True)
        label = f"{name}: {side.cut_share(limit):.1%} cut"
        axes.stairs(shares, edges, color=colour, linewidth=1.6, label=label)
    axes.axvline(limit - reserve + 0.5, color=ALARM_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_title(f"{noun}s, limit {flag} {limit}")
    beyond = "" if longest < edges[-1] else f", last bar up to {longest:,}"
    axes.set_xlabel(f"tokens of {noun} text{beyond}")
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="both", integer=False, nbins=7)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))  # below the panel, clear of data
