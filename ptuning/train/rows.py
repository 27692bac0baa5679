"""The tokenized rows of a run: which files it needs, and what became of their rows."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ptuning.data.dataset import (
    GenerationDataset,
    TokenDataset,
    load_generation_dataset,
    load_training_dataset,
)
from ptuning.data.formatting import RowFormat
from ptuning.data.general import GeneralPrompts, find_general_prompts, read_general_prompts
from ptuning.data.mixing import FORM, mix_rows, parse_mix
from ptuning.data.reading import DataError
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.train.config import RunConfig, UsageError
from ptuning.train.processes.launch import num_processes

logger = logging.getLogger("main")


class Rows(NamedTuple):
    """The tokenized rows of a run; None for a part that was not asked for."""

    train: TokenDataset | None
    validation: TokenDataset | None
    test: GenerationDataset | None
    general: GeneralPrompts | None = None


def check_files(config: RunConfig) -> None:
    """Refuse files of rows that do not exist (UsageError), before anything is fetched or loaded."""
    answered = "test_file" if config.test_file else "validation_file"
    for name, is_read in (
        ("train_file", config.do_train),
        ("validation_file", config.validates),
        (answered, config.do_predict),
    ):
        file = getattr(config, name)
        if is_read and not Path(file).exists():
            raise UsageError(
                f"--{name}: {file}: no such file, seen from {Path.cwd()}; give a .json, .jsonl or "
                ".csv file of rows."
            )


def load_rows(config: RunConfig, tokenizer: ChatGLMTokenizer, *, overwrite_cache: bool) -> Rows:
    """Tokenize the files that this run needs and print what became of their rows.

    UsageError, with the flag that named the file, for one that cannot be read.
    """
    train_rows = validation = test = general = None
    if config.do_train:
        train_rows = _training_rows("--train_file", config, tokenizer, overwrite_cache)
        if config.mix is not None:
            train_rows = _with_general_rows(train_rows, config, tokenizer, overwrite_cache)
        rows_per_step = config.rows_per_step(num_processes())
        epochs, steps = config.num_train_epochs, config.max_steps
        logger.info(steps_line(len(train_rows), rows_per_step, epochs, max_steps=steps))
    if config.validates:
        validation = _training_rows("--validation_file", config, tokenizer, overwrite_cache)
    if config.do_predict:
        test = _test_rows(config, tokenizer)
        if config.measures_retention:
            base = config.model_name_or_path
            with files_named_as("--general_prompts"):
                general = read_general_prompts(find_general_prompts(config.general_prompts, base))
    return Rows(train_rows, validation, test, general)


def _training_rows(
    flag: str, config: RunConfig, tokenizer: ChatGLMTokenizer, overwrite_cache: bool
) -> TokenDataset:
    is_training = flag == "--train_file"
    file = str(config.train_file if is_training else config.validation_file)
    with files_named_as(flag):
        rows, summary = load_training_dataset(
            Path(file),
            tokenizer,
            RowFormat(**config.row_settings),
            max_rows=config.max_train_samples if is_training else config.max_eval_samples,
            overwrite_cache=overwrite_cache,
            cache_dir=Path(config.token_cache_dir) if config.token_cache_dir else None,
        )
    _print_summary("Training" if is_training else "Validation", file, summary.lines())
    return rows


def _with_general_rows(
    task: TokenDataset, config: RunConfig, tokenizer: ChatGLMTokenizer, overwrite_cache: bool
) -> TokenDataset:
    """Return the rows of the task together with those of --mix."""
    source = parse_mix(str(config.mix))
    common = {**config.row_settings, "source_prefix": "", **source.named_columns()}
    try:
        general, summary = load_training_dataset(
            source.path,
            tokenizer,
            RowFormat(**common),
            overwrite_cache=overwrite_cache,
            cache_dir=Path(config.token_cache_dir) if config.token_cache_dir else None,
        )
    except DataError as error:
        raise UsageError(
            f"--mix: {error} (Name its own columns after the ratio: {FORM}.)"
        ) from error
    _print_summary("General", str(source.path), summary.lines())
    rows = mix_rows(task, general, share=source.share, seed=config.seed)
    num_general = len(rows) - len(task)
    logger.info(
        "  an epoch has %d task rows and %d general rows (%.1f %%)",
        len(task),
        num_general,
        100 * num_general / len(rows),
    )
    return rows


def _test_rows(config: RunConfig, tokenizer: ChatGLMTokenizer) -> GenerationDataset:
    file = str(config.test_file or config.validation_file)
    with files_named_as("--test_file" if config.test_file else "--validation_file"):
        rows, summary = load_generation_dataset(
            Path(file),
            tokenizer,
            RowFormat(**config.row_settings),
            max_rows=config.max_predict_samples,
        )
    _print_summary("Prediction", file, summary.lines())
    return rows


def steps_line(num_rows: int, rows_per_step: int, epochs: float, *, max_steps: int) -> str:
    """Say how long an epoch is and how much of the data a run sees; max_steps above 0 decides.

    >>> steps_line(114599, 16, 3.0, max_steps=3000)
    '  7163 steps of 16 rows per epoch; this run takes 3000 steps, 0.42 epochs'
    """
    steps = math.ceil(num_rows / rows_per_step)
    total = max_steps if max_steps > 0 else math.ceil(steps * epochs)
    return (
        f"  {steps} steps of {rows_per_step} rows per epoch; "
        f"this run takes {total} steps, {total / steps:.2f} epochs"
    )


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
