"""What a training run reports: progress lines, a bar, its loss curve, and logs elsewhere.

The callbacks replace transformers' own printing, which is Python dicts, in the main process; those
of --report_to stay. transformers reports a missing package or hub token only after the model is
loaded, so `check_run` looks for them at the start.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from ptuning.output import Progress, duration, first_line, on_terminal, open_bar, tenths
from ptuning.train.processes import in_main_process
from ptuning.train.run_config import RunConfig, UsageError

logger = logging.getLogger("main")

CURVE_NAME = "loss_curve.png"
DRAW_EVERY_S = 30.0  # drawing takes about half a second
LINE_EVERY_S = 600.0  # without a terminal, lines between tenths that take longer


class ProgressLines(TrainerCallback):
    """Prints a line per log entry above a bar on a terminal, else a line per 10 % of the steps.

    Validations and the end of the run are always printed. A line's loss is the mean over the steps
    since the previous line.
    """

    def __init__(self) -> None:
        self._opened = ExitStack()  # closes the bar
        self._bar: tqdm | None = None  # None outside training
        self._validation: Progress | None = None
        self._losses: list[float] = []  # of this process's steps, without skipped ones
        self._num_printed = 0  # of these losses, in earlier lines
        self._num_skipped = 0  # steps since the last line

    def add_step(self, loss: float, *, skipped: bool = False) -> None:
        """Count an optimizer step and its loss; a skipped one does not enter the mean."""
        if skipped:
            self._num_skipped += 1
        else:
            self._losses.append(loss)

    def close(self) -> None:
        """Close the bars, also after an error."""
        self.end_validation()
        self._opened.close()
        self._bar = None

    def end_validation(self) -> None:
        """Close the bar of a validation."""
        if self._validation is not None:
            self._validation.close()
            self._validation = None

    # ---- Events of transformers' Trainer ----

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._first_step = self._line_step = state.global_step
        self._started = self._first_step_over = time.monotonic()
        self._line_at = -math.inf
        self._bar = self._opened.enter_context(
            open_bar(state.max_steps, "training", unit="step", initial=state.global_step)
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Advance the bar, or print the line of a tenth unless on_log is about to."""
        assert self._bar is not None, "on_train_begin opened it"
        last = f"loss {self._losses[-1]:.3f}" if self._losses else "no usable loss"
        self._bar.set_postfix_str(last, refresh=False)
        self._bar.update()
        if state.global_step == self._first_step + 1:
            self._first_step_over = time.monotonic()  # it may have compiled the model
        if self._is_tenth(state) and self._bar.disable and not control.should_log:
            self._print_step(state, kwargs)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Print a log entry."""
        logs = kwargs["logs"]
        if "train_loss" in logs:
            self._print_trained(args, state, logs)
        elif "eval_loss" in logs:
            self._print_validation(state, logs, kwargs["eval_dataloader"].dataset)
        elif "loss" in logs and self._is_wanted(state):
            self._print_step(state, kwargs)

    def on_prediction_step(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Count a batch of a validation."""
        if self._validation is None:
            total = len(kwargs["eval_dataloader"])
            self._validation = Progress(total, "validating", unit="batch", leave=False)
            self._validation.__enter__()
        self._validation.update()

    # ---- Lines ----

    def _is_tenth(self, state: TrainerState) -> bool:
        total = state.max_steps
        return tenths(state.global_step, total) > tenths(self._line_step, total)

    def _is_wanted(self, state: TrainerState) -> bool:
        """Return whether a log entry is printed; no step is printed twice."""
        if self._line_step == state.global_step:
            return False
        is_late = time.monotonic() - self._line_at >= LINE_EVERY_S
        return on_terminal() or is_late or self._is_tenth(state)

    def _print_step(self, state: TrainerState, event: Mapping[str, Any]) -> None:
        """Print the step, the mean loss since the last line, the learning rate and time left."""
        losses = self._losses[self._num_printed :]
        mean = f"loss {math.fsum(losses) / len(losses):.3f}" if losses else "no usable loss"
        parts = [_step(state), mean]
        if event.get("lr_scheduler") is not None:
            parts.append(f"learning rate {event['lr_scheduler'].get_last_lr()[0]:.2e}")
        if self._num_skipped:
            parts.append(_skipped(self._num_skipped))
        if state.global_step < state.max_steps:
            parts.append(f"{duration(self._time_left(state))} left")
        logger.info("  ".join(parts))
        self._line_step, self._line_at = state.global_step, time.monotonic()
        self._num_printed, self._num_skipped = len(self._losses), 0

    def _time_left(self, state: TrainerState) -> float:
        """Extrapolate in seconds, without this process's first step once there are others."""
        since, num_steps = self._first_step_over, state.global_step - self._first_step - 1
        if num_steps < 1:
            since, num_steps = self._started, 1
        return (time.monotonic() - since) / num_steps * (state.max_steps - state.global_step)

    def _print_validation(self, state: TrainerState, logs: Mapping[str, Any], rows: Any) -> None:
        loss = float(logs["eval_loss"])
        if self._bar is not None:
            logger.info("%s  validation loss %.3f", _step(state), loss)
            return
        perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond, exp overflows float64
        spent, text = duration(logs["eval_runtime"]), "Validation loss %.3f (perplexity %.2f): "
        logger.info(text + "%d rows in %s", loss, perplexity, len(rows), spent)

    def _print_trained(self, args: Any, state: TrainerState, logs: Mapping[str, Any]) -> None:
        spent, num_steps = time.monotonic() - self._started, state.global_step - self._first_step
        if num_steps == 0:
            logger.info("Nothing is left to train: the checkpoint is at %s", _step(state))
            return
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        text = f"Trained {num_steps} step{'s' if num_steps > 1 else ''} in {duration(spent)} "
        text += f"({num_steps * rows / spent:.3g} rows/s)"
        if self._losses:
            text += f"  mean loss {math.fsum(self._losses) / len(self._losses):.3f}"
        if skipped := logs.get("skipped_steps"):
            text += f"  {_skipped(skipped)}"
        logger.info(text)
        if state.global_step < state.max_steps:
            logger.info("Stopped early, at step %d of %d", state.global_step, state.max_steps)
        if args.load_best_model_at_end and state.best_metric is not None:
            step, loss = state.best_global_step, state.best_metric
            logger.info("Kept the best step, %s: validation loss %.3f", step, loss)


