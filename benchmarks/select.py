"""Scoring speed of `ptuning select` next to training, on one model and the same rows.

    python -m benchmarks.select [--size small] [--dtype float32] [--quantization_bit 4] [--rows 64]
    python -m benchmarks.select --pool_rows 100000     # cleaning and near-duplicates instead

Training takes optimizer steps of 16 rows; scoring leaves the prefix out. `ifd` scores each row with
its prompt and without, and the tokens of both are counted; `states` keeps the mean hidden state of
the row. Each is repeated in turn, and the median time counts.
The pool is synthetic: invented prompts and answers of 20 to 100 words, half of them Chinese, one in
ten a copy of an earlier row or nearly one.
"""

import json
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from benchmarks.instruct import SEED, synthetic_texts
from benchmarks.memory import peak_bytes
from benchmarks.setting import (
    BenchRow,
    add_common_flags,
    machine,
    make_model,
    make_rows,
    parse_common,
    seconds,
    weights_of,
    write_json,
)
from benchmarks.train import ROWS_PER_STEP, whole_step
from ptuning.data.tokenization import IGNORED_LABEL, TokenizedExample, form_batches
from ptuning.model.cpu.linear import prepack_if_room
from ptuning.select.scores import (
    CPU_BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    mean_losses,
    mean_states,
    without_prompt,
)
from ptuning.select.selection import clean, drop_duplicates, read_pool, remaining
from ptuning.train.fit import keep_freed_memory


def measure(flags: Namespace) -> dict[str, dict[str, float]]:
    """Return the figures of training and of each kind of scoring."""
    model = make_model(flags)
    prepack_if_room(model)
    if flags.device == "cpu":
        keep_freed_memory(True)
    rows = make_rows(flags, model.config, flags.rows)
    encoded = [as_encoded(row) for row in rows]
    default = CPU_BATCH_TOKENS if flags.device == "cpu" else GPU_BATCH_TOKENS
    batch_tokens = flags.batch_tokens or default
    step = whole_step("ours", model)
    encoder = model.prefix_encoder
    assert encoder is not None, "make_model attaches one"
    alone = [without_prompt(row) for row in encoded]
    num_tokens = sum(len(row.input_ids) for row in encoded)

    def train() -> None:
        for start in range(0, len(rows), ROWS_PER_STEP):
            step(rows[start : start + ROWS_PER_STEP])

    def score(*, by_loss: bool) -> None:
        model.eval().remove_prefix()
        times = 2 if by_loss else 1
        sizes = [times * len(row.input_ids) for row in encoded]
        for places in form_batches(sizes, batch_tokens):
            batch = [encoded[place] for place in places]
            if by_loss:
                mean_losses(model, batch + [alone[place] for place in places])
            else:
                mean_states(model, batch)
        model.attach_prefix(encoder)

    works: dict[str, Callable[[], None]] = {
        "training step": train,
        "ifd": partial(score, by_loss=True),
        "states": partial(score, by_loss=False),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + flags.repeats):
        for name, work in works.items():
            times[name].append(seconds(flags.device, work))
    figures: dict[str, dict[str, float]] = {}
    for name, measured in times.items():
        both = sum(len(row.input_ids) for row in alone) if name == "ifd" else 0
        time_s = statistics.median(measured[1:])  # the first allocates, and compiles kernels
        figures[name] = {
            "time_s": time_s,
            "rows_per_s": len(rows) / time_s,
            "tokens_per_s": (num_tokens + both) / time_s,
        }
        trained = figures["training step"]["tokens_per_s"]
        figures[name]["times_training"] = figures[name]["tokens_per_s"] / trained
    return figures


def as_encoded(row: BenchRow) -> TokenizedExample:
    """Return the row as scoring takes it."""
    context_length = int((row.labels == IGNORED_LABEL).sum())
    return TokenizedExample(row.input_ids.tolist(), context_length, False, False)


def measure_pool(num_rows: int) -> dict[str, float]:
    """Read, clean and deduplicate a pool; return seconds, and the peak memory in bytes."""
    draws = Random(SEED)
    rows: list[dict[str, str]] = []
    for prompt, answer in zip(
        synthetic_texts(num_rows, 4, 20), synthetic_texts(num_rows, 20, 100), strict=True
    ):
        row = {"instruction": prompt, "output": answer}
        if rows and draws.random() < 0.1:
            row = dict(rows[int(draws.random() * len(rows))])
            row["output"] += draws.choice(
                ["", " 的确。" if not row["output"].isascii() else " Yes."]
            )
        rows.append(row)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pool.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(lines, encoding="utf-8")
        del rows, lines
        figures: dict[str, float] = {}
        started = time.perf_counter()
        pool = read_pool([path])
        for name, step in (("read", None), ("clean", clean), ("duplicates", drop_duplicates)):
            if step is not None:
                step(pool)
            now = time.perf_counter()
            figures[f"{name}_s"], started = now - started, now
    kept = len(remaining(pool))
    return {"rows": num_rows, "kept": kept, **figures, "peak": peak_bytes("cpu")}


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.select", description=__doc__)
    add_common_flags(parser)
    parser.add_argument("--rows", type=int, default=64, help="rows to train on and to score")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes over the rows")
    parser.add_argument(
        "--batch_tokens", type=int, help="tokens of a scored batch; unset goes by the device"
    )
    parser.add_argument("--pool_rows", type=int, help="clean and deduplicate so many instead")
    flags = parse_common(parser, argv, "rows", "repeats")
    if flags.pool_rows:
        found = measure_pool(flags.pool_rows)
        sys.stdout.write(
            f"{found['rows']:,} rows, {found['kept']:,} kept: read {found['read_s']:.1f} s, clean "
            f"{found['clean_s']:.1f} s, duplicates {found['duplicates_s']:.1f} s; peak "
            f"{found['peak'] / 1e9:.2f} GB\n{machine()}\n"
        )
        write_json(flags, {"machine": machine(), **found})
        return 0
    figures = measure(flags)
    sys.stdout.write(
        f"{flags.size}, {weights_of(flags)}, {flags.rows} rows; training: P {flags.prefix}, "
        f"{ROWS_PER_STEP} rows per step\n"
        f"{'':<15}{'rows/s':>10}{'tokens/s':>12}{'x training':>12}\n"
    )
    for name, found in figures.items():
        sys.stdout.write(
            f"{name:<15}{found['rows_per_s']:>10.1f}{found['tokens_per_s']:>12.1f}"
            f"{found['times_training']:>12.2f}\n"
        )
    sys.stdout.write(f"{machine()}\n")
    write_json(flags, {"machine": machine(), **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
