"""Scoring speed of `ptuning select` next to training, on one model and the same rows.

    python -m benchmarks.select [--size small] [--dtype float32] [--quantization_bit 4] [--rows 64]

Training takes optimizer steps of 16 rows; scoring leaves the prefix out. `ifd` scores each row with
its prompt and without, and the tokens of both are counted; `states` keeps the mean hidden state of
the row. Each is repeated in turn, and the median time counts.
"""

import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial

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
from ptuning.data.tokenization import IGNORED_LABEL, TokenizedExample
from ptuning.model.cpu.linear import prepack_if_room
from ptuning.select.scores import (
    CPU_BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    form_batches,
    mean_losses,
    mean_states,
    without_prompt,
)
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


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.select", description=__doc__)
    add_common_flags(parser)
    parser.add_argument("--rows", type=int, default=64, help="rows to train on and to score")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes over the rows")
    parser.add_argument(
        "--batch_tokens", type=int, help="tokens of a scored batch; unset goes by the device"
    )
    flags = parse_common(parser, argv, "rows", "repeats")
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
