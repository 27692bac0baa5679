"""Data files to datasets: rows read, encoded and cached, with a summary to print.

Training rows are flat arrays, cached on disk, so that an unchanged file is tokenized once. A cache
file's name is a digest of everything that the tokens depend on: a changed file, tokenizer or
setting finds no cache instead of a wrong one. Rows to answer keep their texts, and no cache.
"""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, compress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.utils.data import Dataset

from ptuning.data.mixing import draw_rows
from ptuning.data.prompts import Example, RowFormat, to_example
from ptuning.data.raw_file import DataError, number_of, unreadable
from ptuning.data.reading import FileRows, read_rows
from ptuning.data.tokenization import IGNORED_LABEL, to_generation_batch, to_training_batch
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.output import Progress
from ptuning.storage import write_atomically

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3  # of the cache; raise it when the same settings give other tokens
Item = TypeVar("Item")
CHUNK_ROWS = 1000  # rows tokenized between two steps of the progress bar


class TokenArrays(NamedTuple):
    """All rows end to end: row i is ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray  # int32, one per token
    offsets: np.ndarray  # int64, one more than rows
    context_lengths: np.ndarray  # int32, the index of <sop> in each row


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Training rows over flat arrays, which may be memory-mapped."""

    def __init__(self, arrays: TokenArrays) -> None:
        """Keep the arrays; nothing is copied."""
        self.arrays = arrays

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.arrays.context_lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return input_ids and labels (-100 before `<sop>`), each (S,)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} is asked for; there are {len(self)}.")
        index %= len(self)
        start, end = self.arrays.offsets[index : index + 2]
        input_ids = torch.from_numpy(self.arrays.ids[start:end].astype(np.int64))  # (S,)
        labels = input_ids.clone()
        labels[: int(self.arrays.context_lengths[index])] = IGNORED_LABEL
        return {"input_ids": input_ids, "labels": labels}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.arrays.offsets)


class GenerationRow(NamedTuple):
    """One row to answer: its prompt as ids and as text, the expected answer, its line in the file.

    A row without a prompt has no ids and is not answered; with the label "" it is not scored.
    """

    input_ids: list[int]
    prompt: str
    label: str
    line: int


