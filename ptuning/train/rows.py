"""The tokenized rows of a run: which files it needs, and what became of their rows."""

import logging
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np

from ptuning.data.dataset import (
    DataSummary,
    GenerationDataset,
    NoRows,
    TokenDataset,
    join_rows,
    load_generation_dataset,
    load_training_dataset,
    mix_rows,
)
from ptuning.data.formats import UnknownColumns
from ptuning.data.general_prompts import GeneralPrompts, find_general_prompts, read_general_prompts
from ptuning.data.mixing import FORM, parse_mix
from ptuning.data.raw_file import DataError
from ptuning.data.reading import LeftOut
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.train.processes import num_processes
from ptuning.train.run_config import ROW_FLAGS, RunConfig, UsageError

PART_NAMES = {"train_file": "Training", "validation_file": "Validation"}
Load = Callable[..., tuple[Any, DataSummary]]  # takes a file, row_format= and max_rows=

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
    """Refuse missing data files (UsageError) before anything is downloaded or loaded."""
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
    load = partial(
        load_training_dataset,
        tokenizer=tokenizer,
        cache_dir=Path(config.token_cache_dir) if config.token_cache_dir else None,
        overwrite_cache=overwrite_cache,
    )
    train = validation = test = general = None
    multi_turn = False
    if config.do_train:
        parts = []
        for part, summary in _load_files(config, "train_file", config.max_train_samples, load):
            _require_whole_prompts("--train_file", config, summary)
            multi_turn |= summary.num_with_history > 0
            parts.append(part)
        train = join_rows(parts)
        if config.mix is not None:
            train = _with_general_rows(train, config, load)
        rows_per_step = config.rows_per_step(num_processes())
        epochs, steps = config.num_train_epochs, config.max_steps
        logger.info(steps_line(len(train), rows_per_step, epochs, max_steps=steps))
    if config.validates:
        is_scoring = config.do_predict and not config.do_train
        optional = config.files(_answered(config)) if is_scoring else ()
        limit = config.max_eval_samples
        found = _load_files(config, "validation_file", limit, load, optional=optional)
        parts = [part for part, _ in found]
        validation = join_rows(parts) if parts else None
    if config.do_predict:
        load_prompts = partial(load_generation_dataset, tokenizer=tokenizer)
        found = _load_files(config, _answered(config), config.max_predict_samples, load_prompts)
        test = GenerationDataset([row for part, _ in found for row in part])
        if config.measures_retention:
            path = find_general_prompts(config.general_prompts, config.model_name_or_path)
            try:
                general = read_general_prompts(path)
            except DataError as error:
                raise UsageError(f"--general_prompts: {error}") from error
    return Rows(train, validation, test, general, multi_turn)


def _load_files(
    config: RunConfig, name: str, limit: int | None, load: Load, *, optional: Collection[Path] = ()
) -> Iterator[tuple[Any, DataSummary]]:
    """Yield the dataset and the summary of each file that a flag names, up to limit rows in all.

    A file in `optional` that has nothing to train on is left out.
    """
    for file in config.files(name):
        if limit is not None and limit <= 0:
            return
        try:
            part, summary = load(file, row_format=config.row_format, max_rows=limit)
        except DataError as error:
            if file in optional and isinstance(error, NoRows | UnknownColumns):
                logger.info("no validation loss for %s: no row to compare with", file)
                continue
            raise _explain(name, error, config) from error
        is_prediction = isinstance(part, GenerationDataset)
        _print_summary("Prediction" if is_prediction else PART_NAMES[name], summary)
        yield part, summary
        limit = None if limit is None else limit - summary.num_read


def _explain(name: str, error: DataError, config: RunConfig) -> UsageError:
    """Add the flag that named the file to its error, and where its columns come from."""
    hint = ""
    flags = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in config.argv}
    is_typed = any(flag == "format" or flag.endswith("_column") for flag in flags)
    if isinstance(error, UnknownColumns) and not is_typed:
        columns = config.row_format.named_columns.items()
        said = " ".join(f"{flag} {column}" for flag, column in columns)
        said = said or (f"--format {config.format}" if config.format != "auto" else "")
        if said and config.checkpoint is not None:
            hint = f" ({said} as in training; to have the columns found, type --format auto)"
    elif isinstance(error, UnknownColumns) and config.do_train and name != "train_file":
        hint = (
            " (Flags that name columns are for every file of the run; python -m ptuning data "
            "convert gives files the same columns.)"
        )
    return UsageError(f"--{name}: {error}{hint}")


def _require_whole_prompts(
    flag: str, config: RunConfig, summary: DataSummary, *, named_by_mix: bool = False
) -> None:
    """Refuse rows whose prompts are equal only because a filled column is unused."""
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


def _with_general_rows(task: TokenDataset, config: RunConfig, load: Load) -> TokenDataset:
    """Mix the rows of --mix into those of the task."""
    source = parse_mix(str(config.mix))
    of_task = replace(config.row_format, source_prefix="")
    columns: dict[str, Any] = {name: None for name in ROW_FLAGS if name.endswith("_column")}
    roles = ("prompt_column", "response_column", "history_column")
    columns |= zip(roles, source.columns, strict=False)
    own = replace(of_task, format="auto", **columns)
    formats = [own] if source.columns else [own, of_task]
    for row_format in formats:
        try:
            general, summary = load(source.path, row_format=row_format)
            break
        except UnknownColumns as error:
            if row_format is formats[-1]:
                raise UsageError(
                    f"--mix: {error} (Name its own columns after the ratio: {FORM}.)"
                ) from error
        except DataError as error:
            raise UsageError(f"--mix: {error}") from error
    _print_summary("General", summary)
    _require_whole_prompts("--mix", config, summary, named_by_mix=bool(source.columns))
    rows = mix_rows(task, general, share=source.share, seed=config.seed)
    num_general = len(rows) - len(task)
    text = "  an epoch has %d task rows and %d general rows (%.1f %%)"
    logger.info(text, len(task), num_general, 100 * num_general / len(rows))
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


def _print_summary(part: str, summary: DataSummary) -> None:
    logger.info("%s rows: %s", part, summary.source)
    for line in summary.lines():
        logger.info("  %s", line)
