"""Measured peak memory of training and answering, and what `python -m ptuning plan` predicts.

    python -m benchmarks.memory [--cases small-float32 small-int4-float32 ...] [--json FILE]
    python -m benchmarks.memory --cases chatglm-6b-int4-bfloat16 --recompute 16 --work recompute

Every figure comes from its own process, which builds a random model, then takes two training steps
of one batch, or answers the rows. `recompute` is training with gradient checkpointing of every
layer, or of the first --recompute layers. ChatGLM-6B's cases are in the default on CUDA only. Rows
have the lengths of real ADGEN rows unless --rows_file names others.

On a CPU the measure is the largest resident set, with Python and its libraries, whose share the
prediction takes from the same process before the model is built; on CUDA, torch's allocations.
"""

import ctypes
import gc
import multiprocessing
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from benchmarks.row_lengths import MAX_LENGTH
from benchmarks.setting import (
    SIZES,
    BenchRow,
    add_common_flags,
    machine,
    make_model,
    make_rows,
    parse_common,
    write_json,
)
from ptuning.data.tokenization import pad_right
from ptuning.engine.engine import GreedyEngine
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.cpu.linear import prepack_if_room
from ptuning.train.fit import checkpoint_layers, gpu_terms, keep_freed_memory
from ptuning.train.memory import (
    Batch,
    answering_memory,
    size_of,
    training_memory,
)

MORE_SIZES = {  # name -> layers, hidden size, heads, vocabulary
    "nano": (4, 192, 4, 2300),
    "wide": (8, 2048, 16, 16384),
}
CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak
PEAK_LINE = "VmHWM:"  # of /proc/self/status, in KiB


class Case(NamedTuple):
    """One line of the table; bits 0 leaves the weights in dtype."""

    size: str
    dtype: str
    bits: int
    rows: int
    work: str  # "train", "recompute" (with gradient checkpointing) or "answer"

    @property
    def name(self) -> str:
        """What --cases takes."""
        return f"{self.size}-{f'int{self.bits}-' if self.bits else ''}{self.dtype}"


GPU_SIZE = "chatglm-6b"
CASES = tuple(
    Case(size, dtype, bits, rows, work)
    for size, dtype, bits, rows in (
        ("nano", "float32", 0, 16),
        ("small", "float32", 0, 16),
        ("small", "bfloat16", 0, 16),
        ("small", "float32", 8, 16),
        ("small", "float32", 4, 16),
        ("wide", "float32", 0, 4),
        ("wide", "bfloat16", 0, 4),
        *((GPU_SIZE, "bfloat16", bits, rows) for bits in (0, 8, 4) for rows in (1, 16)),
    )
    for work in ("train", "recompute", "answer")
)


class Result(NamedTuple):
    """Bytes; base is the process before the model was built, 0 on CUDA."""

    base: int
    predicted: int
    measured: int


def resident_bytes(device: str) -> int:
    """Return this process's current memory; 0 on CUDA, where only the device's counts."""
    return 0 if device.startswith("cuda") else int(psutil.Process().memory_info().rss)


