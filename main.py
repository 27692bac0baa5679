"""Tune a model, validate it, answer with it: reads the flags and joins the parts.

The order is flags, rows, tokens, then the model, so that whatever a user can get wrong is said
before anything heavy is loaded. Exit codes: 0 done, and those in `ptuning.train.faults.endings`.
"""

import logging
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME

import ptuning  # noqa: F401  # registers the model and its tokenizer with transformers
from arguments import Arguments, UsageError, check_gpu_is_here, parse_arguments
from ptuning.data.collation import pad_right
from ptuning.data.dataset import TokenDataset
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.evaluate.loss_curve import draw_loss_curve
from ptuning.evaluate.loss_history import load_log_history
from ptuning.evaluate.report import METHODS, ReportData, write_report
from ptuning.evaluate.retention import Retention
from ptuning.evaluate.table import format_scores_table
from ptuning.model.adapter import read_adapter_tensors
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.cpu_threads import limit_threads
from ptuning.model.decoding import PUBLISHED_SAMPLING, Decoding
from ptuning.model.prefix_artefact import PrefixInfo, prefix_shape, read_prefix_tensors
from ptuning.model.tuned import LORA, PTUNING, TunedInfo, kind_of, read_tuned_info
from ptuning.prediction import AnswerRun, Answers
from ptuning.retention import RetentionRun
from ptuning.train.base_model import choose_dtype, load_base, load_tokenizer
from ptuning.train.compiling import compile_layers
from ptuning.train.curve import CurveCallback
from ptuning.train.faults.endings import ending_of, memory_settings
from ptuning.train.memory.eval_rows import settle_eval_rows
from ptuning.train.memory.memory_errors import memory_explained
from ptuning.train.memory.recompute_run import pack_for_run, recompute_as_asked
from ptuning.train.processes.launch import launched_index, process_name
from ptuning.train.processes.processes import check_same_everywhere, check_shared_folder, gather
from ptuning.train.resume.resume_checks import check_same_run, fingerprint_rows
from ptuning.train.resume.resuming_trainer import rows_per_step, tokens_to_train
from ptuning.train.resume.run_directory import (
    checkpoint_to_resume,
    checkpoints,
    make_output_dir,
    remove_checkpoints,
    sweep,
)
from ptuning.train.resume.run_lock import LOCK_NAME, RunLock
from ptuning.train.resume.signals import StopRequest
from ptuning.train.rows import Rows, load_rows
from ptuning.train.settings import RunSettings, resolve_settings
from ptuning.train.tunings.choose_tuning import choose_tuning
from ptuning.train.tunings.tuning import Tuning
from trainer_seq2seq import Seq2SeqTrainer

CURVE_NAME = "loss_curve.png"
REPORT_NAME = "report.html"

logger = logging.getLogger("main")


def main(argv: list[str]) -> int:
    """Run as asked and return the exit code."""
    level = logging.INFO if launched_index() == 0 else logging.WARNING  # said once
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stdout)
    arguments = None
    try:
        with StopRequest() as stop:
            arguments = parse_arguments(argv)
            run(arguments, stop)
    except BaseException as error:
        ending = ending_of(error, arguments)
        if ending is None:
            raise
        print(f"main.py: {process_name()}{ending.text}", file=sys.stderr)
        return ending.exit_code
    return 0


def run(arguments: Arguments, stop: StopRequest) -> None:
    """Read the rows, then work on them in an output directory that no other run writes to."""
    started = time.monotonic()
    for notice in arguments.notices:
        logger.info(notice)
    check_gpu_is_here(arguments.training)
    model_flags, output_dir = arguments.model, Path(arguments.training.output_dir)
    checkpoint_to_go_on_from(arguments)  # refuses; what is there is looked at again under the lock
    hub = {
        "cache_dir": model_flags.cache_dir,
        "revision": model_flags.model_revision,
        "token": True if model_flags.use_auth_token else None,
    }
    with ExitStack() as held:
        is_there = output_dir.is_dir()
        if is_there:  # another run may be at work in it, so that reading rows would be in vain
            lock_output_dir(arguments, held)
        tuning = choose_tuning(arguments, hub)
        remembered = remembered_info(tuning.checkpoint, model_flags.start_flag)
        settings = resolve_settings(vars(arguments.data), remembered.settings if remembered else {})
        tokenizer = load_tokenizer(model_flags.tokenizer_name or tuning.weights, **hub)
        rows = load_rows(arguments, settings, tokenizer)
        if not is_there:  # made only now: what cannot start leaves nothing
            lock_output_dir(arguments, held)
        gather(None)  # nobody is trying the folder any more when the main process clears it up
        table = work(arguments, stop, hub, tuning, tokenizer, rows, settings)
    logger.info("Done in %.0f s; everything is in %s", time.monotonic() - started, output_dir)
    if table:
        logger.info("\n%s", table)