class GenerationDataset(list[GenerationRow]):
    """Rows to answer, in the order of the file."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt, control tokens included."""
        return np.array([len(row.input_ids) for row in self], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What became of a file's rows; `lines` says it in words."""

    source: str
    heading: str  # how many rows were read and kept
    found: list[str]  # what reading found, see FileRows.lines
    num_read: int  # rows of the file
    num_kept: int
    max_source_length: int
    max_target_length: int | None = None  # None: prompts only
    left_out: tuple[str, int, str] | None = None  # a reading.LeftOut, as JSON has it
    num_with_history: int = 0
    num_labelled: int = 0  # rows with an answer to compare with
    prompts_cut: int = 0
    answers_cut: int = 0
    control_text_rows: int = 0  # rows that write out a control token; encoded as plain text
    total_tokens: int = 0
    answer_tokens: int = 0  # those with a label: <sop>, the answer, <eop>
    longest: int = 0  # tokens
    from_cache: bool = False

    def lines(self) -> list[str]:
        """Return the summary for printing, with what to change where something was lost."""

        def share(count: int) -> str:
            return f"{number_of(count, 'row')} ({count / self.num_kept:.1%})"

        cached = " (tokens from the cache)" if self.from_cache else ""
        lines = [f"{self.source}: {self.heading}{cached}", *(f"  {line}" for line in self.found)]
        prompts_only = self.max_target_length is None
        answers = "" if prompts_only else f", {self.answer_tokens} of them in answers"
        mean_length = self.total_tokens / self.num_kept
        lines.append(
            f"  {'prompts' if prompts_only else 'rows'} of {mean_length:.1f} tokens on "
            f"average, {self.longest} at most; {self.total_tokens} tokens in all{answers}"
        )
        if prompts_only and not self.num_labelled:
            lines.append("  no row has an answer to compare with, so nothing is scored")
        elif prompts_only and self.num_labelled < self.num_kept:
            scored = share(self.num_labelled)
            lines.append(f"  {scored} with an answer to compare with: the scores cover only these")
        source, target = self.max_source_length, self.max_target_length
        for count, remark in (
            (self.prompts_cut, f"the prompt cut: raise --max_source_length above {source}"),
            (self.answers_cut, f"the answer cut: raise --max_target_length above {target}"),
            (
                self.control_text_rows,
                "a control token such as <eop> written out: it is read as plain text",
            ),
        ):
            if count:
                lines.append(f"  {share(count)} with {remark}")
        return lines


class NoRows(DataError):
    """A file of which no row is left."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector for a block or, as a decorator, for a function.

    Reading allocates lists and tuples by the million but no cycles, and each collection would walk
    them all, and torch's objects too, to free nothing: a third of the tokenizing time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@collector_paused()
def load_training_dataset(
    path: Path | str,
    tokenizer: ChatGLMTokenizer,
    row_format: RowFormat,
    *,
    max_rows: int | None = None,
    cache_dir: Path | None = None,
    overwrite_cache: bool = False,
) -> tuple[TokenDataset, DataSummary]:
    """Read, check and encode a file for training, or take its tokens from the cache.

    max_rows None takes every row; cache_dir None is `default_cache_dir()`. overwrite_cache is for a
    cache that is doubted; a changed file has another cache anyway.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
    settings = {
        "file": digest,
        "suffix": [suffix.lower() for suffix in path.suffixes[-2:]],  # .json.gz
        "tokenizer": tokenizer.fingerprint,
        "max_rows": max_rows,
        **asdict(row_format),
    }
    cache_file = cache_path(cache_dir or default_cache_dir(), path.stem, settings)
    cached = None if overwrite_cache else load_tokens(cache_file, str(path))
    if cached is not None:
        return cached
    rows = read_rows(path, row_format, max_rows=max_rows)
    found = replace(row_format, format="auto", history_column=rows.layout.history)
    examples = [to_example(row, found) for row in rows.kept]
    encoded = [
        row
        for chunk in in_chunks(examples, f"tokenizing {path.name}")
        for row in to_training_batch(
            tokenizer,
            chunk,
            max_source_length=row_format.max_source_length,
            max_target_length=row_format.max_target_length,
            recipe=row_format.recipe,
        )
    ]
    # A row of zero-width spaces has no token between <sop> and <eop>.
    has_answer = [row.answer_cut or len(row.input_ids) - row.context_length > 2 for row in encoded]
    where = rows.layout.response or rows.layout.conversation
    _keep_only(path, rows, has_answer, f'no token in "{where}"')
    examples = list(compress(examples, has_answer))
    encoded = list(compress(encoded, has_answer))
    offsets = np.cumsum([0, *(len(row.input_ids) for row in encoded)], dtype=np.int64)
    ids = chain.from_iterable(row.input_ids for row in encoded)
    contexts = np.array([row.context_length for row in encoded], dtype=np.int32)
    arrays = TokenArrays(np.fromiter(ids, np.int32, int(offsets[-1])), offsets, contexts)
    dataset = TokenDataset(arrays)
    summary = DataSummary(
        source=str(path),
        heading=rows.heading(len(encoded), "kept"),
        found=rows.lines(left_out="dropped"),
        num_read=rows.num_read,
        num_kept=len(encoded),
        max_source_length=row_format.max_source_length,
        max_target_length=row_format.max_target_length,
        left_out=rows.left_out,
        num_with_history=sum(bool(row.history) for row in rows.kept),
        num_labelled=len(encoded),
        prompts_cut=sum(row.prompt_cut for row in encoded),
        answers_cut=sum(row.answer_cut for row in encoded),
        control_text_rows=_count_control_text(tokenizer, examples),
        total_tokens=len(arrays.ids),
        answer_tokens=len(arrays.ids) - int(contexts.sum()),
        longest=int(dataset.lengths.max()),
    )
    save_tokens(cache_file, arrays, summary)
    return dataset, summary


@collector_paused()
def load_generation_dataset(
    path: Path | str,
    tokenizer: ChatGLMTokenizer,
    row_format: RowFormat,
    *,
    max_rows: int | None = None,
) -> tuple[GenerationDataset, DataSummary]:
    """Read, check and encode the prompts of a file to be answered, keeping the texts.

    The dataset has every row of the file in order, with or without an answer to compare with; a
    conversation is one row per answer.
    """
    path = Path(path)
    rows = read_rows(path, row_format, max_rows=max_rows, for_training=False)
    all_rows = rows.kept
    examples = [to_example(row, row_format, for_training=False) for row in all_rows]
    has_prompt = [bool(row.prompt.strip()) for row in all_rows]
    where = rows.layout.conversation or rows.layout.prompt
    _keep_only(path, rows, has_prompt, f'no prompt in "{where}"')
    asked = list(compress(examples, has_prompt))
    prompts: list[list[int]] = []
    prompts_cut = 0
    for chunk in in_chunks(asked, f"tokenizing {path.name}"):
        ids, cuts = to_generation_batch(
            tokenizer,
            chunk,
            max_source_length=row_format.max_source_length,
            recipe=row_format.recipe,
        )
        prompts += ids
        prompts_cut += sum(cuts)
    found = iter(prompts)
    dataset = GenerationDataset(
        [
            GenerationRow(next(found) if has else [], example.prompt, example.response, row.line)
            for has, example, row in zip(has_prompt, examples, all_rows, strict=True)
        ]
    )
    summary = DataSummary(
        source=str(path),
        heading=rows.heading(len(asked), "to answer"),
        found=rows.lines(left_out="not answered"),
        num_read=rows.num_read,
        num_kept=len(asked),
        num_labelled=sum(bool(example.response.strip()) for example in asked),
        max_source_length=row_format.max_source_length,
        prompts_cut=prompts_cut,
        control_text_rows=_count_control_text(tokenizer, asked),
        total_tokens=int(dataset.lengths.sum()),
        longest=int(dataset.lengths.max()),
    )
    return dataset, summary


def _keep_only(path: Path, rows: FileRows, is_kept: Sequence[bool], reason: str) -> None:
    """Drop the other rows for a reason; NoRows if none is left."""
    dropped = [row.line for row, kept in zip(rows.kept, is_kept, strict=True) if not kept]
    if dropped:
        rows.dropped[reason] = dropped
    rows.kept = list(compress(rows.kept, is_kept))
    if not rows.kept:
        reasons = ", ".join(f"{len(lines)} x {reason}" for reason, lines in rows.dropped.items())
        message = f"no row is left of {rows.num_made}: {reasons}; fill those fields."
        raise NoRows(path, None, message)


def in_chunks(items: list[Item], title: str) -> Iterator[list[Item]]:
    """Yield the items in parts of CHUNK_ROWS, moving a progress bar."""
    with Progress(len(items), title, leave=False) as progress:
        for start in range(0, len(items), CHUNK_ROWS):
            chunk = items[start : start + CHUNK_ROWS]
            yield chunk
            progress.update(len(chunk))


def _count_control_text(tokenizer: ChatGLMTokenizer, examples: list[Example]) -> int:
    return sum(
        tokenizer.names_control_token(example.prompt)
        or tokenizer.names_control_token(example.response)
        for example in examples
    )


# Mixing


def mix_rows(task: TokenDataset, general: TokenDataset, *, share: float, seed: int) -> TokenDataset:
    """Return the rows of the task, then as many general rows as make up share of all.

    If more are needed than there are, all are taken as often as they fit in, and the rest is drawn.
    At least one general row is taken.
    """
    wanted = max(1, round(len(task) * share / (1 - share)))
    rounds, drawn = draw_rows(len(general), wanted, Random(seed))
    return join_rows([task, general], [None, [*range(len(general))] * rounds + sorted(drawn)])


def join_rows(
    parts: Sequence[TokenDataset], chosen: Sequence[Sequence[int] | None] | None = None
) -> TokenDataset:
    """Return the chosen rows of each part, end to end; None chooses all."""
    if len(parts) == 1 and chosen is None:
        return parts[0]  # memory-mapped as it is
    ids: list[np.ndarray] = []
    context_lengths = []
    for part, indices in zip(parts, chosen or [None] * len(parts), strict=True):
        arrays = part.arrays
        rows = np.asarray(range(len(part)) if indices is None else indices, dtype=np.int64)
        bounds = zip(arrays.offsets[rows], arrays.offsets[rows + 1], strict=True)
        ids += [arrays.ids[start:end] for start, end in bounds]
        context_lengths.append(arrays.context_lengths[rows])
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return TokenDataset(TokenArrays(np.concatenate(ids), offsets, np.concatenate(context_lengths)))


# The token cache


def default_cache_dir() -> Path:
    """Return `$PTUNING_CACHE`, or `~/.cache/ptuning/tokens` if that is not set."""
    return Path(os.environ.get("PTUNING_CACHE") or "~/.cache/ptuning/tokens").expanduser()


def cache_path(cache_dir: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Return the cache file of tokens made under these settings; name is for human readers."""
    content = json.dumps({"format": FORMAT_VERSION, **settings}, sort_keys=True)
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    return cache_dir / f"{name}-{digest[:32]}.safetensors"


def load_tokens(path: Path, source: str) -> tuple[TokenDataset, DataSummary] | None:
    """Return the memory-mapped rows of a file named source; None without a usable cache."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # only "pt" maps the memory
            arrays = TokenArrays(*(file.get_tensor(name).numpy() for name in TokenArrays._fields))
            notes = json.loads(file.metadata()["notes"])
        if notes.keys() != {item.name for item in fields(DataSummary)} - _NOT_CACHED:
            raise ValueError("it has other notes than expected")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning("the token cache %s is corrupt (%s) and will be rebuilt", path, error)
        return None
    return TokenDataset(arrays), DataSummary(source=source, from_cache=True, **notes)


_NOT_CACHED = {"source", "from_cache"}  # fields of the summary that say where the file is today


def save_tokens(path: Path, arrays: TokenArrays, summary: DataSummary) -> None:
    """Write rows and summary atomically; on failure warn and continue without a cache."""
    notes = {name: value for name, value in asdict(summary).items() if name not in _NOT_CACHED}
    try:
        write_atomically(path, save(arrays._asdict(), metadata={"notes": json.dumps(notes)}))
    except OSError as error:
        logger.warning(
            "tokens cannot be kept in %s (%s), so the next run tokenizes again; "
            "set PTUNING_CACHE to a folder that can be written",
            path.parent,
            error,
        )
