"""Keep the picture of the loss curve up to date while a run goes on."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("main")

DRAW_EVERY_S = 30.0  # drawing takes about half a second


class CurveCallback(TrainerCallback):
    """Draws the log history with `draw` to a file: at most every 30 seconds, and at the end."""

    def __init__(
        self, draw: Callable[[Sequence[Mapping[str, Any]], Path], None], path: Path
    ) -> None:
        """Draw to path with draw(log_history, path)."""
        self.draw = draw
        self.path = path
        self._drawn_at = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw when the last picture is old enough."""
        if state.is_world_process_zero and time.monotonic() - self._drawn_at > DRAW_EVERY_S:
            self._draw_now(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the whole run."""
        if state.is_world_process_zero:
            self._draw_now(state)

    def _draw_now(self, state: TrainerState) -> None:
        try:
            self.draw(state.log_history, self.path)
        except OSError as error:  # a picture is not worth a run
            logger.warning("%s cannot be written (%s); the run goes on", self.path, error.strerror)
        self._drawn_at = time.monotonic()
