"""Generation speed: many rows in one continuous batch, and one row at a time.

    python -m benchmarks.generate [--size small] [--quantization_bit 4] [--new_tokens 64]

Prompts have the lengths of real ADGEN rows unless --rows_file names others. Weights are random and
never end an answer, so every row decodes --new_tokens tokens; with 0, as many as its real answer,
so that rows finish at different times and waiting rows are admitted. `batched` and `batch 1` are
our engine with many rows and with one; `published` is the published evaluation: one row at a time,
its prompt padded to 64 tokens, sampled (top_p 0.7, temperature 0.95) by transformers' `generate`.
The last two answer only every n-th row. GB/s covers decoding steps without prefill: the weights,
prefix and cache that a step reads, also as a share of the device's measured bandwidth.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.row_lengths import MAX_LENGTH
from benchmarks.setting import (
    BenchRow,
    add_common_flags,
    machine,
    make_model,
    make_rows,
    parse_common,
    seconds,
    synchronise,
    weights_of,
    write_json,
)
from ptuning.engine.engine import PUBLISHED_SAMPLING, Engine
from ptuning.engine.prefixes import PrefixMix, SharedPrefix, mix_prefixes
from ptuning.engine.request import Request, Row
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.cpu.linear import prepack_if_room

NO_END: frozenset[int] = frozenset()  # every row uses its whole budget
# Size of the tensor that is read to measure bandwidth: far larger than any cache, and on CUDA large
# enough to hide the launch.
BANDWIDTH_BYTES, BANDWIDTH_BYTES_CUDA = 2**29, 2**31
RECIPES = ("batched", "batch1", "published")


class Question(NamedTuple):
    """A prompt and the number of tokens to decode."""

    prompt: list[int]
    num_answer_tokens: int


class Speed(NamedTuple):
    """Answers and times of one recipe."""

    tokens: int
    time_s: float
    answers: dict[int, list[int]]  # by row number
    read_bytes: float = 0.0  # by decoding steps
    step_times_s: Sequence[float] = ()  # of decoding steps, graph capture included
    why_no_graphs: str = ""  # why CUDA graphs were abandoned, or ""

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens per second, prefill included."""
        return self.tokens / self.time_s

    @property
    def decode_time_s(self) -> float:
        """Seconds of all decoding steps."""
        return sum(self.step_times_s)

    @property
    def read_gb_per_s(self) -> float | None:
        """What decoding steps read, in 10**9 bytes per second; None if not counted."""
        return self.read_bytes / self.decode_time_s / 1e9 if self.step_times_s else None


def to_question(row: BenchRow) -> Question:
    """Split a training row after <sop>, which ends the prompt."""
    context = int((row.labels == -100).sum())
    return Question(row.input_ids[: context + 1].tolist(), len(row.labels) - context - 1)


def step_bytes(model: ChatGLMForConditionalGeneration, prefix_length: int, columns: int) -> int:
    """Return the bytes that one decoding step must read: weights, prefix and cache, once each."""
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
    shares: PrefixMix,
    device: str,
    use_graphs: bool = True,
) -> Speed:
    """Answer with our engine, at most max_rows at a time; time decoding steps on their own."""
    engine = Engine(model, max_rows=max_rows, use_graphs=use_graphs)
    rows: dict[Row, int] = {}
    for number, (prompt, budget) in questions.items():
        rows[engine.add(Request(prompt, budget, shares, end_ids=NO_END))] = number
    prefix_length = sum(share.prefix.length for share in shares)
    read_bytes, step_times_s = 0.0, []
    synchronise(device)
    started = time.perf_counter()
    while not engine.is_idle:
        num_waiting, columns = len(engine.waiting), sum(row.length for row in engine.rows)
        step_started = time.perf_counter()
        engine.step()
        synchronise(device)
        if len(engine.waiting) == num_waiting:
            step_times_s.append(time.perf_counter() - step_started)
            read_bytes += step_bytes(model, prefix_length, columns)
    time_s = time.perf_counter() - started
    answers = {number: row.answer for row, number in rows.items()}
    why_no_graphs = engine.graphed.disabled_reason if engine.graphed else ""
    num_tokens = sum(map(len, answers.values()))
    return Speed(num_tokens, time_s, answers, read_bytes, step_times_s, why_no_graphs)