def _step(state: TrainerState) -> str:
    """Return the step and its percentage, padded to one width for the whole run."""
    width = len(str(state.max_steps))
    share = 100 * state.global_step // state.max_steps
    return f"step {state.global_step:>{width}} of {state.max_steps} ({share:>3} %)"


def _skipped(count: int) -> str:
    return f"{count} step skipped" if count == 1 else f"{count} steps skipped"


class CurveCallback(TrainerCallback):
    """Draws the log history with draw(log_history, path): every 30 seconds, and at the end."""

    def __init__(
        self, draw: Callable[[Sequence[Mapping[str, Any]], Path], None], path: Path
    ) -> None:
        self.draw, self.path = draw, path
        self._drawn_at = time.monotonic()

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw if the last picture is old enough."""
        if time.monotonic() - self._drawn_at > DRAW_EVERY_S:
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw the run so far."""
        try:
            self.draw(state.log_history, self.path)
        except OSError as error:  # a picture is not worth a run
            text = "%s cannot be written (%s); the run continues"
            logger.warning(text, self.path, error.strerror)
        self._drawn_at = time.monotonic()


# ---- Where else a run logs ----


def check_run(config: RunConfig) -> None:
    """Refuse to start (UsageError) if what --report_to or --push_to_hub needs is missing."""
    check_reporting(config.report_to)
    if config.push_to_hub:
        in_main_process(partial(check_push_to_hub, config.output_dir, config.trainer_flags))


def check_reporting(report_to: str | Sequence[str]) -> None:
    """Check --report_to: transformers' callback for it says which package is missing."""
    if report_to in (["none"], ["all"]):  # as a JSON file may have it
        report_to = report_to[0]
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"--report_to is {report_to}: {error}") from error


def check_push_to_hub(output_dir: str | Path, flags: Mapping[str, Any]) -> None:
    """Create the repository that --push_to_hub writes to, as transformers would after loading.

    flags may hold hub_model_id (default: the name of output_dir), hub_token (default: that of `hf
    auth login` or HF_TOKEN) and hub_private_repo.
    """
    from huggingface_hub import HfApi, constants, errors, get_token

    leave_out = "or leave --push_to_hub out and upload the folder later with hf upload."
    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            f"--push_to_hub needs the hub, and HF_HUB_OFFLINE is set: unset it, {leave_out}"
        )
    token, private = flags.get("hub_token"), flags.get("hub_private_repo")
    if (token or get_token()) is None:
        raise UsageError(
            "--push_to_hub needs a token that may write: type hf auth login, give --hub_token, "
            f"{leave_out}"
        )
    repository = flags.get("hub_model_id") or Path(output_dir).absolute().name
    try:
        HfApi().create_repo(repository, token=token, private=private, exist_ok=True)
    except (errors.HfHubHTTPError, ValueError) as error:  # refused: token, permission, name
        raise UsageError(
            f"--push_to_hub: {constants.ENDPOINT} refuses the repository {repository}: "
            f"{first_line(error)} Give a token that may write to it (--hub_token, hf auth login) "
            f"and --hub_model_id OWNER/NAME, {leave_out}"
        ) from error
    except (errors.HTTPError, OSError) as error:  # HTTPError: httpx's or httpx2's, as the hub has
        raise UsageError(
            f"--push_to_hub: {constants.ENDPOINT} cannot be reached ({first_line(error)}): check "
            f"the connection or set HF_ENDPOINT to a mirror, {leave_out}"
        ) from error
