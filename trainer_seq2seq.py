"""transformers' Trainer with atomic checkpoints, exact resume, guarded steps and a loss per token.

A run killed at any moment and started again takes the same steps as an uninterrupted one. With
several processes each row is used once. The parts are in `ptuning.train`: `checkpoints` (with what
transformers does not store), `guards` (bad steps), `processes` (sharded rows). Written against the
methods of transformers 5.10 to 5.23 that it overrides.
"""

import copy
import json
import logging
import math
import shutil
import signal
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import EarlyStoppingCallback, SchedulerType, Seq2SeqTrainingArguments, trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

from ptuning.data.tokenization import pad_right
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.loss import IGNORED_LABEL
from ptuning.scoring.pictures import draw_loss_curve
from ptuning.storage import write_atomically
from ptuning.train.checkpoints import (
    CheckpointFacts,
    RunState,
    capture_random_state,
    fault_of,
    finish_checkpoint,
    load_run_state,
    read_facts,
    restore_random_state,
    save_run_state,
    set_epoch,
    staging_path,
    start_checkpoint,
)
from ptuning.train.endings import DiskError, is_disk_error, memory_explained
from ptuning.train.fit import Workload
from ptuning.train.guards import (
    BAD_BATCH_NAME,
    BadStepsError,
    StepGuard,
    correct_mean,
    fault_in,
    gather_evidence,
)
from ptuning.train.processes import exclude_frozen_from_ddp, sharded_loader
from ptuning.train.progress import CURVE_NAME, CurveCallback, ProgressLines
from ptuning.train.rows import Rows
from ptuning.train.run_config import RunConfig
from ptuning.train.run_directory import RunDirectory
from ptuning.train.signals import Stopped, StopRequest
from ptuning.train.tuning import Tuning, newest_metrics
from ptuning.tunings.artefact import TrainedState

# Schedules whose learning rate does not depend on the number of steps.
STEADY_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")

logger = logging.getLogger("main")


@dataclass(frozen=True)
class Run:
    """What a run tunes, on which rows, and where it writes."""

    config: RunConfig
    tuning: Tuning
    tokenizer: ChatGLMTokenizer
    rows: Rows
    directory: RunDirectory
    stop: StopRequest
    workload: Workload  # with the batch size of validation