def forget_peak(device: str) -> None:
    """Return freed memory to the system and reset the peak."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    if not CLEAR_REFS.exists():
        raise OSError(
            f"{CLEAR_REFS} is not there: peaks on a CPU are measured on Linux only; use --device "
            "cuda."
        )
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5", encoding="ascii")


def peak_bytes(device: str) -> int:
    """Return the peak since forget_peak."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(PEAK_LINE):
            return int(line.removeprefix(PEAK_LINE).split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {PEAK_LINE}")


def train(model: ChatGLMForConditionalGeneration, rows: Sequence[BenchRow]) -> None:
    """Take two optimizer steps: the second has the optimizer's state."""
    encoder = model.prefix_encoder
    assert encoder is not None, "make_model attaches one"
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, fused=True)
    batch = pad_right([row._asdict() for row in rows], pad_id=3)
    for _ in range(2):
        model(**{name: value.to(model.device) for name, value in batch.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def answer(model: ChatGLMForConditionalGeneration, prompts: Sequence[Sequence[int]]) -> None:
    """Answer all prompts at once."""
    engine = GreedyEngine(
        model, prompts, max_rows=len(prompts), max_new_tokens=MAX_LENGTH, use_prefix=True
    )
    for _ in engine.run():
        pass


def measure(case: Case, flags: Namespace) -> Result:
    """Build the case's model in this process, predict, then run and read the peak."""
    SIZES.update(MORE_SIZES)
    on_cpu = not flags.device.startswith("cuda")
    flags.size, flags.dtype, flags.quantization_bit = case.size, case.dtype, case.bits
    base = resident_bytes(flags.device)
    model = make_model(flags)
    built = resident_bytes(flags.device)
    rows = make_rows(flags, model.config, case.rows)
    base += max(0, resident_bytes(flags.device) - built)  # the tokenizer, which plan has loaded
    prompts = [row.input_ids[: int((row.labels == -100).sum()) + 1].tolist() for row in rows]
    size = size_of(
        model.config,
        model.dtype,
        on_cpu=on_cpu,
        weight_bits=case.bits,
        prepacked=prepack_if_room(model) > 0,
        prefix_length=flags.prefix,
        **gpu_terms(torch.device(flags.device), None),
    )
    forget_peak(flags.device)
    if case.work == "answer":
        predicted = answering_memory(
            size,
            [len(prompt) for prompt in prompts],
            num_rows=len(prompts),
            new_tokens=MAX_LENGTH,
        ).total
        answer(model.eval(), prompts)
    else:
        wanted = size.num_layers if flags.recompute is None else flags.recompute
        count = min(wanted, size.num_layers) if case.work == "recompute" else 0
        checkpoint_layers(model, count)
        if on_cpu:
            keep_freed_memory(count == 0)
        answers = sum(int((row.labels[1:] != -100).sum()) for row in rows)
        batch = Batch(tuple(len(row.input_ids) for row in rows), answers)
        predicted = training_memory(size, batch, checkpointed_layers=count).total
        train(model.train(), rows)
    return Result(base, base + predicted, peak_bytes(flags.device))


def in_own_process(case: Case, flags: Namespace) -> Result:
    """Measure in a new process, whose peak is that of this case only."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, case, flags).result()


def parse(argv: list[str]) -> Namespace:
    """Read the flags; refuse unknown cases, listing all."""
    parser = ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    add_common_flags(parser)
    names = list(dict.fromkeys(case.name for case in CASES))
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=names,
        help=f"unset takes all, those of {GPU_SIZE} on CUDA only",
    )
    parser.add_argument(
        "--work",
        nargs="+",
        choices=("train", "recompute", "answer"),
        help="unset is train and answer, and recompute with --recompute",
    )
    parser.add_argument(
        "--recompute",
        type=int,
        help="layers with gradient checkpointing in the work recompute, at most all; unset is all",
    )
    flags = parse_common(parser, argv)
    if flags.size != "small" or flags.dtype != "float32" or flags.quantization_bit:
        parser.error(
            "--size, --dtype and --quantization_bit are parts of a case's name here; use --cases."
        )
    if flags.recompute is not None and flags.recompute < 0:
        parser.error(f"--recompute is {flags.recompute}; use 0 or more.")
    on_cuda = flags.device.startswith("cuda")
    flags.cases = flags.cases or [n for n in names if on_cuda or not n.startswith(GPU_SIZE)]
    flags.work = flags.work or ["train", "answer"] + ["recompute"] * (flags.recompute is not None)
    if flags.recompute is not None and "recompute" not in flags.work:
        parser.error("--recompute is for the work recompute; add it to --work.")
    return flags


def main(argv: list[str]) -> int:
    """Print the table line by line."""
    flags = parse(argv)
    layers = "all layers" if flags.recompute is None else f"{flags.recompute} layers"
    sys.stdout.write(
        f"{machine()}\nGB of 10**9; {flags.device}, prefix {flags.prefix}, recompute: "
        f"{layers}\n{'':<25}{'work':<11}"
        f"{'rows':>5}{'process':>9}{'predicted':>11}{'measured':>10}{'error %':>9}\n"
    )
    lines = []
    for case in CASES:
        if case.name not in flags.cases or case.work not in flags.work:
            continue
        result = in_own_process(case, flags)
        error = result.predicted / result.measured - 1
        base, predicted, measured = (value / 1e9 for value in result)
        sys.stdout.write(
            f"{case.name:<25}{case.work:<11}{case.rows:>5}{base:>9.2f}{predicted:>11.2f}"
            f"{measured:>10.2f}{100 * error:>+9.1f}\n"
        )
        sys.stdout.flush()
        lines.append({**case._asdict(), **result._asdict(), "error": error})
    worst = max((abs(line["error"]) for line in lines), default=0.0)
    sys.stdout.write(f"largest error: {worst:.1%}\n")
    figures = {"cases": lines, "recompute": flags.recompute, "largest_error": worst}
    write_json(flags, {"machine": machine(), **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
