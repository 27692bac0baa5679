"""`python -m ptuning data convert SRC... --out ROWS.jsonl`: any known format to the row contract.

Nothing is written before all of it is known: an interrupted conversion leaves no file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ptuning.commands.data import named_models, row_format_of
from ptuning.data.checking.lengths import (
    ANSWER_RESERVE,
    PROMPT_RESERVE,
    as_percent,
    length_values,
    number_of,
    sides_of,
    table_lines,
)
from ptuning.data.conversion import (
    ContractRow,
    Conversion,
    convert_file,
    largest_total,
    mix_files,
    number_repeats,
    parse_shares,
)
from ptuning.data.formats import NoAnswers
from ptuning.data.mixing import MixSource
from ptuning.data.parsing import write_json
from ptuning.data.prompts import RowFormat, TextRow, to_example
from ptuning.data.reading import as_places, find_files
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.output import Progress
from ptuning.storage import write_atomically
from ptuning.tunings.loading import NANO_DIR, load_tokenizer

CHUNK_ROWS = 1000  # rows encoded between two steps of the progress bar
OUT_SUFFIXES = (".jsonl", ".json")
COLUMN_FLAGS = ("prompt_column", "input_column", "response_column", "history_column")


def run(arguments: argparse.Namespace) -> int:
    """Convert, report, write, and return 0, or with --strict 1 where a row was rejected."""
    row_format = row_format_of(arguments)
    mixed = _mixed(arguments)
    paths = [source.path for source in mixed] or _source_files(arguments.files)
    _check_out(arguments.out, paths, overwrite=arguments.overwrite)
    name = next(iter(named_models(arguments).values()), None)
    files = []
    for path in paths:
        try:
            file = convert_file(
                path,
                row_format,
                template=arguments.template,
                keep_unanswered=arguments.keep_unanswered,
            )
        except NoAnswers as error:
            raise ValueError(f"{error} --keep_unanswered converts them as they are.") from error
        _say(*_file_lines(file))
        files.append(file)
    if not arguments.allow_repeated_prompts:
        _require_whole_prompts(files, mixed=bool(mixed))
    if mixed:
        shares = [source.share for source in mixed]
        rows = _mix(files, shares, total=arguments.total, seed=arguments.seed)
    else:
        rows = [row for file in files for row in file.rows]
    if not rows:
        raise ValueError(_no_rows(arguments, files))
    repeats = number_repeats(rows)
    if repeats:
        _say(
            f"{number_of(len(repeats), 'id')} of several rows: the later ones end in +1, +2 and so "
            f"on ({', '.join(repeats[:5])}{', ...' if len(repeats) > 5 else ''})"
        )
    lengths = _count_tokens(load_tokenizer(name or str(NANO_DIR)), rows)
    _say("", *_length_lines(lengths, rows, row_format, name or "the embedded nano model"))
    lines = "".join(write_json(row) + "\n" for row in rows)
    # half of a surrogate pair, which meta may hold, becomes its escape, which JSON has too
    write_atomically(arguments.out, lines.encode("utf-8", "backslashreplace"))
    num_rejected = sum(file.num_rejected for file in files)
    _say(f"wrote {number_of(len(rows), 'row')} to {arguments.out}, {num_rejected:,} rejected")
    if not any(row["response"].strip() for row in rows):
        _say(f"answer it: --do_predict --test_file {arguments.out}")
    else:
        others = " (convert the validation file too)" if row_format.named_columns else ""
        _say(f"train on it: --train_file {arguments.out}{others}")
    return int(arguments.strict and num_rejected > 0)


def _mixed(arguments: argparse.Namespace) -> list[MixSource]:
    """Return the sources of --mix, [] without it; refuse flags that do not go with it."""
    if arguments.mix is None:
        if not arguments.files:
            raise ValueError("no file is given; give files, or --mix FILE:SHARE,FILE:SHARE.")
        if arguments.total is not None:
            raise ValueError(
                f"--total is {arguments.total}, and only --mix draws rows; add --mix, or leave it "
                "out."
            )
        return []
    if arguments.files:
        raise ValueError(
            f"--mix names the files itself, and {arguments.files[0]} is given too; leave it out."
        )
    if arguments.total is not None and arguments.total < 1:
        raise ValueError(f"--total is {arguments.total}; use 1 or more, or leave it out.")
    for flag in COLUMN_FLAGS:
        if getattr(arguments, flag) is not None:
            raise ValueError(
                f"--mix finds the columns of each of its files, and --{flag} is "
                f"{getattr(arguments, flag)}; convert that file first, then mix what you get."
            )
    return parse_shares(arguments.mix)


def _source_files(given: Sequence[str]) -> list[Path]:
    """Return the files that names and patterns stand for, each once."""
    return list(dict.fromkeys(path for name in given for path in find_files(name)))


def _check_out(out: Path, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse a file to write that is one of those to read, or there already."""
    if out.suffix.lower() not in OUT_SUFFIXES:
        raise ValueError(f"--out is {out}; give a name that ends in .jsonl: rows are JSON lines.")
    if out.is_dir():
        raise ValueError(f"--out is {out}, a folder; give the name of a file.")
    if out.parent.exists() and not out.parent.is_dir():
        raise ValueError(f"--out is {out}, and {out.parent} is a file; name a folder before it.")
    if not out.exists():
        return
    for path in paths:
        if path.exists() and path.samefile(out):
            raise ValueError(f"--out is {out}, which is read as well; give another name.")
    if not overwrite:
        raise ValueError(
            f"--out is {out}, which is there already; give another name, or add --overwrite."
        )


