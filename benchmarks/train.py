"""Training speed: this toolkit beside what the published code does, on one model in one run.

    python -m benchmarks.train [--size small] [--dtype float32] [--json FILE]

Both take optimiser steps of 16 rows. `published` pads every row to 128 tokens, takes one row at a
time, recomputes every layer in the backward pass, forms all logits, uses torch's own products and,
on a CPU, float32, as the published code does; `ours` takes the rows as one packed batch in --dtype.
Real tokens are those of prompts and answers, padding not counted. Model FLOP utilisation counts the
useful work alone (docs/performance.md) against the fastest matrix product measured in the same run.
"""

import statistics
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from benchmarks.setting import (
    MAX_LENGTH,
    BenchRow,
    add_common_flags,
    machine,
    make_model,
    make_rows,
    matmul_flops_per_s,
    refuse_below_one,
    seconds,
    write_json,
)
from ptuning.data.collation import pad_right
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.linear import plain_torch
from ptuning.model.packed_copies import pack_where_roomy
from ptuning.train.memory.recomputing import recompute_layers

ROWS_PER_STEP = 16
WARM_UP_STEPS = 2  # the first allocate, and have oneDNN write its kernels


def published_step(model: ChatGLMForConditionalGeneration, rows: Sequence[BenchRow]) -> None:
    """Accumulate the gradient of rows one by one, padded to 128, all logits in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # later versions have another name for it
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with plain_torch():
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
    """Return the FLOPs of one step that cannot be left out: forward and input gradient."""
    config = model.config
    layer_weights = 12 * config.hidden_size**2 * config.num_layers
    prefix_length = model.prefix_encoder.prefix_length if model.prefix_encoder else 0
    total = 0.0
    for row in rows:
        tokens = len(row.input_ids)
        answers = int((row.labels[1:] != -100).sum())
        attention = 4 * tokens * (prefix_length + tokens) * config.hidden_size * config.num_layers
        head = 2 * answers * config.hidden_size * config.vocab_size
        # Attention's backward pass has four products for the forward's two, linear layers have one.
        total += 2 * (2 * layer_weights * tokens + head) + 3 * attention
    return total


def time_recipe(
    step: Callable[[ChatGLMForConditionalGeneration, Sequence[BenchRow]], None],
    model: ChatGLMForConditionalGeneration,
    rows: Sequence[BenchRow],
    flags: Namespace,
) -> float:
    """Return the median seconds of a whole optimiser step."""
    encoder = model.prefix_encoder
    assert encoder is not None, "make_model attaches one"
    fused = True if step is our_step else None  # None leaves torch's own choice
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, fused=fused)

    def whole_step() -> None:
        step(model, rows)
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    for _ in range(WARM_UP_STEPS):
        whole_step()
    return statistics.median(seconds(flags.device, whole_step) for _ in range(flags.steps))


STEPS = {"published": published_step, "ours": our_step}


def recipe_flags(name: str, flags: Namespace) -> Namespace:
    """Return the flags with a recipe's dtype: on a CPU the published code is float32 always."""
    if name == "published" and flags.device == "cpu":
        return Namespace(**vars(flags) | {"dtype": "float32"})
    return flags


def measure(name: str, flags: Namespace) -> dict[str, float]:
    """Time one recipe on a model of its own and return its figures."""
    model = make_model(flags)
    if name == "ours":
        recompute_layers(model, 0)
        pack_where_roomy(model)
    rows = make_rows(flags, model.config, ROWS_PER_STEP)
    tokens = sum(len(row.input_ids) for row in rows)
    peak = matmul_flops_per_s(flags)
    if flags.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    step_time_s = time_recipe(STEPS[name], model, rows, flags)
    return {
        "matmul_flops_per_s": peak,
        "step_time_s": step_time_s,
        "real_tokens_per_s": tokens / step_time_s,
        "mfu": useful_flops(model, rows) / step_time_s / peak,
    }


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    add_common_flags(parser)
    parser.add_argument("--recipe", choices=("both", *STEPS), default="both")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts")
    flags = parser.parse_args(argv)
    refuse_below_one(parser, flags, "steps")
    sys.stdout.write(f"{flags.size}, P {flags.prefix}, {ROWS_PER_STEP} rows a step\n")
    sys.stdout.write(f"{'':<23}{'s/step':>10}{'tokens/s':>12}{'MFU %':>9}{'peak GiB':>10}\n")
    figures: dict[str, object] = {}
    speeds = {}
    for name in STEPS:
        if flags.recipe not in ("both", name):
            continue
        own = recipe_flags(name, flags)
        measured = measure(name, own)
        speeds[name] = measured["real_tokens_per_s"]
        memory = ""
        if flags.device.startswith("cuda"):
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
        sys.stdout.write(
            f"{name:<11}{own.dtype:<12}{measured['step_time_s']:>10.3f}{speeds[name]:>12.1f}"
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
