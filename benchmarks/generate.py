"""Generation speed: real-length rows in one batch that rows leave and join, and one at a time.

    python -m benchmarks.generate [--size small] [--threads 2] [--json FILE]

Weights are random and never end an answer, so every row is given the length of its real answer as
its budget: rows leave at real lengths, and waiting rows take their places. `batched` and `batch 1`
are the same engine with many rows and with one; `published` is what the published evaluation did:
one row at a time, its prompt padded to 64 tokens, sampled (top_p 0.7, temperature 0.95) by
transformers' `generate`. The last two answer every n-th row only. GB/s are those of decoding steps,
prompts left out: weights, prefix and cache that a step must read, beside what the device reads.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.setting import (
    MAX_LENGTH,
    BenchRow,
    add_common_flags,
    machine,
    make_model,
    make_rows,
    refuse_below_one,
    seconds,
    synchronise,
    write_json,
)
from ptuning.data.collation import pad_left
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.decoding import PUBLISHED_SAMPLING
from ptuning.model.engine import Engine
from ptuning.model.engine_row import Request, Row
from ptuning.model.packed_copies import pack_where_roomy
from ptuning.model.shared_prefix import SharedPrefix, Shares, mix_prefixes

NO_END: frozenset[int] = frozenset()  # every row goes to its budget
BANDWIDTH_BYTES = 2**29  # of the tensor that is read to measure the device: far above any cache
RECIPES = ("batched", "batch1", "published")


class Question(NamedTuple):
    """A prompt, and the tokens of its real answer, <eop> included."""

    prompt: list[int]
    num_answer_tokens: int


class Speed(NamedTuple):
    """How one way of answering went."""

    tokens: int
    time_s: float
    answers: dict[int, list[int]]  # by the row's number
    read_bytes: float = 0.0  # by decoding steps
    decode_time_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens per second, prompts' time included."""
        return self.tokens / self.time_s

    @property
    def read_gb_per_s(self) -> float | None:
        """What decoding steps read, 10**9 bytes a second; None where that was not counted."""
        return self.read_bytes / self.decode_time_s / 1e9 if self.decode_time_s else None


def to_question(row: BenchRow) -> Question:
    """Part a training row at <sop>, which the prompt ends with and which is not generated."""
    context = int((row.labels == -100).sum())
    return Question(row.input_ids[: context + 1].tolist(), len(row.labels) - context - 1)


def step_bytes(model: ChatGLMForConditionalGeneration, prefix_length: int, columns: int) -> int:
    """Return what one decoding step must read: every weight once, the prefix once, the cache."""
    config = model.config
    layers = sum(p.nbytes for p in model.transformer.layers.parameters())
    head = sum(p.nbytes for p in model.lm_head.parameters())
    per_column = 2 * config.num_layers * config.hidden_size * model.dtype.itemsize
    return layers + head + per_column * (prefix_length + columns)


def answer(
    model: ChatGLMForConditionalGeneration,
    questions: dict[int, Question],
    *,
    max_rows: int,
    shares: Shares,
    device: str,
    record_steps: bool = True,
) -> Speed:
    """Answer with our engine, at most max_rows at a time; time decoding steps on their own."""
    engine = Engine(model, max_rows=max_rows, record_steps=record_steps)
    rows: dict[Row, int] = {}
    for number, (prompt, budget) in questions.items():
        rows[engine.add(Request(prompt, budget, shares, end_ids=NO_END))] = number
    prefix_length = sum(share.prefix.length for share in shares)
    read_bytes = decode_time_s = 0.0
    synchronise(device)
    started = time.perf_counter()
    while not engine.is_idle:
        num_waiting, columns = len(engine.waiting), sum(row.length for row in engine.rows)
        step_started = time.perf_counter()
        engine.step()
        synchronise(device)
        if len(engine.waiting) == num_waiting:
            decode_time_s += time.perf_counter() - step_started
            read_bytes += step_bytes(model, prefix_length, columns)
    time_s = time.perf_counter() - started
    answers = {number: row.answer for row, number in rows.items()}
    return Speed(sum(map(len, answers.values())), time_s, answers, read_bytes, decode_time_s)


def answer_as_published(
    model: ChatGLMForConditionalGeneration, questions: dict[int, Question], device: str
) -> Speed:
    """Answer one row at a time, padded to 64 tokens, sampled by transformers' generate."""
    answers = {}
    pad_id = model.config.pad_token_id or 0
    synchronise(device)
    started = time.perf_counter()
    for number, (prompt, budget) in questions.items():
        inputs = pad_left([prompt], pad_id=pad_id, pad_to_length=MAX_LENGTH)
        output = model.generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            max_new_tokens=budget,
            min_new_tokens=budget,
            do_sample=True,
            top_p=PUBLISHED_SAMPLING.top_p,
            temperature=PUBLISHED_SAMPLING.temperature,
        )
        answers[number] = output[0, MAX_LENGTH:].tolist()
    synchronise(device)
    time_s = time.perf_counter() - started
    return Speed(sum(map(len, answers.values())), time_s, answers)


