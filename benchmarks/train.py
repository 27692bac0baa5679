"""Training speed of this toolkit and of the published recipe, on one model in one run.

    python -m benchmarks.train [--size small] [--dtype float32] [--quantization_bit 4] [--rows 16]

Both take optimizer steps of --rows rows, with the lengths of real ADGEN rows (16 of them have 1,547
tokens) unless --rows_file names others. `published` pads every row to 128 tokens, takes one row at
a time, recomputes every layer in the backward pass, forms all logits, uses torch's own products
and, on a CPU, float32, as the published code does; `ours` takes the rows as one flat batch in
--dtype. With --quantization_bit both multiply by the quantised weights of this toolkit. Real tokens
are those of prompts and answers, padding not counted. Model FLOP utilisation counts the
useful work alone (docs/performance.md) against the fastest matrix product measured in the same run.
"""

import statistics
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn import functional

from benchmarks.row_lengths import MAX_LENGTH
from benchmarks.setting import (
    BenchRow,
    add_common_flags,
    machine,
    make_model,
    make_rows,
    matmul_flops_per_s,
    parse_common,
    seconds,
    weights_of,
    write_json,
)
from ptuning.data.tokenization import pad_right
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.cpu import linear
from ptuning.model.cpu.linear import prepack_if_room
from ptuning.train.fit import keep_freed_memory

ROWS_PER_STEP = 16  # as published: one row at a time, accumulated over 16
WARM_UP_STEPS = 2  # the first allocate, and compile oneDNN's and Triton's kernels


def published_step(model: ChatGLMForConditionalGeneration, rows: Sequence[BenchRow]) -> None:
    """Accumulate the gradient of rows one by one, padded to 128, all logits in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in later versions
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # torch's own products and GELU, as in the published code
    with mock.patch.multiple(linear, has_onednn=lambda: False, GELU_DTYPES=()):
        for row in rows:
            batch = pad_right([row._asdict()], pad_id=3, pad_to_length=2 * MAX_LENGTH)
            input_ids = batch["input_ids"].to(model.device)
            labels = batch["labels"].to(model.device)
            logits = model(input_ids).logits.float()  # (1, 128, V)
            loss = functional.cross_entropy(logits[0, :-1], labels[0, 1:])
            (loss / len(rows)).backward()


def our_step(model: ChatGLMForConditionalGeneration, rows: Sequence[BenchRow]) -> None:
    """Take the gradient of all rows at once."""
    batch = pad_right([row._asdict() for row in rows], pad_id=3)
    model(**{name: value.to(model.device) for name, value in batch.items()}).loss.backward()


def useful_flops(model: ChatGLMForConditionalGeneration, rows: Sequence[BenchRow]) -> float:
    """Return the required FLOPs of one step: forward and input gradient."""
    config = model.config
    layer_weights = 12 * config.hidden_size**2 * config.num_layers
    prefix_length = model.prefix_encoder.prefix_length if model.prefix_encoder else 0
    total = 0.0
    for row in rows:
        tokens = len(row.input_ids)
        answers = int((row.labels[1:] != -100).sum())
        attention = 4 * tokens * (prefix_length + tokens) * config.hidden_size * config.num_layers
        head = 2 * answers * config.hidden_size * config.vocab_size
        # Attention's backward has four products for the forward's two; linear layers have one.
        total += 2 * (2 * layer_weights * tokens + head) + 3 * attention
    return total


class StepTimes(NamedTuple):
    """Seconds of whole optimizer steps."""

    first_s: float  # of warmed-up steps
    median_s: float  # after WARM_UP_STEPS


def time_recipe(
    name: str,
    model: ChatGLMForConditionalGeneration,
    rows: Sequence[BenchRow],
    flags: Namespace,
) -> StepTimes:
    """Take the warm-up steps and --steps more by one recipe."""
    step = whole_step(name, model)
    times = [seconds(flags.device, lambda: step(rows)) for _ in range(WARM_UP_STEPS + flags.steps)]
    return StepTimes(times[0], statistics.median(times[WARM_UP_STEPS:]))


def whole_step(
    name: str, model: ChatGLMForConditionalGeneration
) -> Callable[[Sequence[BenchRow]], None]:
    """Return a function that takes one optimizer step of rows by one recipe."""
    encoder = model.prefix_encoder
    assert encoder is not None, "make_model attaches one"
    fused = True if name == "ours" else None  # None leaves torch's own choice
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, fused=fused)

    def step(rows: Sequence[BenchRow]) -> None:
        model.train()
        STEPS[name](model, rows)
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {"published": published_step, "ours": our_step}


def recipe_flags(name: str, flags: Namespace) -> Namespace:
    """Return the flags with a recipe's dtype: on a CPU the published code is always float32."""
    if name == "published" and flags.device == "cpu":
        return Namespace(**vars(flags) | {"dtype": "float32"})
    return flags