def answer_as_published(
    model: ChatGLMForConditionalGeneration, questions: dict[int, Question], device: str
) -> Speed:
    """Answer one row at a time, padded to 64 tokens, sampled by transformers' generate."""
    answers = {}
    pad_id = model.config.pad_token_id or 0
    synchronise(device)
    started = time.perf_counter()
    for number, (prompt, budget) in questions.items():
        num_padding = MAX_LENGTH - len(prompt)
        mask = [0] * num_padding + [1] * len(prompt)
        output = model.generate(
            torch.tensor([[pad_id] * num_padding + list(prompt)], device=device),
            attention_mask=torch.tensor([mask], device=device),
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
    """Measure the device's read bandwidth in 10**9 bytes per second: the best of six large sums."""
    num_bytes = BANDWIDTH_BYTES_CUDA if device.startswith("cuda") else BANDWIDTH_BYTES
    block = torch.ones(num_bytes // 4, device=device)
    best = min(seconds(device, block.sum) for _ in range(6))
    return block.nbytes / best / 1e9


def every_nth(questions: Sequence[Question], count: int) -> dict[int, Question]:
    """Return `count` evenly spaced questions by row number.

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


def own_prefix(model: ChatGLMForConditionalGeneration) -> PrefixMix:
    """Return the model's prefix as shared by all rows of the engine."""
    with torch.no_grad():
        key_values = model.transformer.prefix_for(True)
    assert key_values is not None, "make_model attaches a prefix"
    return mix_prefixes([(SharedPrefix(key_values), 1.0)])


def make_questions(
    flags: Namespace, model: ChatGLMForConditionalGeneration, count: int, new_tokens: int
) -> list[Question]:
    """Return `count` questions of new_tokens each, or of their real answers' lengths for 0."""
    real = [to_question(row) for row in make_rows(flags, model.config, count)]
    return [Question(prompt, new_tokens or answered) for prompt, answered in real]


def measure(flags: Namespace, model: ChatGLMForConditionalGeneration) -> dict[str, Speed]:
    """Run every recipe asked for; the first rows warm it up."""
    questions = make_questions(flags, model, flags.rows, flags.new_tokens)
    numbered = dict(enumerate(questions))
    some = every_nth(questions, flags.single_rows)
    warm = {number: Question(question.prompt, 2) for number, question in list(some.items())[:2]}
    speeds: dict[str, Speed] = {}
    for name, asked, max_rows in (("batched", numbered, flags.batch_size), ("batch1", some, 1)):
        if name in flags.recipe:
            run = partial(
                answer,
                max_rows=max_rows,
                shares=own_prefix(model),
                device=flags.device,
                use_graphs=not flags.no_graphs,
            )
            run(model, warm)
            speeds[name] = run(model, asked)
    if "published" in flags.recipe:
        answer_as_published(model, warm, flags.device)
        speeds["published"] = answer_as_published(model, some, flags.device)
    return speeds


def figures_of(speeds: dict[str, Speed], bandwidth: float) -> dict[str, object]:
    """Return what --json writes: speeds, ratios, GB/s, and the number of equal answers."""
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
    """Read the flags; refuse counts below 1."""
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
    parser.add_argument(
        "--new_tokens",
        type=int,
        default=MAX_LENGTH,
        help="tokens decoded for each row; 0 for the length of its real answer",
    )
    parser.add_argument("--single_rows", type=int, default=8, help="rows answered one at a time")
    parser.add_argument("--batch_size", type=int, default=128, help="rows decoded at a time")
    parser.add_argument(
        "--no_graphs", action="store_true", help="on CUDA: launch decoding steps kernel by kernel"
    )
    flags = parse_common(parser, argv, "rows", "single_rows", "batch_size")
    if flags.new_tokens < 0:
        parser.error(f"--new_tokens is {flags.new_tokens}; use 1 or more, or 0 for real lengths.")
    return flags


def main(argv: list[str]) -> int:
    """Print the table."""
    flags = parse(argv)
    model = make_model(flags).eval()
    prepack_if_room(model)
    bandwidth = memory_gb_per_s(flags.device)
    sys.stdout.write(
        f"{machine()}\n{flags.size}, {weights_of(flags)}, P {flags.prefix}, up to "
        f"{flags.batch_size} rows at a time; the device reads {bandwidth:.1f} GB/s\n"
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