def lock_output_dir(arguments: Arguments, held: ExitStack) -> None:
    """Make the output directory; the main process keeps other runs out of it until held closes."""
    output_dir = Path(arguments.training.output_dir)
    make_output_dir(output_dir)
    if arguments.training.process_index == 0:
        held.enter_context(RunLock(output_dir))


def work(
    arguments: Arguments,
    stop: StopRequest,
    hub: dict[str, Any],
    tuning: Tuning,
    tokenizer: ChatGLMTokenizer,
    rows: Rows,
    settings: RunSettings,
) -> str:
    """Load the model, then train, validate and answer, as far as asked; return the scores' table.

    "" without scores.
    """
    model_flags, training = arguments.model, arguments.training
    resume = resume_under_lock(arguments, rows)
    set_seed(training.seed)
    limit_threads()
    dtype = choose_dtype(training.device, training.base_dtype)
    with memory_explained("loading the base", memory_settings(arguments)):
        model = load_base(
            tuning.weights,
            dtype=tuning.load_dtype(dtype),
            quantization_bit=model_flags.quantization_bit,
            quantization_backend=model_flags.quantization_backend,
            quantize_embeddings=model_flags.quantize_embeddings,
            **hub,
        )
        tuning.attach(model)
        size = pack_for_run(model, model_flags, training, rows.train)
        trainer = make_trainer(model, tokenizer, rows, arguments, settings, tuning, stop)
        settle_eval_rows(arguments, rows, settings, size, free=None)  # the model is on its device
    if training.do_train:
        train(trainer, arguments, resume)
    if training.do_eval:
        validate(trainer)
    if rows.test is None:
        return ""
    with memory_explained("answering", memory_settings(arguments)):
        model.to(training.device)  # type: ignore[arg-type]  # a wrapped nn.Module.to
        if model.dtype != dtype:
            model.to(dtype)  # type: ignore[arg-type]
        return predict(model, tokenizer, rows, arguments, settings, tuning)


def checkpoint_to_go_on_from(arguments: Arguments) -> Path | None:
    """Return the checkpoint to resume, None to start anew; never mix a new run with an old one."""
    training = arguments.training
    output_dir = Path(training.output_dir)
    if not training.do_train:
        return None
    if training.resume_from_checkpoint:
        return checkpoint_to_resume(output_dir, training.resume_from_checkpoint)
    old = checkpoints(output_dir)
    if old and not training.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {output_dir} holds {old[-1].name} of an earlier run; add "
            "--resume_from_checkpoint auto to go on with it, --overwrite_output_dir to replace it, "
            "or give another folder."
        )
    return None


def resume_under_lock(arguments: Arguments, rows: Rows) -> Path | None:
    """Clear away what a killed run left and return the checkpoint to resume, if it is this run's.

    The main process clears before the others look; all have to find the same.
    """
    training = arguments.training
    output_dir = Path(training.output_dir)
    with training.main_process_first(local=False):
        if training.process_index == 0:
            sweep(output_dir)
        resume = checkpoint_to_go_on_from(arguments)
    check_shared_folder(output_dir, LOCK_NAME)
    check_same_everywhere("the checkpoint to go on from", str(resume), needed="start again.")
    if resume is not None:
        check_same_run(
            resume,
            rows=fingerprint_rows(rows.train),
            rows_per_step=rows_per_step(training),
            processes=training.world_size,
        )
    return resume


def remembered_info(checkpoint: str | None, flag: str) -> PrefixInfo | TunedInfo | None:
    """Read what the checkpoint of a flag says of itself; None without one, or when it says nothing.

    A damaged prefix or adapter is found here, before the base loads.
    """
    if checkpoint is None:
        return None
    try:
        path = Path(checkpoint)
        kind = kind_of(path)
        if kind == PTUNING:
            prefix_shape(read_prefix_tensors(path), path)
        elif kind == LORA:
            read_adapter_tensors(path)
        return read_tuned_info(path)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"{flag}: {error}") from error


def make_trainer(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    rows: Rows,
    arguments: Arguments,
    settings: RunSettings,
    tuning: Tuning,
    stop: StopRequest,
) -> Seq2SeqTrainer:
    """Join model, rows and flags in a trainer."""
    data, training = arguments.data, arguments.training
    length = (
        settings.max_source_length + settings.max_target_length if data.pad_to_max_length else None
    )

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        return pad_right(batch, pad_id=tokenizer.pad_token_id, pad_to_length=length)

    callbacks: list[TrainerCallback] = []
    if training.do_train:
        callbacks.append(CurveCallback(draw_loss_curve, Path(training.output_dir) / CURVE_NAME))
    if training.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(training.early_stopping_patience))
    return Seq2SeqTrainer(
        model=model,
        args=training,
        data_collator=collate,
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        callbacks=callbacks,
        tuning=tuning,
        row_settings=settings.to_dict(),
        decode=lambda ids: str(tokenizer.decode(ids)),
        max_bad_steps=training.max_bad_steps,
        rows_fingerprint=fingerprint_rows(rows.train),
        stop=stop,
    )