def _require_whole_prompts(files: Sequence[Conversion], *, mixed: bool) -> None:
    """Refuse rows whose prompts are alike only because a filled column is not used."""
    for file in files:
        found = file.read.left_out
        if found is not None:
            remedy = found.remedy
            if mixed and found.flags:
                remedy = f"convert that file first: {file.path} --out NAME.jsonl {found.flags}"
            raise ValueError(
                f"{file.path}: {found}; {remedy}, or convert all the same with "
                "--allow_repeated_prompts."
            )


def _mix(
    files: Sequence[Conversion], shares: Sequence[float], *, total: int | None, seed: int
) -> list[ContractRow]:
    """Draw the mixture and say what each file gave."""
    for file in files:
        if not file.rows:
            raise ValueError(f"--mix: {file.path}: no row of it can be used; leave it out.")
    sizes = [len(file.rows) for file in files]
    most = largest_total(sizes, shares)
    if total is None:
        total = most
    rows, counts = mix_files([file.rows for file in files], shares, total=total, seed=seed)
    _say(f"mixture of {number_of(total, 'row')}, seed {seed}; without repeats at most {most:,}")
    for file, size, count in zip(files, sizes, counts, strict=True):
        rounds, more = divmod(count, size)
        how = ""
        if count > size:
            how = ": each once" if rounds == 1 else f": each {rounds} times"
            how += f", {more:,} of them once more" if more else ""
        _say(f"  {count:,} ({as_percent(count / total)}) of the {size:,} of {file.path}{how}")
    return rows


def _no_rows(arguments: argparse.Namespace, files: Sequence[Conversion]) -> str:
    """Say that nothing is left, and what would keep rows."""
    reasons = ", ".join(
        f"{len(places)} x {reason}"
        for file in files
        for reason, places in file.read.dropped.items()
    )
    more = "" if arguments.keep_unanswered else "; --keep_unanswered keeps rows without an answer"
    reasons = reasons.replace(".,", ",").rstrip(".")
    return f"nothing is written: no row could be converted: {reasons}{more}."


def _count_tokens(tokenizer: ChatGLMTokenizer, rows: Sequence[ContractRow]) -> np.ndarray:
    """Return the tokens of prompt and answer of each row, (rows, 2); a history is in the prompt."""
    lengths: list[int] = []
    with Progress(len(rows), "counting tokens", leave=False) as progress:
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            texts = [text for row in chunk for text in (_trained_prompt(row), row["response"])]
            lengths += map(len, tokenizer.encode_batch(texts))
            progress.update(len(chunk))
    return np.array(lengths, dtype=np.int32).reshape(-1, 2)


def _trained_prompt(row: ContractRow) -> str:
    history = tuple((question, answer) for question, answer in row["history"])
    return to_example(TextRow(1, row["prompt"], row["response"], history), RowFormat()).prompt


# Text


def _file_lines(file: Conversion) -> list[str]:
    """Say what a file became, in the words of training."""
    read = file.read
    lines = [f"{file.path}: {read.heading(len(file.rows), 'converted')}"]
    lines += [f"  {line}" for line in read.lines(left_out="rejected", most=None)]
    if read.unused:
        lines.append("  the values of columns that are not used are kept in meta")
    if file.placeholders:
        found = [
            f"{name} in {number_of(len(places), 'row')} ({as_places(places, read.unit)})"
            for name, places in file.placeholders.items()
        ]
        lines.append(f"  placeholders that were not filled in? {', '.join(found)}")
    return lines


def _length_lines(
    lengths: np.ndarray, rows: Sequence[ContractRow], row_format: RowFormat, tokenizer: str
) -> list[str]:
    """Return a table of lengths and cuts, and what the given lengths would truncate."""
    source, target = row_format.max_source_length, row_format.max_target_length
    is_answered = np.array([bool(row["response"].strip()) for row in rows])
    answers = lengths[is_answered, 1]
    sides = [side for side in sides_of(row_format, lengths[:, 0], answers) if len(side.lengths)]
    lines = [f"tokens are those of {tokenizer}", *table_lines(length_values(sides))]
    prompt_cut = lengths[:, 0] > source - PROMPT_RESERVE
    answer_cut = lengths[:, 1] > target - ANSWER_RESERVE
    either = int((prompt_cut | answer_cut).sum())
    lines.append(
        f"  --max_source_length {source} --max_target_length {target} would truncate "
        f"{_share(int(prompt_cut.sum()), len(rows), 'prompt')}, "
        f"{_share(int(answer_cut.sum()), len(answers), 'answer')}; "
        f"{_share(either, len(rows), 'row')} with either"
    )
    num_silent = int((answers == 0).sum())
    if num_silent:
        lines.append(
            f"  {number_of(num_silent, 'row')} with an answer of no token: training leaves them out"
        )
    return lines


def _share(count: int, total: int, noun: str) -> str:
    return f"{number_of(count, noun)} ({as_percent(count / total if total else 0)})"


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
