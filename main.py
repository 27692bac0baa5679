"""Tune ChatGLM, validate it, and score its answers next to those of the untouched base.

Order: flags, output directory, rows, then the model, so that a mistake is reported before anything
heavy happens. torch and transformers are imported only once the flags are known to be good, hence
the imports inside functions. Exit codes: `ptuning.train.faults.endings`.
"""

import logging
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import RunConfig, UsageError, parse_arguments
from ptuning.train.resume.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from ptuning.data.tokenizer import ChatGLMTokenizer
    from ptuning.model.chatglm import ChatGLMForConditionalGeneration
    from ptuning.train.memory.fit import Fit
    from ptuning.train.rows import Rows
    from ptuning.train.tunings.tuning import Tuning

logger = logging.getLogger("main")


def main(argv: list[str]) -> int:
    """Run as asked and return the exit code."""
    level = logging.WARNING if int(os.environ.get("RANK") or 0) else logging.INFO  # printed once
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stdout)
    config = None
    try:
        with StopRequest() as stop:
            config = parse_arguments(argv)
            run(config, stop)
    except UsageError as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        if config is None and isinstance(error, Stopped):
            return error.exit_code
        from ptuning.train.faults.endings import ending_of

        ending = None if config is None else ending_of(error, config)
        if ending is None:
            raise
        print(f"main.py: {ending.text}", file=sys.stderr)
        return ending.exit_code
    return 0


def run(config: RunConfig, stop: StopRequest) -> None:
    """Read the rows, load the model, then train, validate and score, as far as asked."""
    from transformers import set_seed

    import ptuning  # noqa: F401  # registers the model and its tokenizer with transformers
    from ptuning.model.cpu_threads import limit_threads
    from ptuning.train.base_model import load_tokenizer
    from ptuning.train.memory.fit import fit_to_memory
    from ptuning.train.processes.launch import check_gpu_is_here, launch_notices, trainer_arguments
    from ptuning.train.progress import check_reporting
    from ptuning.train.resume.run_directory import RunDirectory
    from ptuning.train.rows import load_rows
    from ptuning.train.tunings.tuning import open_tuning
    from trainer_seq2seq import Seq2SeqTrainer

    started = time.monotonic()
    arguments = trainer_arguments(config)
    device = arguments.device
    for notice in (*config.notices, *launch_notices(config, device, arguments.world_size)):
        logger.info(notice)
    check_gpu_is_here(config, device)
    check_reporting(config)
    tuning = open_tuning(config)
    with RunDirectory(Path(config.output_dir), arguments) as directory:
        directory.check(config)
        tokenizer = load_tokenizer(config.tokenizer_name or tuning.weights, **config.hub)
        with arguments.main_process_first(desc="tokenizing"):
            is_first = arguments.local_process_index == 0
            rows = load_rows(config, tokenizer, overwrite_cache=config.overwrite_cache and is_first)
        checkpoint = directory.start(config, rows.train)
        set_seed(config.seed)
        limit_threads()
        model = load_model(config, tuning, device)
        fit = fit_to_memory(model, rows, config)
        if config.do_train or config.do_eval:
            trainer = Seq2SeqTrainer(...)
        if config.do_train:
            trainer.run(checkpoint)
        if config.do_eval:
            trainer.validate()
        table = score_answers(config, tuning, model, tokenizer, rows, fit) if rows.test else ""
    logger.info(
        "Done in %.0f s; everything is in %s", time.monotonic() - started, config.output_dir
    )
    if table:
        logger.info("\n%s", table)
