"""`python -m ptuning plan <main.py's flags>`: what the run will take, before any weight is loaded.

Reads config.json and the tokenizer, tokenises the rows (from the cache when they are there), times
one matrix product, and prints tokens, steps, memory and time. Exit status 0 when it is expected to
fit, 3 when not, 2 when the flags or files are at fault. With --gpu_memory it plans for a GPU of
that size, also where there is none; then without the time. GB are 10**9 bytes.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptuning.data.dataset import TokenDataset
from ptuning.model.checkpoint import read_config
from ptuning.model.checkpoint_hub import CONFIG_FILE
from ptuning.model.config import ChatGLMConfig
from ptuning.model.linear import Linear, pack_weights_
from ptuning.model.prefix_artefact import prefix_shape, read_prefix_tensors
from ptuning.model.tuned import read_tuned_info
from ptuning.train.base_model import choose_dtype, load_tokenizer
from ptuning.train.flags import Arguments, parse_arguments
from ptuning.train.memory.eval_rows import settle_eval_rows
from ptuning.train.memory.memory_model import (
    AnsweringMemory,
    ModelSize,
    TrainingMemory,
    size_of,
    trained_bytes,
    weight_bytes,
)
from ptuning.train.memory.plan import (
    TRAINING_SHARE,
    Advice,
    RunShape,
    Speed,
    Steps,
    advise_answering,
    advise_training,
    answering_flops,
    answering_of,
    count_steps,
    largest_batch,
    memory_of,
    training_flops,
)
from ptuning.train.memory.recompute_run import choose_for_run, size_as_run
from ptuning.train.memory.recomputing import FREE_SHARE, Choice, free_bytes, gpu_terms
from ptuning.train.rows import Rows, load_rows
from ptuning.train.settings import RunSettings, resolve_settings

NOT_FITTING = 3  # exit status
NO_TIME = "not planned: the GPU is not in this machine, so nothing was measured"
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices that are timed


class Situation(NamedTuple):
    """What a plan is made of."""

    arguments: Arguments
    settings: RunSettings
    rows: Rows
    size: ModelSize
    device: torch.device
    process: int  # bytes that Python and its libraries hold; 0 where only the device counts
    free: int  # bytes, before anything is loaded; of a CPU's, this process's part
    product_flops: float | None  # per second; None where the GPU is not here

    @property
    def on_cpu(self) -> bool:
        """Whether the run computes on the CPU."""
        return self.arguments.training.on_cpu

    @property
    def place(self) -> str:
        """Where memory is free, in words."""
        if self.product_flops is None:
            return "the planned GPU"
        return str(self.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take main.py's flags as they are."""
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="main.py's flags, all of them"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 3 when it is not expected to fit, else 0."""
    text, fits = make_plan(parse_arguments(arguments.flags))
    sys.stdout.write(text)
    return 0 if fits else NOT_FITTING


def make_plan(arguments: Arguments) -> tuple[str, bool]:
    """Return the plan in words, and whether it fits."""
    situation = look(arguments)
    lines, fits = [], True
    if arguments.training.gpu_memory is not None:
        lines.append(f"planned for a GPU with {arguments.training.gpu_memory:.1f} GB")
    if situation.rows.train is not None:
        part, part_fits = plan_training(situation, situation.rows.train)
        lines += part
        fits &= part_fits
    if situation.rows.test is not None:
        part, part_fits = plan_answering(situation)
        lines += part
        fits &= part_fits
    lines.append("Fits." if fits else "Does not fit: change one of the settings above.")
    return "\n".join(lines) + "\n", fits


def look(arguments: Arguments) -> Situation:
    """Read configuration and rows, and time the device."""
    model, training = arguments.model, arguments.training
    hub = {
        "cache_dir": model.cache_dir,
        "revision": model.model_revision,
        "token": True if model.use_auth_token else None,
    }
    name = str(model.model_name_or_path)
    info = None if model.ptuning_checkpoint is None else read_tuned_info(model.ptuning_checkpoint)
    settings = resolve_settings(vars(arguments.data), info.settings if info else {})
    tokenizer = load_tokenizer(model.tokenizer_name or name, **hub)
    rows = load_rows(arguments, settings, tokenizer)
    device = training.device
    is_here = training.on_cpu or device.type == "cuda"
    dtype = torch.float32
    if training.tuning != "full":
        # On most GPUs bfloat16 is chosen; float16 has the same size.
        dtype = choose_dtype(device, training.base_dtype or (None if is_here else "bfloat16"))
    size = model_size(arguments, read_configuration(name, hub), dtype)
    flops = product_flops(device, dtype) if is_here else None
    process = 0
    if training.on_cpu:
        import psutil

        process = int(psutil.Process().memory_info().rss)
    free = free_bytes(device, training.world_size, training.memory_target)
    beside = beside_model(size, free, on_cpu=training.on_cpu)
    size = size_as_run(size, dtype, training, rows.train, free=beside)
    beside = beside_model(size, free, on_cpu=training.on_cpu)
    settle_eval_rows(arguments, rows, settings, size, free=beside)
    return Situation(arguments, settings, rows, size, device, process, free, flops)


def beside_model(size: ModelSize, free: int, *, on_cpu: bool) -> int:
    """Return the bytes that are left once the model, with what is trained, is there."""
    return max(0, free - weight_bytes(size) - trained_bytes(size, with_prefix_in_use=on_cpu))


def read_configuration(name: str, hub: Mapping[str, Any]) -> ChatGLMConfig:
    """Read config.json of a directory, or of a hub model, of which nothing else is fetched."""
    if Path(name).is_dir():
        return read_config(Path(name))
    from transformers.utils import cached_file

    found = cached_file(name, CONFIG_FILE, **hub)
    return read_config(Path(str(found)).parent)


def model_size(arguments: Arguments, config: ChatGLMConfig, dtype: torch.dtype) -> ModelSize:
    """Return the sizes, as the flags will have the base stored and tuned."""
    model = arguments.model
    stored = int(config.quantization_bit or 0)
    embedding_bits = int(config.embedding_quantization_bit or 0)
    prefix_length, projects = model.pre_seq_len or 0, bool(model.prefix_projection)
    tuning = arguments.training.tuning or "ptuning"
    if tuning == "ptuning" and model.ptuning_checkpoint:
        path = Path(model.ptuning_checkpoint)
        prefix_length, projects = prefix_shape(read_prefix_tensors(path), path)
    return size_of(
        config,
        dtype_bytes=dtype.itemsize,
        weight_bits=int(model.quantization_bit or stored),
        embedding_bits=embedding_bits or (8 if model.quantize_embeddings else 0),
        prefix_length=prefix_length,
        projects_prefix=projects,
        tuning=tuning,
        lora_rank=model.lora_rank or 8,
        lora_targets=tuple((model.lora_target_modules or "query_key_value").split(",")),
        **gpu_terms(arguments.training.device, arguments.training.memory_target),
    )


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Time the product of a large linear map, as a run computes it, best of four: FLOP/s."""
    length = PRODUCT_SIZE.get(device.type, PRODUCT_SIZE["cpu"])
    linear = Linear(length, length, bias=False, device=device, dtype=dtype).requires_grad_(False)
    pack_weights_(linear, room_bytes=2 * linear.weight.nbytes)
    x = torch.ones(length, length, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        linear.product(x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * length**3 / best


def run_shape(situation: Situation, choice: Choice | None = None) -> RunShape:
    """Return what the flags say of the run's shape, and what was chosen for training."""
    training, data = situation.arguments.training, situation.arguments.data
    return RunShape(
        batch_rows=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        processes=training.world_size,
        epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        recomputed_layers=choice.num_recomputed if choice else 0,
        answer_rows=training.per_device_eval_batch_size,
        new_tokens=data.val_max_target_length or situation.settings.max_target_length,
        chunk_tokens=choice.chunk_tokens if choice else None,
    )


def plan_training(situation: Situation, rows: TokenDataset) -> tuple[list[str], bool]:
    """Return the lines on training, and whether it fits."""
    training, size = situation.arguments.training, situation.size
    lengths, contexts = rows.lengths, rows.arrays.context_lengths
    batch = largest_batch(lengths, contexts, training.per_device_train_batch_size)
    beside = beside_model(size, situation.free, on_cpu=situation.on_cpu)
    choice = choose_for_run(training, size, rows, beside)
    shape = run_shape(situation, choice)
    steps = count_steps(len(rows), shape)
    memory = memory_of(size, batch, shape, on_cpu=situation.on_cpu)
    tokens, answers = int(lengths.sum()), int((lengths - contexts).sum())
    share = steps.rows_per_step / len(rows)
    flops = training_flops(
        size,
        num_rows=steps.rows_per_step,
        tokens=tokens * share,
        answer_tokens=answers * share,
        recomputed_layers=choice.num_recomputed,
    )
    lines = [
        "Training",
        f"  tokens     {steps.rows_per_step} rows a step: {tokens * share:.0f} tokens on average, "
        f"{(tokens - answers) * share:.0f} of prompts and {answers * share:.0f} of answers; no "
        "padding is computed",
        f"  steps      {steps.total}, {steps.per_epoch} an epoch: {steps.epochs:.2f} epochs",
        *memory_lines(memory, situation),
        f"  layers     {choice.describe()}",
        f"  time       {training_time(speed_of(situation), flops, steps, shape)}",
    ]
    if not choice.fits:
        lines += advice_lines(
            advise_training(
                size, lengths, contexts, shape, on_cpu=situation.on_cpu, available=situation.free
            ),
            situation,
        )
    return lines, choice.fits


def training_time(speed: Speed | None, flops: float, steps: Steps, shape: RunShape) -> str:
    """Say how long training takes, and from which numbers; flops are those of one step."""
    if speed is None:
        return NO_TIME
    step_time_s = flops / shape.processes / (speed.product_flops * speed.training_share)
    return (
        f"{in_words(steps.total * step_time_s)}: {step_time_s:.2f} s a step of "
        f"{flops / 1e9:.0f} GFLOP at {speed.training_share:.0%} (assumed) of the "
        f"{speed.product_flops / 1e9:.0f} GFLOP/s measured in a product"
    )


def plan_answering(situation: Situation) -> tuple[list[str], bool]:
    """Return the lines on answering and scoring, and whether it fits."""
    rows, size = situation.rows.test, situation.size
    assert rows is not None, "asked for only where there are rows to answer"
    shape = run_shape(situation)
    prompts = [int(length) for length in rows.lengths]
    memory = answering_of(size, prompts, shape, on_cpu=situation.on_cpu)
    passes = 2 if situation.arguments.data.compare_base else 1
    flops = passes * answering_flops(
        size, prompt_tokens=sum(prompts), new_tokens=len(prompts) * shape.new_tokens
    )
    time_text = NO_TIME
    speed = speed_of(situation)
    if speed is not None:
        time_s = flops / (speed.product_flops * speed.answering_share)
        time_text = (
            f"at most {in_words(time_s)}, when no answer ends early, at "
            f"{speed.answering_share:.0%} (assumed) of the product's speed"
        )
    base = " with and without what was tuned" if passes == 2 else ""
    lines = [
        "Answering",
        f"  tokens     {len(prompts)} prompts of {sum(prompts) / len(prompts):.1f} tokens, answers "
        f"of at most {shape.new_tokens}{base}, {shape.answer_rows} rows at a time",
        *memory_lines(memory, situation),
        f"  time       {time_text}",
    ]
    beside = max(0, situation.free - memory.weights - memory.trained)
    fits = memory.cache + memory.working <= FREE_SHARE * beside
    if not fits:
        lines += advice_lines(
            advise_answering(size, prompts, shape, on_cpu=situation.on_cpu), situation
        )
    return lines, fits


def memory_lines(memory: TrainingMemory | AnsweringMemory, situation: Situation) -> list[str]:
    """Say what is needed, part by part, beside what is free."""
    parts = dict(memory.parts())
    total = memory.total + situation.process
    if situation.process:
        parts = {"Python": situation.process, **parts}
    shown = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items() if value)
    return [
        f"  memory     {total / 1e9:.2f} GB at the peak: {shown}",
        f"             {situation.free / 1e9:.2f} GB are free on {situation.place}; of what the "
        f"model leaves, {FREE_SHARE:.0%} are planned with",
    ]


def advice_lines(advice: list[Advice], situation: Situation) -> list[str]:
    """Say what each change would need."""
    limit = FREE_SHARE * situation.free
    return [
        "  too much; each of these alone would need:",
        *(
            f"    {(one.needed + situation.process) / 1e9:8.2f} GB  {one.flags}"
            + (" (fits)" if one.needed <= limit else "")
            for one in advice
        ),
    ]


def speed_of(situation: Situation) -> Speed | None:
    """Return the measured product and the shares assumed for device and dtype; None unmeasured."""
    if situation.product_flops is None:
        return None
    kind = "cuda"
    if situation.on_cpu:
        kind = "cpu-float32" if situation.size.dtype_bytes == 4 else "cpu-half"
    return Speed(situation.product_flops, TRAINING_SHARE[kind])


def in_words(time_s: float) -> str:
    """Write a duration.

    >>> in_words(42.4), in_words(754), in_words(9000)
    ('42 s', '12.6 min', '2.5 h')
    """
    if time_s < 120:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.1f} min" if time_s < 7200 else f"{time_s / 3600:.1f} h"
