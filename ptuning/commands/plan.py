"""`python -m ptuning plan FLAGS`: memory and time of a run, before any weight is loaded.

Reads config.json and the tokenizer, tokenises the rows, times one matrix product, and prints
tokens, steps, memory and time. Exit status 0 if the run is expected to fit in memory, 3 if not, 2
if the flags or files are at fault. With --gpu_memory it plans for a GPU of that size, without the
time if there is none. GB are 10**9 bytes. FLOPs are counted as in docs/performance.md.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from ptuning.data.dataset import GenerationDataset, TokenDataset
from ptuning.model.checkpoint.files import CONFIG_FILE
from ptuning.model.checkpoint.layout import read_config
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import Linear, prepack_weights_
from ptuning.output import duration
from ptuning.train.fit import (
    FREE_SHARE,
    Fit,
    Workload,
    choose_fit,
    free_bytes,
    memory_savers,
    workload_of,
    workload_size,
)
from ptuning.train.memory import Memory, ModelSize, largest_batch, trained_bytes, weight_bytes
from ptuning.train.processes import trainer_arguments
from ptuning.train.rows import Rows, check_files, load_rows, too_long
from ptuning.train.run_config import RunConfig
from ptuning.tunings.artefact import FULL, PTUNING
from ptuning.tunings.loading import choose_dtype, load_tokenizer
from ptuning.tunings.prefix import prefix_shape, read_prefix_tensors

NOT_FITTING = 3  # exit status
NO_TIME = "unknown: the GPU is not in this machine, so nothing was measured"
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices that are timed
# Share of the measured product's speed that a whole training step is assumed to reach
# (docs/performance.md has what was measured), by device and bytes per element.
TRAINING_SHARE = {("cpu", 4): 0.6, ("cpu", 2): 0.5, ("cuda", 4): 0.45, ("cuda", 2): 0.45}
ANSWERING_SHARE = 0.4  # decoding is bound by memory bandwidth
DAY = 24 * 3600  # seconds


class Situation(NamedTuple):
    """What a plan is made of."""

    config: RunConfig
    rows: Rows
    fit: Fit
    max_length: int  # tokens that the base model was trained with
    process: int  # bytes that Python and its libraries hold; 0 where only the device counts
    free: int  # bytes, before anything is loaded; on a CPU, this process's share
    product_flops: float | None  # per second; None without the GPU

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.config.rows_per_step(self.fit.workload.processes)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 3 if the run is not expected to fit, else 0."""
    text, fits = make_plan(read_situation(arguments.config))
    sys.stdout.write(text)
    return 0 if fits else NOT_FITTING


def read_situation(config: RunConfig) -> Situation:
    """Read configuration and rows, time the device, and fit the run to its memory."""
    check_files(config)
    arguments = trainer_arguments(config)
    tokenizer = load_tokenizer(config.tokenizer_name or config.model_name_or_path, **config.hub)
    rows = load_rows(config, tokenizer, overwrite_cache=config.overwrite_cache)
    workload = workload_of(config, arguments.device, arguments.world_size)
    device, on_cpu = workload.device, workload.on_cpu
    is_here = on_cpu or device.type == "cuda"
    dtype = torch.float32
    if workload.tuning != FULL:
        # On most GPUs bfloat16 is chosen; float16 has the same size.
        dtype = choose_dtype(device, config.dtype_name or (None if is_here else "bfloat16"))
    base = planned_base(config)
    size = workload_size(base, dtype, workload)
    flops = product_flops(device, dtype) if is_here else None
    process = int(psutil.Process().memory_info().rss) if on_cpu else 0
    free = free_bytes(device, workload.processes, workload.memory_target)
    left = max(0, free - weight_bytes(size) - trained_bytes(size, with_prefix=on_cpu))
    fit = choose_fit(size, workload, rows, free=left)
    return Situation(config, rows, fit, base.max_sequence_length, process, free, flops)