def measure_steps(
    name: str,
    model: ChatGLMForConditionalGeneration,
    rows: Sequence[BenchRow],
    flags: Namespace,
    matmul_rate: float,
) -> dict[str, float]:
    """Time one recipe and return its figures; matmul_rate is the machine's, in FLOP/s."""
    on_cuda = flags.device.startswith("cuda")
    if name == "ours" and not on_cuda:
        keep_freed_memory(True)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = time_recipe(name, model, rows, flags)
    tokens = sum(len(row.input_ids) for row in rows)
    figures = {
        "matmul_flops_per_s": matmul_rate,
        "first_step_s": times.first_s,
        "step_time_s": times.median_s,
        "real_tokens": tokens,
        "real_tokens_per_s": tokens / times.median_s,
        "mfu": useful_flops(model, rows) / times.median_s / matmul_rate,
    }
    if on_cuda:
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def measure(name: str, flags: Namespace) -> dict[str, float]:
    """Time one recipe on its own model."""
    model = make_model(flags)
    if name == "ours":
        prepack_if_room(model)
    rows = make_rows(flags, model.config, flags.rows)
    return measure_steps(name, model, rows, flags, matmul_flops_per_s(flags))


def parse(argv: list[str]) -> Namespace:
    """Read the flags; refuse counts below 1."""
    parser = ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    add_common_flags(parser)
    parser.add_argument("--recipe", choices=("both", *STEPS), default="both")
    parser.add_argument("--rows", type=int, default=ROWS_PER_STEP, help="rows of a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts")
    return parse_common(parser, argv, "rows", "steps")


def main(argv: list[str]) -> int:
    """Print the table."""
    flags = parse(argv)
    sys.stdout.write(f"{flags.size}, P {flags.prefix}, {flags.rows} rows per step\n")
    sys.stdout.write(f"{'':<29}{'s/step':>10}{'tokens/s':>12}{'MFU %':>9}{'peak GB':>10}\n")
    figures: dict[str, object] = {}
    speeds = {}
    for name in STEPS:
        if flags.recipe not in ("both", name):
            continue
        own = recipe_flags(name, flags)
        measured = measure(name, own)
        speeds[name] = measured["real_tokens_per_s"]
        peak = measured.get("peak_memory_bytes")
        memory = "" if peak is None else f"{peak / 1e9:.2f}"
        sys.stdout.write(
            f"{name:<11}{weights_of(own):<18}{measured['step_time_s']:>10.3f}{speeds[name]:>12.1f}"
            f"{100 * measured['mfu']:>9.1f}{memory:>10}\n"
        )
        figures |= {f"{name}_{key}": value for key, value in measured.items()}
    figures["real_tokens_per_s"] = speeds.get("ours")
    figures["published_real_tokens_per_s"] = speeds.get("published")
    if len(speeds) == 2:
        figures["ratio"] = speeds["ours"] / speeds["published"]
        sys.stdout.write(f"ours / published: {figures['ratio']:.2f}\n")
    sys.stdout.write(f"{machine()}\n")
    write_json(flags, {"machine": machine(), **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
