"""When a run begins and when an epoch ends, told to the trainer, which has no methods for that."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class RunEvents(TrainerCallback):
    """Calls `begin` when transformers has set a run up, and knows whether the epoch is over."""

    def __init__(self, begin: Callable[[], None]) -> None:
        """Take what to call before the first step."""
        self.begin = begin
        self.is_epoch_over = False

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass it on."""
        self.begin()

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that steps follow."""
        self.is_epoch_over = False

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that no step follows."""
        self.is_epoch_over = True
