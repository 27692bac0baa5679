"""The loss curve of a run as a PNG: training and validation loss above, learning rate below.

Drawn with matplotlib's object interface, so neither a screen nor pyplot's global state is touched.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptuning.atomic_file import write_atomically
from ptuning.evaluate.loss_history import LossHistory, Point, read_log_history, smooth
from ptuning.evaluate.picture_style import (
    ALARM_COLOUR,
    DOTS_PER_INCH,
    FIRST_COLOUR,
    QUIET_COLOUR,
    SECOND_COLOUR,
    TEXT_COLOUR,
    plain_frame,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_INCHES = (8.0, 5.0)


def draw_loss_curve(log_history: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw what was logged into a PNG file; a run without a finite loss gets a page saying so."""
    from matplotlib.figure import Figure

    history = read_log_history(log_history)
    figure = Figure(figsize=FIGURE_INCHES, dpi=DOTS_PER_INCH, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.1)
    if not history.steps:
        _write_centred(figure.add_subplot(), history.remark)
    elif history.learning_rate:
        loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
        _draw_losses(loss_axes, history)
        _draw_learning_rate(rate_axes, history.learning_rate)
        _label_steps(rate_axes, history)
    else:
        loss_axes = figure.add_subplot()
        _draw_losses(loss_axes, history)
        _label_steps(loss_axes, history)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


def _draw_losses(axes: "Axes", history: LossHistory) -> None:
    plain_frame(axes)
    smoothed = smooth(history.train)
    if history.train:
        label = "training loss, as logged" if smoothed else "training loss"
        marker = "" if len(history.train) > 1 else "o"
        axes.plot(
            *_columns(history.train),
            color=FIRST_COLOUR,
            alpha=0.3 if smoothed else 1.0,
            linewidth=1.0 if smoothed else 1.8,
            marker=marker,
            label=label,
        )
    if smoothed:
        axes.plot(
            *_columns(smoothed), color=FIRST_COLOUR, linewidth=2.2, label="training loss, smoothed"
        )
    if history.validation:
        axes.plot(
            *_columns(history.validation),
            color=SECOND_COLOUR,
            linewidth=1.8,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label="validation loss",
        )
    _mark_non_finite(axes, history)
    axes.margins(x=0.02, y=0.06)
    if history.best is not None:
        _mark_best(axes, history.best, history.steps)
    axes.set_ylabel("loss per token (nats)", color=TEXT_COLOUR)
    axes.legend(frameon=False, fontsize=9, labelcolor=TEXT_COLOUR, loc="best")


def _mark_best(axes: "Axes", best: Point, steps: list[float]) -> None:
    """Ring the best validation point and name it below, on the side that has room."""
    axes.plot(
        [best.step],
        [best.value],
        marker="o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=SECOND_COLOUR,
        markeredgewidth=1.6,
        linestyle="none",
    )
    is_right = best.step > (min(steps) + max(steps)) / 2
    axes.annotate(
        f"best {best.value:.3f} at step {best.step:g}",
        (best.step, best.value),
        xytext=(8 if is_right else -8, -17),
        textcoords="offset points",
        ha="right" if is_right else "left",
        va="top",
        fontsize=9,
        fontweight="bold",
        color=SECOND_COLOUR,
        bbox={
            "boxstyle": "round,pad=0.25",
            "facecolor": "white",
            "edgecolor": "none",
            "alpha": 0.85,
        },
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.1 * (high - low), high)  # room for the words below the lowest point


def _mark_non_finite(axes: "Axes", history: LossHistory) -> None:
    """Put a cross on the lower edge for each loss that has no place on the scale."""
    if not history.non_finite_steps:
        return
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


def _draw_learning_rate(axes: "Axes", points: list[Point]) -> None:
    plain_frame(axes)
    marker = "" if len(points) > 1 else "o"
    axes.plot(*_columns(points), color=QUIET_COLOUR, linewidth=1.5, marker=marker, markersize=4)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.locator_params(axis="y", nbins=3)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    axes.yaxis.get_offset_text().set(fontsize=8, color=QUIET_COLOUR)
    axes.set_ylabel("learning rate", color=TEXT_COLOUR, fontsize=9)


def _label_steps(axes: "Axes", history: LossHistory) -> None:
    epochs = "" if history.last_epoch is None else f"  ({history.last_epoch:.2f} epochs in all)"
    axes.set_xlabel(f"optimiser step{epochs}", color=TEXT_COLOUR)
    axes.locator_params(axis="x", integer=True)


def _write_centred(axes: "Axes", words: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", fontsize=14, color=TEXT_COLOUR)


def _columns(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.step for point in points], [point.value for point in points]