def planned_base(config: RunConfig) -> ChatGLMConfig:
    """Read the base's config.json, with the quantisation and the prefix that the flags ask for."""
    directory = Path(config.model_name_or_path)
    if not directory.is_dir():
        from transformers.utils import cached_file

        found = cached_file(config.model_name_or_path, CONFIG_FILE, **config.hub)
        directory = Path(str(found)).parent
    base = read_config(directory)
    base.quantization_bit = config.quantization_bit or base.quantization_bit
    if config.quantize_embeddings and not base.embedding_quantization_bit:
        base.embedding_quantization_bit = 8
    base.pre_seq_len = config.pre_seq_len
    base.prefix_projection = bool(config.prefix_projection)
    if config.tuning == PTUNING and config.checkpoint:
        path = Path(config.checkpoint)
        base.pre_seq_len, base.prefix_projection = prefix_shape(read_prefix_tensors(path), path)
    return base


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Time a large matmul as a run computes it; return FLOP per second, best of four."""
    length = PRODUCT_SIZE.get(device.type, PRODUCT_SIZE["cpu"])
    linear = Linear(length, length, bias=False, device=device, dtype=dtype).requires_grad_(False)
    prepack_weights_(linear, room_bytes=2 * linear.weight.nbytes)
    x = torch.ones(length, length, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        linear.product(x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * length**3 / best


def make_plan(situation: Situation) -> tuple[str, bool]:
    """Return the plan in words, and whether the run fits in memory."""
    config, rows, fit = situation.config, situation.rows, situation.fit
    lines, fits = [], True
    if config.memory_target is not None:
        lines.append(f"planned for a GPU with {config.memory_target / 1e9:.1f} GB")
    if rows.train is not None:
        part, fits = plan_training(situation, rows.train)
        lines += part
    if rows.test is not None:
        part, answering_fits = plan_answering(situation, rows.test)
        lines += part
        fits &= answering_fits
    longest = config.max_source_length + config.new_tokens
    if longest > situation.max_length:
        lines.append(
            f"--max_source_length and --max_target_length allow {longest:,} tokens, and the base "
            f"model was trained with at most {situation.max_length:,}"
        )
    if fit.eval_line():
        lines.append(fit.eval_line())
    lines.append("Fits in memory." if fits else "Does not fit: change one of the settings above.")
    return "\n".join(lines) + "\n", fits


def plan_training(situation: Situation, rows: TokenDataset) -> tuple[list[str], bool]:
    """Return the lines on training, and whether it fits."""
    config, fit, rows_per_step = situation.config, situation.fit, situation.rows_per_step
    lengths, contexts = rows.lengths, rows.arrays.context_lengths
    per_epoch = math.ceil(len(rows) / rows_per_step)
    steps = config.max_steps
    if steps <= 0:
        steps = math.ceil(per_epoch * config.num_train_epochs)
    share = rows_per_step / len(rows)
    tokens, answers = share * int(lengths.sum()), share * int((lengths - contexts).sum())
    flops = training_flops(
        fit.size,
        num_rows=rows_per_step,
        tokens=tokens,
        answer_tokens=answers,
        checkpointed_layers=fit.checkpointed_layers,
    )

    def memory_of(fit: Fit) -> Memory:
        return fit.step_memory(largest_batch(lengths, contexts, fit.workload.train_batch))

    lines = [
        "Training",
        f"  tokens     {rows_per_step} rows per step: {tokens:.0f} tokens on average, "
        f"{tokens - answers:.0f} of prompts and {answers:.0f} of answers, without padding",
        *(f"  warning    {line}" for line in too_long(lengths, situation.max_length)),
        f"  steps      {steps}, {per_epoch} per epoch: {steps / per_epoch:.2f} epochs",
        *memory_lines(memory_of(fit), situation),
        f"  layers     {fit.training_line()}",
        f"  time       {training_time(situation, flops, steps)}",
    ]
    if not fit.fits:
        shorter = np.maximum(lengths // 2, 1)
        halved = largest_batch(shorter, contexts // 2, fit.workload.train_batch)
        more = {"--max_source_length and --max_target_length halved": fit.step_memory(halved)}
        lines += advice_lines(situation, "training", memory_of, more)
    return lines, fit.fits


def plan_answering(situation: Situation, rows: GenerationDataset) -> tuple[list[str], bool]:
    """Return the lines on answering and scoring, and whether it fits."""
    fit, prompts = situation.fit, rows.lengths[rows.lengths > 0]  # those with a prompt
    new_tokens, passes = fit.workload.new_tokens, 2 if situation.config.compare_base else 1
    time_text = NO_TIME
    if situation.product_flops is not None:
        flops = passes * answering_flops(
            fit.size, prompt_tokens=int(prompts.sum()), new_tokens=len(prompts) * new_tokens
        )
        time_s = flops / (situation.product_flops * ANSWERING_SHARE)
        time_text = (
            f"at most {in_words(time_s, fit)}, if no answer ends early, at {ANSWERING_SHARE:.0%} "
            "(assumed) of the product's speed"
        )
    base = " with and without what was tuned" if passes == 2 else ""

    def memory_of(fit: Fit) -> Memory:
        return fit.answering_memory(prompts.tolist())

    memory = memory_of(fit)
    lines = [
        "Answering",
        f"  tokens     {len(prompts)} prompts of {prompts.mean():.1f} tokens, answers of at most "
        f"{new_tokens}{base}, {fit.eval_batch} rows at a time",
        *(f"  warning    {line}" for line in too_long(prompts + new_tokens, situation.max_length)),
        *memory_lines(memory, situation),
        f"  time       {time_text}",
    ]
    left = max(0, situation.free - memory.weights - memory.trained)
    fits = memory.on_top <= FREE_SHARE * left
    if not fits:
        lines += advice_lines(situation, "answering", memory_of)
    return lines, fits


def advice_lines(
    situation: Situation,
    phase: str,
    memory_of: Callable[[Fit], Memory],
    more: dict[str, Memory] | None = None,
) -> list[str]:
    """Say what each change that helps would need, those that fit first; more has further ones."""
    fit, limit = situation.fit, FREE_SHARE * situation.free
    found = {
        change.flags: memory_of(changed(fit, change.workload))
        for change in memory_savers(fit.settled_workload, phase)
    }
    totals = {flags: memory.total for flags, memory in (found | (more or {})).items()}
    helping = [flags for flags, total in totals.items() if total < memory_of(fit).total]
    return [
        "  too much; each of these alone would need:",
        *(
            f"    {(totals[flags] + situation.process) / 1e9:8.2f} GB  {flags}"
            + (" (fits)" if totals[flags] <= limit else "")
            for flags in sorted(helping, key=lambda flags: totals[flags] > limit)
        ),
    ]


def changed(fit: Fit, workload: Workload) -> Fit:
    """Return a fit to another workload, with the other choices as they are."""
    asks_for_all = workload.checkpointing != fit.workload.checkpointing
    return replace(
        fit,
        workload=workload,
        size=replace(fit.size, weight_bits=workload.quantization_bit or 0),
        checkpointed_layers=fit.size.num_layers if asks_for_all else fit.checkpointed_layers,
        eval_batch=workload.eval_batch or fit.eval_batch,
    )


def memory_lines(memory: Memory, situation: Situation) -> list[str]:
    """Say what is needed, part by part, and what is free."""
    parts = {
        "Python": situation.process,
        "weights": memory.weights,
        "trained": memory.trained,
        **memory.terms,
    }
    shown = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items() if value)
    is_here = situation.product_flops is not None
    device = str(situation.fit.workload.device) if is_here else "the planned GPU"
    return [
        f"  memory     {sum(parts.values()) / 1e9:.2f} GB at the peak: {shown}",
        f"             {situation.free / 1e9:.2f} GB are free on {device}; of what the model "
        f"leaves, {FREE_SHARE:.0%} are planned with",
    ]


def training_time(situation: Situation, flops: float, steps: int) -> str:
    """Say how long training takes, and from which numbers; flops are those of one step."""
    fit, speed = situation.fit, situation.product_flops
    if speed is None:
        return NO_TIME
    share = TRAINING_SHARE[fit.workload.device.type, fit.size.unit]
    step_time_s = flops / fit.workload.processes / (speed * share)
    return (
        f"{in_words(steps * step_time_s, fit)}: {step_time_s:.2f} s per step of {flops / 1e9:.0f} "
        f"GFLOP at {share:.0%} (assumed) of the {speed / 1e9:.0f} GFLOP/s measured in a product"
    )


def in_words(time_s: float, fit: Fit) -> str:
    """Write a duration, with the advice that belongs to days on a CPU."""
    is_slow = fit.workload.on_cpu and time_s >= 2 * DAY
    return duration(time_s) + (" (use a GPU)" if is_slow else "")


def training_flops(
    size: ModelSize,
    *,
    num_rows: float,
    tokens: float,
    answer_tokens: float,
    checkpointed_layers: int = 0,
) -> float:
    """Return the FLOPs of one step: forward, input gradients, and checkpointed layers once more.

    Full fine-tuning adds the weights' gradients.
    """
    layers, hidden = size.num_layers, size.hidden_size
    linear = 2 * size.layer_weights * tokens
    keys = size.prefix_length + tokens / max(num_rows, 1)
    attention = 4 * tokens * keys * hidden * layers
    head = 2 * answer_tokens * hidden * size.vocab_size
    weight_gradients = linear + head if size.tuning == FULL else 0
    again = (linear + attention) * checkpointed_layers / layers
    return 2 * (linear + head) + 3 * attention + weight_gradients + again


def answering_flops(size: ModelSize, *, prompt_tokens: float, new_tokens: float) -> float:
    """Return the FLOPs of prefill and decoding, attention left out."""
    head = 2 * new_tokens * size.hidden_size * size.vocab_size
    return 2 * size.layer_weights * (prompt_tokens + new_tokens) + head
