"""The tokenized rows of a run: which files it needs, and what became of their rows."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np

from ptuning.data.dataset import (
    DataSummary,
    GenerationDataset,
    GenerationRow,
    NoRows,
    TokenDataset,
    join_rows,
    load_generation_dataset,
    load_training_dataset,
    mix_rows,
)
from ptuning.data.formats import UnknownColumns
from ptuning.data.general import GeneralPrompts, find_general_prompts, read_general_prompts
from ptuning.data.mixing import FORM, parse_mix
from ptuning.data.prompts import RowFormat
from ptuning.data.raw_file import DataError
from ptuning.data.reading import LeftOut
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.train.processes import num_processes
from ptuning.train.run_config import RunConfig, UsageError

logger = logging.getLogger("main")


class Rows(NamedTuple):
    """The tokenized rows of a run; None for a part that was not asked for."""

    train: TokenDataset | None
    validation: TokenDataset | None
    test: GenerationDataset | None
    general: GeneralPrompts | None = None
    multi_turn: bool = False  # whether training rows have earlier turns

    def warnings(self, *, max_length: int, new_tokens: int) -> list[str]:
        """Say which rows are too long for a base model of max_length tokens."""
        trained = [] if self.train is None else too_long(self.train.lengths, max_length)
        if self.test is None:
            return trained
        answered = self.test.lengths[self.test.lengths > 0]  # those with a prompt
        return trained + too_long(answered + new_tokens, max_length)


def check_files(config: RunConfig) -> None:
    """Refuse files of rows that do not exist (UsageError), before anything is fetched or loaded."""
    for name, is_read in (
        ("train_file", config.do_train),
        ("validation_file", config.validates),
        (_answered(config), config.do_predict),
    ):
        for file in config.files(name) if is_read else ():
            if not file.exists():
                raise UsageError(
                    f"--{name}: {file}: no such file, seen from {Path.cwd()}; give a file of rows: "
                    ".json, .jsonl, .csv, .tsv or .parquet."
                )


def _answered(config: RunConfig) -> str:
    """Name the flag of the rows to answer."""
    return "test_file" if config.test_file else "validation_file"


def load_rows(config: RunConfig, tokenizer: ChatGLMTokenizer, *, overwrite_cache: bool) -> Rows:
    """Tokenize the files that this run needs and print what became of their rows.

    UsageError, with the flag that named the file, for one that cannot be read.
    """
    train_rows = validation = test = general = None
    multi_turn = False
    if config.do_train:
        parts, multi_turn = _token_rows("train_file", config, tokenizer, overwrite_cache)
        train_rows = join_rows(parts)
        if config.mix is not None:
            train_rows = _with_general_rows(train_rows, config, tokenizer, overwrite_cache)
        rows_per_step = config.rows_per_step(num_processes())
        epochs, steps = config.num_train_epochs, config.max_steps
        logger.info(steps_line(len(train_rows), rows_per_step, epochs, max_steps=steps))
    if config.validates:
        parts, _ = _token_rows("validation_file", config, tokenizer, overwrite_cache)
        validation = join_rows(parts) if parts else None
    if config.do_predict:
        test = _test_rows(config, tokenizer)
        if config.measures_retention:
            base = config.model_name_or_path
            with files_named_as("--general_prompts"):
                general = read_general_prompts(find_general_prompts(config.general_prompts, base))
    return Rows(train_rows, validation, test, general, multi_turn)


def _token_rows(
    name: str, config: RunConfig, tokenizer: ChatGLMTokenizer, overwrite_cache: bool
) -> tuple[list[TokenDataset], bool]:
    """Load the rows of each file of train_file or validation_file; do any have earlier turns?

    Files without answers that are only to be answered are left out of the validation.
    """
    is_training = name == "train_file"
    left = config.max_train_samples if is_training else config.max_eval_samples
    only_answered = (
        [] if config.do_train or not config.do_predict else config.files(_answered(config))
    )
    parts: list[TokenDataset] = []
    multi_turn = False
    for file in config.files(name):
        if left is not None and left <= 0:
            break
        try:
            part, summary = load_training_dataset(
                file,
                tokenizer,
                RowFormat(**config.row_settings),
                max_rows=left,
                overwrite_cache=overwrite_cache,
                cache_dir=Path(config.token_cache_dir) if config.token_cache_dir else None,
            )
        except DataError as error:
            if file in only_answered and isinstance(error, NoRows | UnknownColumns):
                logger.info("no validation loss for %s: no row to compare with", file)
                continue
            raise _said(f"--{name}", error, config) from error
        _print_summary("Training" if is_training else "Validation", summary)
        if is_training:
            _require_whole_prompts("--train_file", config, summary)
        parts.append(part)
        multi_turn |= summary.num_with_history > 0
        left = None if left is None else left - summary.num_read
    return parts, multi_turn


def _said(flag: str, error: DataError, config: RunConfig) -> UsageError:
    """Return a fault of a file with the flag that named it, and where its columns come from."""
    hint = ""
    flags = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in config.argv}
    typed = flags & {name for name in config.row_settings if name.endswith(("_column", "format"))}
    if isinstance(error, UnknownColumns) and not typed:
        named = RowFormat(**config.row_settings).named_columns
        said = " ".join(f"{name} {value}" for name, value in named.items())
        said = said or (f"--format {config.format}" if config.format != "auto" else "")
        if said and config.checkpoint is not None:
            hint = f" ({said} as in training; to have the columns found, type --format auto)"
    elif isinstance(error, UnknownColumns) and config.do_train and flag != "--train_file":
        hint = (
            " (Flags that name columns are for every file of the run; python -m ptuning data "
            "convert gives files the same columns.)"
        )
    return UsageError(f"{flag}: {error}{hint}")


def _require_whole_prompts(
    flag: str, config: RunConfig, summary: DataSummary, *, named_by_mix: bool = False
) -> None:
    """Refuse rows whose prompts are alike only because a filled column is not used."""
    if summary.left_out is None or config.allow_repeated_prompts:
        return
    found = LeftOut(*summary.left_out)
    remedy = found.remedy
    if named_by_mix:
        remedy = "leave the columns out of --mix to have them found"
    elif flag == "--mix" and found.flags:
        remedy = (
            f"make a file that uses it: python -m ptuning data convert {quote(summary.source)} "
            f"--out NAME.jsonl {found.flags}"
        )
    raise UsageError(
        f"{flag}: {summary.source}: {found}; {remedy}, or train all the same with "
        "--allow_repeated_prompts."
    )


def _with_general_rows(
    task: TokenDataset, config: RunConfig, tokenizer: ChatGLMTokenizer, overwrite_cache: bool
) -> TokenDataset:
    """Return the rows of the task together with those of --mix."""
    source = parse_mix(str(config.mix))
    roles = ("prompt_column", "response_column", "history_column")
    settings = {**config.row_settings, "source_prefix": ""}
    own = {name: None for name in settings if name.endswith("_column")} | {"format": "auto"}
    tries = [settings | own, settings]  # the columns that are found, else those of the task
    if source.columns:
        tries = [settings | own | dict(zip(roles, source.columns, strict=False))]
    for attempt in tries:
        try:
            general, summary = load_training_dataset(
                source.path,
                tokenizer,
                RowFormat(**attempt),
                overwrite_cache=overwrite_cache,
                cache_dir=Path(config.token_cache_dir) if config.token_cache_dir else None,
            )
            break
        except UnknownColumns as error:
            if attempt is tries[-1]:
                raise UsageError(
                    f"--mix: {error} (Name its own columns after the ratio: {FORM}.)"
                ) from error
        except DataError as error:
            raise UsageError(f"--mix: {error}") from error
    _print_summary("General", summary)
    _require_whole_prompts("--mix", config, summary, named_by_mix=bool(source.columns))
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
    name, left = _answered(config), config.max_predict_samples
    rows: list[GenerationRow] = []
    for file in config.files(name):
        if left is not None and left <= 0:
            break
        try:
            part, summary = load_generation_dataset(
                file, tokenizer, RowFormat(**config.row_settings), max_rows=left
            )
        except DataError as error:
            raise _said(f"--{name}", error, config) from error
        _print_summary("Prediction", summary)
        rows += part.rows
        left = None if left is None else left - summary.num_read
    return GenerationDataset(rows)


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


def too_long(lengths: np.ndarray, max_length: int) -> list[str]:
    """Say how many rows are longer than those the base model was trained with; [] if none is.

    >>> too_long(np.array([100, 3000]), 2048)[0][:58]
    '1 of 2 rows are longer than the 2,048 tokens that the base'
    >>> too_long(np.array([100, 2048]), 2048)
    []
    """
    count = int((lengths > max_length).sum())
    if not count:
        return []
    return [
        f"{count:,} of {len(lengths):,} rows are longer than the {max_length:,} tokens that the "
        f"base model was trained with, {int(lengths.max()):,} at most: expect poor answers to "
        "them, or lower --max_source_length or --max_target_length"
    ]


@contextmanager
def files_named_as(flag: str) -> Iterator[None]:
    """Say which flag named the file that a DataError is about."""
    try:
        yield
    except DataError as error:
        raise UsageError(f"{flag}: {error}") from error


def _print_summary(part: str, summary: DataSummary) -> None:
    logger.info("%s rows: %s", part, summary.source)
    for line in summary.lines():
        logger.info("  %s", line)
