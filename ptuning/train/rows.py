"""The tokenised rows of a run: which files it needs, and what became of their rows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer_utils import IntervalStrategy

from ptuning.data.dataset import (
    GenerationDataset,
    TokenDataset,
    load_generation_dataset,
    load_training_dataset,
)
from ptuning.data.general import GeneralPrompts, find_general_prompts, read_general_prompts
from ptuning.data.mixing import FORM, mix_rows, parse_mix
from ptuning.data.reading import DataError
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.train.flags import Arguments, UsageError
from ptuning.train.settings import RunSettings, steps_line

logger = logging.getLogger("main")


class Rows(NamedTuple):
    """The tokenised rows of a run; None where a part was not asked for."""

    train: TokenDataset | None
    validation: TokenDataset | None
    test: GenerationDataset | None
    general: GeneralPrompts | None = None


def load_rows(arguments: Arguments, settings: RunSettings, tokenizer: ChatGLMTokenizer) -> Rows:
    """Tokenise the files that this run needs and print what became of their rows.

    The first process of a machine does it before the others, which find the tokens in the cache.
    UsageError, with the flag that named the file, for one that cannot be read.
    """
    with arguments.training.main_process_first(desc="tokenising"):
        if arguments.training.local_process_index > 0:
            arguments.data.overwrite_cache = False  # it has just been made again
        return _load_rows(arguments, settings, tokenizer)


def _load_rows(arguments: Arguments, settings: RunSettings, tokenizer: ChatGLMTokenizer) -> Rows:
    data, training = arguments.data, arguments.training
    train_rows = validation = test = general = None
    if training.do_train:
        train_rows = _training_rows("Training", "--train_file", arguments, settings, tokenizer)
        if data.mix is not None:
            train_rows = _with_general_rows(train_rows, arguments, settings, tokenizer)
        rows_per_step = training.per_device_train_batch_size * training.world_size
        rows_per_step *= training.gradient_accumulation_steps
        epochs, steps = training.num_train_epochs, training.max_steps
        logger.info(steps_line(len(train_rows), rows_per_step, epochs, max_steps=steps))
    if training.do_eval or (training.do_train and training.eval_strategy != IntervalStrategy.NO):
        if data.validation_file is None:
            raise UsageError(
                f"--eval_strategy is {training.eval_strategy}; give --validation_file too."
            )
        validation = _training_rows(
            "Validation", "--validation_file", arguments, settings, tokenizer
        )
    if training.do_predict:
        test = _test_rows(arguments, settings, tokenizer)
        if data.measure_retention:
            base = arguments.model.model_name_or_path
            with files_named_as("--general_prompts"):
                general = read_general_prompts(find_general_prompts(data.general_prompts, base))
    return Rows(train_rows, validation, test, general)


def _training_rows(
    part: str,
    flag: str,
    arguments: Arguments,
    settings: RunSettings,
    tokenizer: ChatGLMTokenizer,
) -> TokenDataset:
    data = arguments.data
    is_training = flag == "--train_file"
    file = str(data.train_file if is_training else data.validation_file)
    with files_named_as(flag):
        rows, summary = load_training_dataset(
            Path(file),
            tokenizer,
            max_rows=data.max_train_samples if is_training else data.max_eval_samples,
            overwrite_cache=data.overwrite_cache,
            cache_dir=Path(data.token_cache_dir) if data.token_cache_dir else None,
            **settings.to_dict(),
        )
    _print_summary(part, file, summary.lines())
    return rows


def _with_general_rows(
    task: TokenDataset, arguments: Arguments, settings: RunSettings, tokenizer: ChatGLMTokenizer
) -> TokenDataset:
    """Return the rows of the task with those of --mix beside them."""
    data = arguments.data
    source = parse_mix(str(data.mix))
    common = {**settings.to_dict(), "source_prefix": "", **source.named_columns()}
    try:
        general, summary = load_training_dataset(
            source.path,
            tokenizer,
            overwrite_cache=data.overwrite_cache,
            cache_dir=Path(data.token_cache_dir) if data.token_cache_dir else None,
            **common,
        )
    except DataError as error:
        raise UsageError(
            f"--mix: {error} (Columns of its own are named behind the ratio: {FORM}.)"
        ) from error
    _print_summary("General", str(source.path), summary.lines())
    rows = mix_rows(task, general, share=source.share, seed=arguments.training.seed)
    num_general = len(rows) - len(task)
    logger.info(
        "  an epoch has %d rows of the task and %d general rows, %.1f %%",
        len(task),
        num_general,
        100 * num_general / len(rows),
    )
    return rows


def _test_rows(
    arguments: Arguments, settings: RunSettings, tokenizer: ChatGLMTokenizer
) -> GenerationDataset:
    data = arguments.data
    file = str(data.test_file or data.validation_file)
    common: dict[str, Any] = settings.to_dict()
    del common["max_target_length"]  # answers to compare with are cut by AnswerRun
    with files_named_as("--test_file" if data.test_file else "--validation_file"):
        rows, summary = load_generation_dataset(
            Path(file), tokenizer, max_rows=data.max_predict_samples, **common
        )
    _print_summary("Prediction", file, summary.lines())
    return rows


@contextmanager
def files_named_as(flag: str) -> Iterator[None]:
    """Say which flag named the file that a DataError is about."""
    try:
        yield
    except DataError as error:
        raise UsageError(f"{flag}: {error}") from error


def _print_summary(part: str, file: str, lines: list[str]) -> None:
    logger.info("%s rows: %s", part, file)
    for line in lines:
        logger.info("  %s", line)