class Seq2SeqTrainer(transformers.Trainer):
    """Trains what a tuning attached to a ChatGLM.

    A checkpoint is what the tuning writes (a prefix artefact for P-Tuning) next to transformers'
    optimizer, scheduler, random and trainer state and our run state. The main process writes the
    shared files; each process writes its own random and run state.
    """

    def __init__(
        self, model: ChatGLMForConditionalGeneration, args: Seq2SeqTrainingArguments, run: Run
    ) -> None:
        """Take what to train and how; args is copied, not changed."""
        config = run.config
        args = copy.copy(args)
        args.logging_nan_inf_filter = False  # StepGuard replaces it, at one transfer per step
        if run.workload.eval_batch is not None:
            args.per_device_eval_batch_size = run.workload.eval_batch
        pad_id, length = run.tokenizer.pad_token_id, config.padded_length
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(pad_right, pad_id=pad_id, pad_to_length=length),
            train_dataset=run.rows.train,
            eval_dataset=run.rows.validation,
        )
        # The model smooths the labels: transformers' smoother materialises all logits, and its
        # gradient underflows in float16.
        self.label_smoother = None
        model.label_smoothing = args.label_smoothing_factor
        model.set_layer_dropout(config.layer_dropout)
        for printer in (transformers.PrinterCallback, trainer.DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(printer)
        self.progress = ProgressLines()
        if self.is_world_process_zero():
            self.add_callback(self.progress)
            if args.do_train:
                self.add_callback(CurveCallback(draw_loss_curve, run.directory.path / CURVE_NAME))
        if config.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
        if args.world_size > 1:
            exclude_frozen_from_ddp(model)
        self.run, self.directory = run, run.directory
        self.run_state = RunState()
        self.agreed_to_stop = False  # by several processes
        self._guard = StepGuard(max_in_a_row=config.max_bad_steps)
        self._validated: list[Tensor] = []  # (2,) per batch: summed loss, number of answer tokens
        self._resumed_from: Path | None = None
        self._has_begun = False  # the run state is restored
        self._handled_step = self._saved_step = -1  # whose events are done, whose checkpoint is
        self._is_epoch_over = False
        self._save_is_due = False  # at the end of this epoch

    @property
    def chatglm(self) -> ChatGLMForConditionalGeneration:
        """The model itself, whatever wraps it."""
        return self.accelerator.unwrap_model(self.model)

    # ---- Rows ----

    @property
    def shards_rows(self) -> bool:
        """Whether rows are sharded here, not by an engine that splits a row or weighs rows."""
        return (
            self.args.world_size > 1
            and getattr(self.args, "parallelism_config", None) is None
            and self.args.train_sampling_strategy != "batch_rebalance"
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's part of the training rows."""
        if not self.shards_rows:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        order: Any = self._get_train_sampler(rows)
        args, size = self.args, self._train_batch_size
        return sharded_loader(rows, order, self.data_collator, args, batch_size=size, trains=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this process's part of the validation rows."""
        if not self.shards_rows:
            return super().get_eval_dataloader(eval_dataset)
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        order, args = SequentialSampler(rows), self.args
        size = args.eval_batch_size
        return sharded_loader(rows, order, self.data_collator, args, batch_size=size, trains=False)

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Return the sum of all processes' values, in each process."""
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum")

    # ---- Training steps ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train from step 0, or from the step of a checkpoint."""
        if resume_from_checkpoint:
            self._resumed_from = Path(str(resume_from_checkpoint))
            self.args.eval_on_start = False  # that was at step 0
        self.directory.begin()
        with closing(self.progress), memory_explained("training", self.run.workload):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def train_and_save(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint if there is one; write the artefact, the results and the log."""
        dtype = str(self.chatglm.dtype).removeprefix("torch.")
        what = self.run.tuning.describe(self.chatglm)
        logger.info("Training %s in %s on %s", what, dtype, self.args.device)
        first = 0 if checkpoint is None else read_facts(checkpoint)["step"]
        with self.run.stop.deferred():
            result = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.save_model()
        results = self.directory.path / "train_results.json"
        if self.state.global_step > first or not results.is_file():  # a finished run keeps its own
            self.save_metrics("train", result.metrics)
        self.save_state()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Compute a micro-batch's gradient; keep its loss and batch until the step is checked."""
        self._guard.begin(self._tr_loss)
        with memory_explained("training", self.run.workload, inputs["input_ids"].shape):
            loss = super().training_step(model, inputs, *args)
        self._guard.add(inputs, loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm; cancel the step if loss or norm is zero or not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss, norm = self._agree_on(self._guard.values(grad_norm))
        fault, scaler = fault_in(loss, norm), getattr(self.accelerator, "scaler", None)
        # A loss scaler finds its scale by steps whose gradient alone is bad: they are left to it.
        is_skipped = fault is not None and (scaler is None or fault_in(loss, 1.0) is not None)
        self.progress.add_step(loss, skipped=is_skipped)
        if fault is None:
            self.run_state.skipped_in_a_row = 0
        elif is_skipped:
            step = self.state.global_step + 1
            if self._guard.refuse(model, self._tr_loss, fault, self.run_state, step=step):
                raise BadStepsError(self._explain_bad_steps((loss, norm), step))
        self._guard.clear()
        return grad_norm

    def _agree_on(self, values: Tensor) -> tuple[float, float]:
        """Return loss and gradient norm averaged over processes; note if any wants to stop."""
        if self.args.world_size > 1:
            wish = values.new_tensor([float(self.run.stop.requested is not None)])
            loss, norm, wishes = self.sum_over_processes(torch.cat([values, wish])).tolist()
            self.agreed_to_stop = wishes > 0
            return loss / self.args.world_size, norm / self.args.world_size
        loss, norm = values.tolist()
        return loss, norm

    def _explain_bad_steps(self, values: tuple[float, float], step: int) -> str:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        evidence = gather_evidence(
            self.chatglm,
            self._guard.batches,
            values,
            learning_rate=float(self.args.learning_rate),
            log_history=self.state.log_history,
        )
        return self._guard.explain(
            evidence,
            self.directory.path / BAD_BATCH_NAME.format(rank=rank),
            decode=lambda ids: str(self.run.tokenizer.decode(ids)),
            step=step,
            last_sound=self.directory.last_sound(),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with means over the steps that were taken, and the number of skipped ones."""
        if "loss" in logs:
            correct_mean(logs, self.run_state, step=self.state.global_step)
        if "train_loss" in logs:
            taken = max(self.state.global_step - self.run_state.skipped, 1)
            logs["train_loss"] = self._total_loss_scalar / taken
            logs["skipped_steps"] = self.run_state.skipped
        super().log(logs, start_time)

    # ---- Validation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the teacher-forced loss on the validation rows."""
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.progress.end_validation()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[None, None, None]:
        """Keep the batch's summed loss and number of answer tokens for evaluation_loop."""
        inputs = self._prepare_inputs(inputs)
        shape = inputs["input_ids"].shape
        with memory_explained("validating", self.run.workload, shape), torch.no_grad():
            loss = model(**inputs, num_items_in_batch=1).loss
        num_labels = (inputs["labels"][:, 1:] != IGNORED_LABEL).sum()
        self._validated.append(torch.stack([loss.detach().float(), num_labels.float()]))
        return None, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Take the loss as the mean over answer tokens, whatever the batch size and the ranks."""
        self._validated.clear()
        output = super().evaluation_loop(*args, **kwargs)
        own = torch.stack(self._validated).cpu().double().sum(dim=0)  # (2,)
        loss, num_labels = self.sum_over_processes(own).tolist()
        assert output.metrics is not None, "transformers fills it"
        output.metrics["eval_loss"] = loss / num_labels if num_labels else math.nan
        self._validated.clear()
        return output

    # ---- Start and resume ----

    def _begin(self) -> None:
        """Restore the run state, once transformers has restored its own state."""
        if self._has_begun:
            return
        self._has_begun = True
        if self._resumed_from is None:
            if self.args.world_size > 1:  # for dropout masks of its own; the row order is the same
                transformers.set_seed(self.args.seed + self.args.process_index)
            return
        if self.is_world_process_zero():
            self._warn_of_other_length(self._resumed_from)
        self.run_state = load_run_state(self._resumed_from, self.args.process_index)
        self._tr_loss = torch.tensor(self.run_state.loss_since_log, device=self.args.device)
        self._total_loss_scalar = self.run_state.loss_logged
        self._globalstep_last_logged = self.run_state.last_logged_step
        self._find_best_checkpoint()
        states: Any = self.state.stateful_callbacks  # by class name, whatever its annotation says
        remembered = states.get(EarlyStoppingCallback.__name__)
        for callback in self._early_stopping() if remembered else ():
            counter = remembered["attributes"]["early_stopping_patience_counter"]
            callback.early_stopping_patience_counter = counter

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        callbacks = self.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]

    def _warn_of_other_length(self, checkpoint: Path) -> None:
        """Warn if the checkpoint's run was planned with another number of steps than this one.

        All but the steady schedules span the whole run, so the learning rate jumps here.
        """
        planned = read_facts(checkpoint)["max_steps"]
        step, num_steps = self.state.global_step, self.state.max_steps
        if planned == num_steps:
            return
        schedule = SchedulerType(self.args.lr_scheduler_type).value
        advice = f"To keep the old schedule, type --max_steps {planned}"
        if num_steps <= step:
            what = "no step is left to train"
            advice = f"To train on, type a larger --max_steps: it was meant to have {planned}"
        elif schedule in STEADY_SCHEDULES:
            what = f"it ends at step {num_steps}, with the learning rate unchanged"
        else:
            what = (
                f"the {schedule} learning-rate schedule now spans {num_steps} steps and jumps "
                "here, so the result matches neither length"
            )
            if step >= planned:
                advice = (
                    "For a schedule of its own, start a new training from the weights: --init_from "
                    f"{checkpoint} with another --output_dir"
                )
        text = "%s was written at step %d of %d, and this run asks for %d: %s. %s"
        logger.warning(text, checkpoint, step, planned, num_steps, what, advice)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any) -> None:
        """Put the checkpoint's values into the parameters that the optimizer holds."""
        self.run.tuning.restore(self.chatglm, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the checkpoint with the best validation loss."""
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _find_best_checkpoint(self) -> None:
        """Set the best checkpoint's path, also after the directory was moved."""
        if self.state.best_global_step:
            best = self.directory.path / f"checkpoint-{self.state.best_global_step}"
            if fault_of(best) is None:
                self.state.best_model_checkpoint = str(best)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch in its own order of rows, also from the middle."""
        self._begin()
        if self._is_done():
            self.control.should_training_stop = True
            return
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        checkpoint = kwargs["resume_from_checkpoint"]
        if checkpoint is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            if kwargs["steps_trained_in_current_epoch"] == 0:
                self._load_rng_state(checkpoint)
            else:
                restore_random_state(self.run_state.epoch_random_state)
        self.run_state.epoch_random_state = capture_random_state()
        super()._run_epoch(*args, **kwargs)

    def _is_done(self) -> bool:
        """Return whether a resumed run was at its end; transformers would take one step more."""
        return self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self._early_stopping()
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Finish with the mean loss over all processes.

        The last checkpoint is kept: a run killed while it answers rows resumes from it.
        """
        self._begin()  # a run resumed at its end has no epoch
        self._tr_loss = self.sum_over_processes(self._tr_loss) / self.args.world_size
        self.args.save_total_limit = None
        return super()._finalize_training(*args, **kwargs)

    # ---- Checkpoints ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, save and validate where due; after a signal, write a checkpoint and stop.

        transformers calls this after each step, and again with the same step at an epoch's end.
        """
        self._is_epoch_over = self._handled_step == self.state.global_step
        self._handled_step = self.state.global_step
        if self._is_epoch_over and self._save_is_due:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        wanted = self.agreed_to_stop if self.args.world_size > 1 else self.run.stop.requested
        if wanted and not self._epoch_end_follows():
            if self._saved_step != self.state.global_step:
                self._save_checkpoint(self.model_wrapped, None)
            raise Stopped(self.run.stop.requested or signal.SIGTERM, saved=True)

    def _epoch_end_follows(self) -> bool:
        """Return whether the events of an epoch's end follow those of this step."""
        ends = self.control.should_epoch_stop or self.control.should_training_stop
        ends = ends or float(self.state.epoch or 0.5).is_integer()
        return ends and not self._is_epoch_over

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint completely or not at all, then delete those above --save_total_limit.

        At an epoch's last step it waits for the events of the epoch's end: a resumed run does not
        see them again.
        """
        if self._epoch_end_follows():
            self._save_is_due = True
            return
        self._save_is_due = False
        self.store_flos()
        checkpoint = self.directory.path / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(checkpoint)
        except Exception as error:
            if not is_disk_error(error):
                raise
            shutil.rmtree(staging_path(checkpoint), ignore_errors=True)
            num_bytes = self._checkpoint_bytes()
            raise DiskError(error, checkpoint.name, checkpoint.parent, num_bytes) from error
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            keep = [checkpoint, Path(self.state.best_model_checkpoint or checkpoint)]
            for old in self.directory.rotate(self.args.save_total_limit, keep=keep):
                logger.info("Removed %s, above --save_total_limit", old)

    def _write_checkpoint(self, checkpoint: Path) -> None:
        """Write every process's files under a temporary name; the main process renames it."""
        staging = staging_path(checkpoint)
        if self.args.should_save:
            start_checkpoint(checkpoint)
        self.accelerator.wait_for_everyone()
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            state = replace(
                self.run_state,
                loss_since_log=self._tr_loss.item(),
                loss_logged=self._total_loss_scalar,
                last_logged_step=self._globalstep_last_logged,
            )
            save_run_state(staging, self.args.process_index, state)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
        else:
            self._find_best_checkpoint()
        if self.args.should_save:
            callbacks = [*self.callback_handler.callbacks, self.control]
            states: Any = {
                type(callback).__name__: callback.state()
                for callback in callbacks
                if isinstance(callback, ExportableState)
            }
            self.state.stateful_callbacks = states
            self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(checkpoint, self._facts())
        self.accelerator.wait_for_everyone()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write what is trained and nothing of the frozen base; only the main process writes."""
        if not self.args.should_save:
            return
        metrics = newest_metrics(self.state.log_history)
        settings = asdict(self.run.config.row_format) | {"multi_turn": self.run.rows.multi_turn}
        state = TrainedState(self.state.global_step, metrics, settings, state_dict)
        self.run.tuning.save(self.chatglm, Path(output_dir or self.directory.path), state)

    def _facts(self) -> CheckpointFacts:
        return CheckpointFacts(
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            processes=self.args.world_size,
            resumable=not self.args.save_only_model,
            sound=self.run_state.skipped_in_a_row == 0,
            rows=self.directory.rows,
            rows_per_step=self.run.config.rows_per_step(self.args.world_size),
        )

    def _checkpoint_bytes(self) -> int:
        """Return about how large a checkpoint is: what is trained, and the optimizer's state."""
        tensors: list[Any] = [p for p in self.chatglm.parameters() if p.requires_grad]
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # ---- Results ----

    def save_state(self) -> None:
        """Write trainer_state.json atomically."""
        if self.is_world_process_zero():
            path = self.directory.path / TRAINER_STATE_NAME
            staging = path.with_name(f".{path.name}.0.tmp")  # the sweep's pattern
            self.state.save_to_json(str(staging))
            staging.replace(path)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write `split`_results.json and add it to all_results.json, both atomically."""
        if not self.is_world_process_zero():
            return
        path = self.directory.path / "all_results.json"
        results: dict[str, float] = {}
        try:
            if path.is_file():
                results = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            logger.warning("%s cannot be read and is replaced", path)
        for name, content in ((f"{split}_results.json", metrics), (path.name, results | metrics)):
            text = json.dumps(content, indent=4, sort_keys=True)
            write_atomically(path.with_name(name), text.encode())