def memory_gb_per_s(device: str) -> float:
    """Measure what the device reads, best of five sums over half a GiB: 10**9 bytes a second."""
    block = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    best = min(seconds(device, block.sum) for _ in range(6))
    return block.nbytes / best / 1e9


def every_nth(questions: Sequence[Question], count: int) -> dict[int, Question]:
    """Return `count` questions evenly over the rows, by their numbers.

    >>> sorted(every_nth([Question([1], n) for n in range(10)], 5))
    [0, 2, 4, 6, 8]
    """
    step = max(1, len(questions) // count)
    return dict(list(enumerate(questions))[::step][:count])


def row_of(name: str, speed: Speed, bandwidth: float) -> str:
    """Return a line of the table."""
    read = speed.read_gb_per_s
    shown = "-" if read is None else f"{read:.1f} ({read / bandwidth:.0%})"
    return (
        f"{name:<12}{len(speed.answers):>6}{speed.tokens:>9}{speed.time_s:>9.1f}"
        f"{speed.tokens_per_s:>11.1f}{shown:>20}\n"
    )


def measure(flags: Namespace, model: ChatGLMForConditionalGeneration) -> dict[str, Speed]:
    """Answer in every way asked for; the first rows warm each up."""
    questions = [to_question(row) for row in make_rows(flags, model.config, flags.rows)]
    numbered = dict(enumerate(questions))
    some = every_nth(questions, flags.single_rows)
    with torch.no_grad():
        key_values = model.transformer.prefix_for(True)
    assert key_values is not None, "make_model attaches a prefix"
    shares = mix_prefixes([(SharedPrefix(key_values), 1.0)])
    warm = {number: Question(question.prompt, 2) for number, question in list(some.items())[:2]}
    speeds: dict[str, Speed] = {}
    for name, asked, max_rows in (("batched", numbered, flags.batch_size), ("batch1", some, 1)):
        if name in flags.recipe:
            run = partial(
                answer,
                max_rows=max_rows,
                shares=shares,
                device=flags.device,
                record_steps=not flags.no_graphs,
            )
            run(model, warm)
            speeds[name] = run(model, asked)
    if "published" in flags.recipe:
        answer_as_published(model, warm, flags.device)
        speeds["published"] = answer_as_published(model, some, flags.device)
    return speeds


def figures_of(speeds: dict[str, Speed], bandwidth: float) -> dict[str, object]:
    """Return what --json writes: speeds, ratios, GB/s, and how many rows are equal in both."""
    figures: dict[str, object] = {"machine": machine(), "memory_gb_per_s": bandwidth}
    for name, key in (("batched", ""), ("batch1", "batch1_"), ("published", "published_")):
        if name in speeds:
            figures[f"{key}tokens_per_s"] = speeds[name].tokens_per_s
            figures[f"{key}decode_gb_per_s"] = speeds[name].read_gb_per_s
    if "batched" in speeds:
        for name, key in (("batch1", "ratio"), ("published", "published_ratio")):
            if name in speeds:
                figures[key] = speeds["batched"].tokens_per_s / speeds[name].tokens_per_s
    if "batched" in speeds and "batch1" in speeds:
        ours, single = speeds["batched"].answers, speeds["batch1"].answers
        figures["rows_compared"] = len(single)
        figures["rows_equal"] = sum(ours[number] == single[number] for number in single)
    return figures


def parse(argv: list[str]) -> Namespace:
    """Read the flags; counts below 1 are refused."""
    parser = ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    add_common_flags(parser)
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        help="what to measure; unset measures all",
    )
    parser.add_argument("--rows", type=int, default=320, help="rows answered in the batch")
    parser.add_argument("--single_rows", type=int, default=8, help="rows answered one at a time")
    parser.add_argument("--batch_size", type=int, default=128, help="rows decoded at a time")
    parser.add_argument(
        "--no_graphs", action="store_true", help="on CUDA: launch decoding steps kernel by kernel"
    )
    flags = parser.parse_args(argv)
    refuse_below_one(parser, flags, "rows", "single_rows", "batch_size")
    return flags


def main(argv: list[str]) -> int:
    """Print the table."""
    flags = parse(argv)
    model = make_model(flags).eval()
    pack_where_roomy(model)
    bandwidth = memory_gb_per_s(flags.device)
    sys.stdout.write(
        f"{machine()}\n{flags.size}, {flags.dtype}, P {flags.prefix}, up to {flags.batch_size} "
        f"rows at a time; the device reads {bandwidth:.1f} GB/s\n"
        f"{'':<12}{'rows':>6}{'tokens':>9}{'s':>9}{'tokens/s':>11}{'decode GB/s':>20}\n"
    )
    speeds = measure(flags, model)
    for name, speed in speeds.items():
        sys.stdout.write(row_of(name, speed, bandwidth))
    figures = figures_of(speeds, bandwidth)
    for key, other in (("ratio", "batch 1"), ("published_ratio", "published")):
        if key in figures:
            sys.stdout.write(f"batched / {other}: {figures[key]:.2f}\n")
    if "rows_equal" in figures:
        sys.stdout.write(
            f"rows with the same tokens batched and alone: {figures['rows_equal']} of "
            f"{figures['rows_compared']}\n"
        )
    write_json(flags, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
