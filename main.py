"""Tune ChatGLM, validate it, and score its answers next to those of the untouched base.

Order: flags, output directory, rows, then the model, so that a mistake is reported before anything
heavy happens. torch and transformers are imported once the flags are known to be good, hence the
imports inside functions. Exit codes: `ptuning.train.endings`.
"""

import logging
import os
import sys
import time
from pathlib import Path

from arguments import RunConfig, UsageError, parse_arguments
from ptuning.output import duration, start_logging, use_bars
from ptuning.train.signals import StopRequest

logger = logging.getLogger("main")


def main(argv: list[str]) -> int:
    """Run as asked and return the exit code."""
    is_first = int(os.environ.get("RANK") or 0) == 0
    start_logging(logging.INFO if is_first else logging.WARNING, sys.stdout)  # each line once
    try:
        config = parse_arguments(argv)
    except UsageError as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 2
    with StopRequest() as stop:
        try:
            run(config, stop)
        except (Exception, KeyboardInterrupt) as error:
            stop.ignore()  # torchrun ends the other processes when one fails: each says why first
            from ptuning.train.endings import ending_of

            ending = ending_of(error, config)
            if ending is None:
                raise
            print(f"main.py: {ending.text}", file=sys.stderr)
            return ending.exit_code
    return 0


def run(config: RunConfig, stop: StopRequest) -> None:
    """Read the rows, load the model, then train, validate and score, as far as asked."""
    with stop.deferred(notice=""):  # an interrupted import leaves modules half loaded
        from ptuning.model.cpu.threads import limit_threads
        from ptuning.scoring.answering import score
        from ptuning.train.endings import memory_explained
        from ptuning.train.fit import apply_fit, compile_layers, fit_to_memory, workload_of
        from ptuning.train.processes import (
            check_gpu_is_here,
            launch_notices,
            trainer_arguments,
        )
        from ptuning.train.progress import check_run
        from ptuning.train.rows import check_files, load_rows
        from ptuning.train.run_directory import RunDirectory, fingerprint_rows
        from ptuning.train.tuning import load_model, open_tuning
        from ptuning.tunings.loading import load_tokenizer
        from trainer_seq2seq import Run, Seq2SeqTrainer

    started = time.monotonic()
    use_bars(not config.disable_tqdm)
    arguments = trainer_arguments(config)
    device, num_processes = arguments.device, arguments.world_size
    for notice in (*config.notices, *launch_notices(config, device, num_processes)):
        logger.info(notice)
    check_gpu_is_here(config, device)
    check_run(config)
    tuning = open_tuning(config)
    with RunDirectory(config.output_dir) as directory:
        if config.do_train:
            directory.choose(
                config.settings(),
                requested=config.resume_from_checkpoint,
                overwrite=config.overwrite_output_dir,
            )
        check_files(config)
        tokenizer = load_tokenizer(config.tokenizer_name or tuning.weights, **config.hub)
        with arguments.main_process_first(desc="tokenizing"):
            again = config.overwrite_cache and arguments.local_process_index == 0
            rows = load_rows(config, tokenizer, overwrite_cache=again)
        rows_per_step = config.rows_per_step(num_processes)
        checkpoint = None
        if config.do_train:
            checkpoint = directory.start(
                fingerprint_rows(rows.train), rows_per_step=rows_per_step, processes=num_processes
            )
        limit_threads()
        workload = workload_of(config, device, num_processes)
        with memory_explained("loading the base", workload):
            model = load_model(config, tuning, arguments)
            fit = fit_to_memory(model, workload, rows)
            apply_fit(model, fit, config.checkpointing_options)
        for line in fit.lines():
            logger.info(line)
        context = model.config.max_sequence_length
        for line in rows.warnings(max_length=context, new_tokens=config.new_tokens):
            logger.warning(line)
        workload = fit.settled_workload
        trainer = Seq2SeqTrainer(
            model, arguments, Run(config, tuning, tokenizer, rows, directory, stop, workload)
        )
        if rows.train is not None:
            compile_layers(
                model,
                device,
                wanted=config.torch_compile,
                backend=config.torch_compile_backend,
                mode=config.torch_compile_mode,
                num_tokens=config.tokens_to_train(rows.train.lengths, num_processes),
            )
            trainer.train_and_save(checkpoint)
        if rows.validation is not None and config.do_eval:
            trainer.save_metrics("eval", trainer.evaluate())
        table = ""
        if rows.test is not None:
            with memory_explained("answering", workload):
                table = score(config, tuning, model, tokenizer, rows, batch_size=fit.eval_batch)
    spent = duration(time.monotonic() - started)
    logger.info("Done in %s; everything is in %s", spent, Path(config.output_dir).absolute())
    if table:
        logger.info("\n%s", table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
