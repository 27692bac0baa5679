"""Tokenisation speed: a file of rows to token arrays, end to end, compared with the published code.

    python -m benchmarks.data [--rows_file FILE] [--tokenizer DIR] [--json FILE]

`cold` reads and checks the file, tokenises it and writes the cache; `cached` reads the cache.
`published` is the published preprocessing: row by row through the tokenizer, truncated, and padded
to 128 tokens with labels. In rows per second; a file with fewer than --rows rows is repeated with
numbers added, so that all rows differ.
"""

import json
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.row_lengths import MAX_LENGTH
from benchmarks.setting import ROOT, json_file, machine, refuse_below_one, write_json
from ptuning.data.dataset import load_training_dataset
from ptuning.data.prompts import RowFormat
from ptuning.data.reading import read_rows
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.tunings.loading import NANO_DIR

PROMPT, RESPONSE = "content", "summary"
ROW_FORMAT = RowFormat(
    prompt_column=PROMPT,
    response_column=RESPONSE,
    max_source_length=MAX_LENGTH,
    max_target_length=MAX_LENGTH,
)
RECIPES = ("cold", "cached", "published")


def write_rows(source: Path, target: Path, count: int) -> list[tuple[str, str]]:
    """Write `count` rows: those of source, then numbered copies; return their texts."""
    found = read_rows(source, ROW_FORMAT).kept
    texts = [(row.prompt, row.response) for row in found]
    rows = []
    for index in range(count):
        prompt, response = texts[index % len(texts)]
        rows.append((prompt, response if index < len(texts) else f"{response}{index}"))
    with target.open("w", encoding="utf-8") as file:
        for prompt, response in rows:
            file.write(json.dumps({PROMPT: prompt, RESPONSE: response}, ensure_ascii=False) + "\n")
    return rows


def load(file: Path, tokenizer: ChatGLMTokenizer, cache: Path, *, fresh: bool) -> int:
    """Load the file as main.py does and return its row count; fresh ignores the cache."""
    dataset, _ = load_training_dataset(
        file,
        tokenizer,
        ROW_FORMAT,
        cache_dir=cache,
        overwrite_cache=fresh,
    )
    return len(dataset)


def preprocess_as_published(
    rows: Sequence[tuple[str, str]], tokenizer: ChatGLMTokenizer
) -> tuple[list[list[int]], list[list[int]]]:
    """Return input ids and labels of every row, padded to 128 tokens, row by row."""
    pad_id, length = tokenizer.pad_token_id, 2 * MAX_LENGTH
    all_ids, all_labels = [], []
    for prompt, response in rows:
        context = tokenizer.encode(prompt, add_special_tokens=False)[: MAX_LENGTH - 1]
        answer = tokenizer.encode(response, add_special_tokens=False)[: MAX_LENGTH - 2]
        ids = tokenizer.build_inputs_with_special_tokens(context, answer)
        missing = length - len(ids)
        labels = [-100] * (len(context) + 1) + ids[len(context) + 1 :] + [-100] * missing
        all_ids.append(ids + [pad_id] * missing)
        all_labels.append(labels)
    return all_ids, all_labels


def rows_per_s(work: Callable[[], object], num_rows: int, repeats: int) -> float:
    """Run work `repeats` times and return the median rows per second."""
    speeds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        speeds.append(num_rows / (time.perf_counter() - started))
    return statistics.median(speeds)


def measure(flags: Namespace, folder: Path) -> dict[str, float]:
    """Return the rows per second of every way."""
    tokenizer = ChatGLMTokenizer.from_pretrained(flags.tokenizer)
    file, cache = folder / "rows.jsonl", folder / "cache"
    rows = write_rows(Path(flags.rows_file), file, flags.rows)
    load(file, tokenizer, cache, fresh=True)  # warms up, and fills the cache
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "cold": (lambda: load(file, tokenizer, cache, fresh=True), len(rows)),
        "cached": (lambda: load(file, tokenizer, cache, fresh=False), len(rows)),
    }
    some = rows[: flags.published_rows]
    ways["published"] = (lambda: preprocess_as_published(some, tokenizer), len(some))
    return {
        name: rows_per_s(work, num_rows, flags.repeats)
        for name, (work, num_rows) in ways.items()
        if name in flags.recipe
    }


def parse(argv: list[str]) -> Namespace:
    """Read the flags; counts below 1 are refused."""
    parser = ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument(
        "--rows_file", default=str(ROOT / "AdvertiseGen/sample/train.json"), help="rows to tokenise"
    )
    parser.add_argument("--tokenizer", default=str(NANO_DIR), help="folder of the tokenizer")
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        help="what to measure; unset measures all",
    )
    parser.add_argument("--rows", type=int, default=20000, help="rows of the file")
    parser.add_argument("--published_rows", type=int, default=2000, help="rows taken one by one")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--json", type=json_file, help="write the figures here too")
    flags = parser.parse_args(argv)
    refuse_below_one(parser, flags, "rows", "published_rows", "repeats")
    return flags


def main(argv: list[str]) -> int:
    """Print the table."""
    flags = parse(argv)
    with tempfile.TemporaryDirectory(prefix="ptuning-data-") as folder:
        speeds = measure(flags, Path(folder))
    sys.stdout.write(f"{machine()}\n{flags.rows} rows\n{'':<12}{'rows/s':>12}\n")
    for name, speed in speeds.items():
        sys.stdout.write(f"{name:<12}{speed:>12.0f}\n")
    figures: dict[str, object] = {"machine": machine(), "rows_per_s": speeds.get("cold")}
    figures["cached_rows_per_s"] = speeds.get("cached")
    figures["published_rows_per_s"] = speeds.get("published")
    if "cold" in speeds and "published" in speeds:
        figures["ratio"] = speeds["cold"] / speeds["published"]
        sys.stdout.write(f"cold / published: {figures['ratio']:.1f}\n")
    write_json(flags, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
