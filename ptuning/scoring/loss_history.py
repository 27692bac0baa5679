"""The losses of a run, picked out of transformers' `log_history`.

`log_history` is the list in `trainer_state.json`. Its entries carry "step" and then either "loss"
(with "learning_rate" and "epoch"), or "eval_loss"; the last one has totals, which are not points.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SMOOTHING_SHARE = 20  # one smoothed point is the mean over 1/20 of the run around it
FEWEST_TO_SMOOTH = 8  # fewer points are not smoothed


class Point(NamedTuple):
    """A logged value and the optimiser step it was logged at."""

    step: float
    value: float


class LossHistory(NamedTuple):
    """What a loss curve is drawn from; every value is finite, every list is in step order."""

    train: list[Point]
    validation: list[Point]
    learning_rate: list[Point]
    non_finite_steps: list[float]  # where a training or validation loss was NaN or infinite
    last_epoch: float | None  # None when no entry says

    @property
    def best(self) -> Point | None:
        """The lowest validation loss, the earliest if several; None without validation."""
        return min(self.validation, key=lambda point: point.value, default=None)

    @property
    def steps(self) -> list[float]:
        """The steps of all losses that can be drawn."""
        return [point.step for point in (*self.train, *self.validation)]

    @property
    def remark(self) -> str:
        """A one-line warning to show next to the curve; empty if all is well."""
        if not self.train and not self.validation:
            return "no finite loss logged"
        if not self.non_finite_steps:
            return ""
        count = len(self.non_finite_steps)
        losses = "loss is" if count == 1 else "losses are"
        return f"{count} {losses} NaN or infinite, first at step {self.non_finite_steps[0]:g}"


def read_log_history(entries: Iterable[Mapping[str, Any]]) -> LossHistory:
    """Sort a `log_history` into curves.

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
    state = json.loads(trainer_state_path.read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(
            f'{trainer_state_path} holds no "log_history" list. Give the trainer_state.json that '
            "the trainer wrote into the output folder or a checkpoint."
        )
    history: list[dict[str, Any]] = state["log_history"]
    return history


def smooth(points: list[Point]) -> list[Point]:
    """Return the centred moving mean, as many points as given; too few points give none.

    At the left end, where a loss falls steeply, the window shrinks and stays centred. At the right
    end, where it is flat, the window is only cut off, so that no single noisy point ends the curve.

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