def train(trainer: Seq2SeqTrainer, arguments: Arguments, resume: Path | None) -> None:
    """Train, then leave what was trained, its state and the curve in the output directory."""
    training = arguments.training
    output_dir = Path(training.output_dir)
    if resume is not None:
        logger.info("Going on from %s", resume)
    elif training.resume_from_checkpoint:
        logger.info("%s holds no whole checkpoint to go on from: starting anew", output_dir)
    if resume is None and training.overwrite_output_dir:
        removed = remove_checkpoints(output_dir) if trainer.args.should_save else 0
        if removed:
            logger.info("Removed %d checkpoints of an earlier run in %s", removed, output_dir)
    logger.info(
        "Training %s in %s on %s",
        trainer.tuning.describe(trainer.chatglm),
        str(trainer.chatglm.dtype).removeprefix("torch."),
        training.device,
    )
    assert isinstance(trainer.train_dataset, TokenDataset), "load_rows made it"
    choice = recompute_as_asked(trainer.chatglm, arguments.model, training, trainer.train_dataset)
    logger.info(choice.describe())
    num_tokens = tokens_to_train(training, trainer.train_dataset.lengths)
    compile_layers(trainer.chatglm, training.compiling, training.device, num_tokens=num_tokens)
    with trainer.stop.deferred():
        result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


def validate(trainer: Seq2SeqTrainer) -> None:
    """Print and save the teacher-forced loss on the validation rows."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def predict(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    rows: Rows,
    arguments: Arguments,
    settings: RunSettings,
    tuning: Tuning,
) -> str:
    """Answer every row tuned and with the untouched base, score both, and return the table."""
    assert rows.test is not None, "work asks for nothing otherwise"
    data, training = arguments.data, arguments.training
    output_dir = Path(training.output_dir)
    decoding = PUBLISHED_SAMPLING
    if settings.recipe != "published":
        decoding = Decoding(
            max_new_tokens=data.val_max_target_length or settings.max_target_length,
            max_length=training.generation_max_length,
            num_beams=data.num_beams or training.generation_num_beams or 1,
        )
    answer = AnswerRun(
        model=model,
        tokenizer=tokenizer,
        rows=rows.test,
        output_dir=output_dir,
        max_target_length=settings.max_target_length,
        batch_size=training.per_device_eval_batch_size,
        decoding=decoding,
        seed=training.seed,
        process_index=training.process_index,
        num_processes=training.world_size,
        gather=gather,
    )
    general = None
    if rows.general is not None and training.process_index == 0:
        general = RetentionRun(rows.general, tokenizer, batch_size=answer.batch_size)
    tuned = answer.tuned()
    base, retention = ask_base(answer, general, tuning, answers_rows=data.compare_base)
    if training.process_index > 0:
        return ""
    answer.write_results(tuned, base, retention)
    scored = str(output_dir) if training.do_train else tuning.checkpoint or tuning.weights
    info = read_tuned_info(scored)
    report = ReportData(
        title=f"ChatGLM {METHODS[training.tuning or PTUNING]}",
        made_at=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        model=str(arguments.model.model_name_or_path),
        prefix=scored,
        tuning=training.tuning or PTUNING,
        step=info.step if info else None,
        tuned=tuned.means,
        base=base.means if base else None,
        retention=retention,
        rows=answer.report_rows(tuned, base),
        settings=settings.to_dict() | asdict(decoding),
        log_history=find_log_history(Path(scored), output_dir),
    )
    write_report(output_dir / REPORT_NAME, report)
    logger.info("Rows side by side: %s", output_dir / REPORT_NAME)
    return format_scores_table(report.base, report.tuned)


def ask_base(
    answer: AnswerRun, general: RetentionRun | None, tuning: Tuning, *, answers_rows: bool
) -> tuple[Answers | None, Retention | None]:
    """Return the untouched base's answers to the rows, and what tuning changed in general ones.

    None for what was not asked for, or when the base is not known.
    """
    if tuning.base is None or not (answers_rows or general):
        return None, None
    base = known = None
    with tuning.untuned(answer.model) as untouched:
        if answers_rows:
            base = answer.base(untouched)
        if general is not None:
            known = general.ask_base(untouched)
    if general is None or known is None:
        return base, None
    retention = general.compare(answer.model, known)
    logger.info(retention.line())
    return base, retention


def find_log_history(*folders: Path) -> list[dict[str, Any]]:
    """Return the log history of the first folder that has one."""
    for folder in folders:
        if (folder / TRAINER_STATE_NAME).is_file():
            return load_log_history(folder / TRAINER_STATE_NAME)
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
