"""A trainer whose checkpoints are whole or not there, and whose resume is exact.

Killed at any moment and started again, a run takes the same steps as one that was left alone: what
transformers forgets is in `run_state`, how a checkpoint is written in `checkpointing`. Written
against the methods of transformers 5.10 to 5.23 that it overrides.
"""

import json
import logging
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, SchedulerType
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ptuning.atomic_file import write_atomically
from ptuning.train.faults.disk_errors import DiskError, explain_disk_error, is_disk_error
from ptuning.train.processes.sharding_trainer import ShardingTrainer
from ptuning.train.resume.checkpointing import (
    CheckpointFacts,
    finish_checkpoint,
    staging_path,
    start_checkpoint,
)
from ptuning.train.resume.resume_checks import warn_of_other_length
from ptuning.train.resume.run_directory import is_whole, rotate
from ptuning.train.resume.run_events import RunEvents
from ptuning.train.resume.run_state import (
    RunState,
    capture_random_state,
    checkpoint_bytes,
    load_run_state,
    restore_random_state,
    run_state_name,
    save_run_state,
    set_epoch,
)
from ptuning.train.resume.signals import Stopped, StopRequest

logger = logging.getLogger("main")


class ResumingTrainer(ShardingTrainer):
    """transformers' trainer with exact resume, whole checkpoints and an orderly end by signals.

    The main process alone writes what the processes share; each writes its own random and run
    state. `rows_fingerprint` stands in every checkpoint.
    """

    def __init__(
        self, *args: Any, stop: StopRequest, rows_fingerprint: str = "", **kwargs: Any
    ) -> None:
        """Take transformers' arguments and ours."""
        super().__init__(*args, **kwargs)
        self.stop = stop
        self.rows_fingerprint = rows_fingerprint
        self.run_state = RunState()
        self.agreed_to_stop = False  # by several processes
        self._resumed_from: Path | None = None
        self._knows_all_losses = True  # no: resumed from an earlier version's checkpoint
        self._save_is_due = False  # at the end of this epoch
        self._saved_step = -1
        self._events = RunEvents(self._restore_run_state)
        self.add_callback(self._events)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, from the start or from where a checkpoint was written."""
        self._resumed_from = (
            Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _restore_run_state(self) -> None:
        """Put back what transformers forgets; called when its own state is in place."""
        self.run_state = RunState()
        if self._resumed_from is None:
            self.draw_apart_from_others()
            return
        if self.is_world_process_zero():
            warn_of_other_length(
                self._resumed_from,
                num_steps=self.state.max_steps,
                schedule=SchedulerType(self.args.lr_scheduler_type).value,
            )
        self.args.eval_on_start = False  # that was at step 0
        path = self._resumed_from / run_state_name(self.args.process_index, self.args.world_size)
        state = load_run_state(path)
        self._knows_all_losses = state is not None
        self.run_state = state or RunState(last_logged_step=self.state.global_step)
        self._tr_loss = torch.tensor(self.run_state.loss_since_log, device=self.args.device)
        self._total_loss_scalar = self.run_state.loss_logged
        self._globalstep_last_logged = self.run_state.last_logged_step
        self._find_best_checkpoint(Path(str(self.args.output_dir)))
        states: Any = self.state.stateful_callbacks  # by class name, whatever its annotation says
        remembered = states.get(EarlyStoppingCallback.__name__)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and isinstance(remembered, dict):
                counter = remembered["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = counter

    def _find_best_checkpoint(self, run_dir: Path) -> None:
        """Name the best checkpoint as it is called here, wherever the folder lay before."""
        if self.state.best_global_step:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if is_whole(best):
                self.state.best_model_checkpoint = str(best)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, with its order of rows even where it is entered in its middle."""
        if self._nothing_is_left():
            self.control.should_training_stop = True
            return
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        checkpoint = kwargs["resume_from_checkpoint"]
        if checkpoint is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            if kwargs["steps_trained_in_current_epoch"] == 0:
                self._load_rng_state(checkpoint)
            elif self.run_state.epoch_random_state:
                restore_random_state(self.run_state.epoch_random_state)
        self.run_state.epoch_random_state = capture_random_state()
        super()._run_epoch(*args, **kwargs)

    def _nothing_is_left(self) -> bool:
        """Tell whether a resumed run was at its end: transformers would take one step more."""
        return self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )

    # ---- Checkpoints ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do what the step or epoch asks for; then stop, with a checkpoint, where a signal came."""
        if self._events.is_epoch_over and self._save_is_due:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        more_to_come = self._epoch_ends_here() and not self._events.is_epoch_over
        if self._stop_is_wanted() and not more_to_come:
            if self._saved_step != self.state.global_step:
                self._save_checkpoint(self.model_wrapped, None)
            raise Stopped(self.stop.requested or signal.SIGTERM, saved=True)

    def _stop_is_wanted(self) -> bool:
        return self.agreed_to_stop or (
            self.args.world_size == 1 and self.stop.requested is not None
        )

    def _epoch_ends_here(self) -> bool:
        """Tell whether the events of an epoch's end follow this step."""
        ends = self.control.should_epoch_stop or self.control.should_training_stop
        return ends or float(self.state.epoch or 0.5).is_integer()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint whole or not at all, then delete those above --save_total_limit.

        The one of an epoch's last step is written when the events of the epoch's end are over:
        a run that goes on from it does not see them again.
        """
        if self._epoch_ends_here() and not self._events.is_epoch_over:
            self._save_is_due = True
            return
        self._save_is_due = False
        self.store_flos()
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(checkpoint)
        except Exception as error:
            if not is_disk_error(error):
                raise
            shutil.rmtree(staging_path(checkpoint), ignore_errors=True)
            what = f"checkpoint-{self.state.global_step}"
            text = explain_disk_error(
                error,
                what,
                run_dir,
                checkpoint_bytes(self.accelerator.unwrap_model(self.model), self.optimizer),
            )
            raise DiskError(text) from error
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            for old in rotate(
                run_dir, self.args.save_total_limit, keep=[Path(best)] if best else []
            ):
                logger.info("Removed %s, above --save_total_limit", old)

    def _write_checkpoint(self, checkpoint: Path) -> None:
        """Write the files of every process under a temporary name, which the main one renames."""
        staging = staging_path(checkpoint)
        if self.args.should_save:
            start_checkpoint(checkpoint)
        self.accelerator.wait_for_everyone()
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            name = run_state_name(self.args.process_index, self.args.world_size)
            save_run_state(staging / name, self._current_run_state())
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
        else:
            self._find_best_checkpoint(checkpoint.parent)
        if self.args.should_save:
            self._save_trainer_state(staging / TRAINER_STATE_NAME)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(checkpoint, self._facts())
        self.accelerator.wait_for_everyone()

    def _current_run_state(self) -> RunState:
        return replace(
            self.run_state,
            loss_since_log=self._tr_loss.item(),
            loss_logged=self._total_loss_scalar,
            last_logged_step=self._globalstep_last_logged,
        )

    def _save_trainer_state(self, path: Path) -> None:
        """Write transformers' state with that of its callbacks, as transformers does."""
        states: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        by_name: Any = {name: all_ if len(all_) > 1 else all_[0] for name, all_ in states.items()}
        self.state.stateful_callbacks = by_name
        self.state.save_to_json(str(path))

    def _facts(self) -> CheckpointFacts:
        return CheckpointFacts(
            step=self.state.global_step,
            processes=self.args.world_size,
            resumable=not self.args.save_only_model,
            sound=self.run_state.skipped_in_a_row == 0,
            rows=self.rows_fingerprint,
            rows_per_step=rows_per_step(self.args),
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Finish, keeping the last checkpoint: a run killed while it answers goes on from there."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def save_state(self) -> None:
        """Write trainer_state.json whole."""
        if self.is_world_process_zero():
            state = Path(str(self.args.output_dir)) / TRAINER_STATE_NAME
            staging = state.with_name(f".{state.name}.{os.getpid()}.tmp")
            self.state.save_to_json(str(staging))
            staging.replace(state)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write `split`_results.json and add it to all_results.json, both whole."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        _write_json(folder / f"{split}_results.json", metrics)
        if combined:
            path = folder / "all_results.json"
            _write_json(path, {**_read_results(path), **metrics})


def rows_per_step(args: Any) -> int:
    """Return the rows that one optimiser step reads, over all processes."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return int(rows * args.world_size)


def tokens_to_train(args: Any, lengths: Any) -> float:
    """Return how many tokens a process trains on, given the rows' lengths (a numpy array)."""
    if args.max_steps > 0:
        return float(args.max_steps * rows_per_step(args) * lengths.mean() / args.world_size)
    return float(args.num_train_epochs * lengths.sum() / args.world_size)


def _read_results(path: Path) -> dict[str, Any]:
    """Return the figures of an earlier part of the run; none from a file that was cut short."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        logger.warning("%s cannot be read and is written anew", path)
        return {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=4, sort_keys=True).encode())
