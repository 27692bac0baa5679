"""Fit a run to the free memory: layers to checkpoint, chunks of the loss, prepacking, eval batch.

`choose_fit` decides from sizes alone, so that `python -m ptuning plan` and the run agree.
A checkpointed layer saves its input alone and computes its forward pass twice. The first layers are
checkpointed, because the activations of the later ones are gone by the time they are recomputed.
"""

import ctypes
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptuning.data.dataset import TokenDataset
from ptuning.model.attention import Attention
from ptuning.model.chatglm import ChatGLMForConditionalGeneration, ChatGLMModel, Layer
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import PREPACK_SHARE, can_prepack, prepack_weights_
from ptuning.model.quantization.torch_backend import block_bytes, device_block_bytes
from ptuning.train.flags import LEAST_ROWS, MOST_ROWS
from ptuning.train.memory import (
    ADAM_BYTES,
    FLOAT32,
    HEAP_BLOCK,
    Batch,
    Memory,
    ModelSize,
    answering_memory,
    chunks_loss,
    largest_batch,
    prepacked_bytes,
    size_of,
    training_memory,
    validation_bytes,
)
from ptuning.train.processes import gather
from ptuning.train.rows import Rows
from ptuning.train.run_config import RunConfig
from ptuning.tunings.artefact import DEFAULT_TARGETS, FULL, LORA, PTUNING, read_adapter_shape
from ptuning.tunings.lora import RANK

FREE_SHARE = 0.9  # of free memory is planned with; allocators lose the rest to fragmentation
# Tokens per chunk of the loss on a GPU where memory is short. Every chunk reads the output head in
# the forward and the backward pass: for a row of 64 answer tokens, chunks of 16 cost about as much
# as four checkpointed layers, and smaller ones save next to nothing.
SMALLER_CHUNKS = (256, 128, 64, 32, 16)
# cuBLAS's workspace, as PyTorch allocates it: parseChosenWorkspaceSize in
# https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/cuda/CublasHandlePool.cpp
HOPPER = 9  # major compute capability
HOPPER_WORKSPACE, OTHER_WORKSPACE = 8 * 4096 * 1024, (2 * 4096 + 8 * 16) * 1024
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGE_BLOCK_BYTES = 256 * 1024


@dataclass(frozen=True)
class Workload:
    """What decides a run's memory; batch sizes in rows per device, memory_target in bytes."""

    device: torch.device
    processes: int = 1
    memory_target: int | None = None  # --gpu_memory; None: all that is free
    train_batch: int = 1
    accumulation: int = 1
    eval_batch: int | None = None  # None: as many as fit, from 8 to 64
    checkpointing: str = "auto"  # or "true", "false"
    checkpoint_layers: int | None = None  # None: as many as `checkpointing` says
    new_tokens: int = 0  # of the longest answer
    num_beams: int = 1
    tuning: str = "ptuning"  # or "lora", "full"
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    layer_dropout: float = 0.0
    quantization_bit: int | None = None
    compiles: bool = False  # with a compiler back end that was asked for

    @property
    def on_cpu(self) -> bool:
        """Whether the memory is a CPU's; a target means a GPU, even one that is not here."""
        return self.device.type == "cpu" and self.memory_target is None


class Change(NamedTuple):
    """Flags that save memory by themselves, why or at what price, and the workload with them."""

    flags: str
    note: str
    workload: Workload


def memory_savers(workload: Workload, phase: str) -> Iterator[Change]:
    """Yield changes that need less memory, cheapest first; a smaller batch keeps the rows per step.

    phase is "training", "validating", "answering" or "loading the base".
    """
    batch, steps, bits = workload.train_batch, workload.accumulation, workload.quantization_bit
    if phase == "training" and batch > 1:
        rows = batch * steps
        smaller = next(n for n in range(batch // 2, 0, -1) if rows % n == 0)
        less = replace(workload, train_batch=smaller, accumulation=rows // smaller)
        flags = f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps"
        note = f"now {batch} x {steps}; the same {rows} rows per step"
        yield Change(f"{flags} {less.accumulation}", note, less)
    if phase == "training" and workload.checkpointing != "true":
        all_layers = replace(workload, checkpointing="true", checkpoint_layers=None)
        note = "less memory, about a third more time"
        yield Change("--gradient_checkpointing true", note, all_layers)
    eval_batch = workload.eval_batch or MOST_ROWS
    if phase in ("validating", "answering") and eval_batch > 1:
        less = replace(workload, eval_batch=eval_batch // 2)
        yield Change(f"--per_device_eval_batch_size {less.eval_batch}", f"now {eval_batch}", less)
    for smaller, share in ((8, "half"), (4, "a quarter")):
        if workload.tuning != FULL and (not bits or smaller < bits):
            now = f"now {bits} bits" if bits else "now off"
            note = f"the frozen base in {share} of 16 bits; {now}"
            less = replace(workload, quantization_bit=smaller)
            yield Change(f"--quantization_bit {smaller}", note, less)


@dataclass(frozen=True)
class Fit:
    """How a run was fitted to its memory; all figures are bytes, layers or rows."""

    workload: Workload
    size: ModelSize  # with `prepacked` as chosen
    free: int  # next to the loaded model and its prepacked weights
    checkpointed_layers: int = 0
    chunk_tokens: int | None = None  # per chunk of the loss; None: the device's default
    needed: int = 0  # by a training step on top of the model; 0 without training
    needed_without: int = 0  # with no layer checkpointed and the device's default chunk
    eval_batch: int = MOST_ROWS
    eval_free: int = 0  # what validation and answering may use

    @property
    def fits(self) -> bool:
        """Whether a training step is expected to fit."""
        return self.needed <= FREE_SHARE * self.free

    @property
    def settled_workload(self) -> Workload:
        """The workload with the eval batch that was chosen and the model's quantisation."""
        bits = self.size.weight_bits or None
        return replace(self.workload, eval_batch=self.eval_batch, quantization_bit=bits)

    def step_memory(self, batch: Batch) -> Memory:
        """Return the peak of a training step."""
        return training_memory(
            self.size,
            batch,
            checkpointed_layers=self.checkpointed_layers,
            accumulates=self.workload.accumulation > 1,
            chunk_tokens=self.chunk_tokens,
        )

    def answering_memory(self, prompt_lengths: Sequence[int]) -> Memory:
        """Return the peak of answering prompts; each beam of each is a row."""
        beams = self.workload.num_beams
        return answering_memory(
            self.size,
            list(prompt_lengths) * beams,
            num_rows=self.eval_batch * beams,
            new_tokens=self.workload.new_tokens,
        )

    def training_line(self) -> str:
        """Say how training was fitted, and from which numbers."""
        count, num_layers = self.checkpointed_layers, self.size.num_layers
        share = f"all {num_layers}" if count == num_layers else f"{count or 'none'} of {num_layers}"
        chunk = without = ""
        if self.chunk_tokens is not None:
            chunk = f", the loss in chunks of {self.chunk_tokens} tokens"
        if count or chunk:
            without = f" ({self.needed_without / 1e9:.2f} GB without)"
        return (
            f"Gradient checkpointing: {share} layers{chunk}; a step needs {self.needed / 1e9:.2f} "
            f"GB on top of the model{without}, {self.free / 1e9:.2f} GB are free"
            f"{'' if self.fits else ': it may not fit'}"
        )

    def eval_line(self) -> str:
        """Say which evaluation batch size was chosen; "" if it was given, or is the largest."""
        if self.workload.eval_batch is not None or self.eval_batch == MOST_ROWS:
            return ""
        return (
            f"Evaluation batch size: {self.eval_batch} rows; {MOST_ROWS} need more than the "
            f"{self.eval_free / 1e9:.1f} GB that are free. --per_device_eval_batch_size overrides "
            "this."
        )

    def lines(self) -> list[str]:
        """Return what a run prints."""
        return [*filter(None, [self.training_line() if self.needed else "", self.eval_line()])]


def fit_to_memory(model: ChatGLMForConditionalGeneration, workload: Workload, rows: Rows) -> Fit:
    """Choose for a model on its device, with what is tuned attached; all processes agree."""
    size = workload_size(model.config, model.dtype, workload)
    free = free_bytes(workload.device, workload.processes, workload.memory_target)
    ranks = gather((free, size))
    return choose_fit(ranks[0][1], workload, rows, free=min(free for free, _ in ranks))


def workload_size(config: ChatGLMConfig, dtype: torch.dtype, workload: Workload) -> ModelSize:
    """Return the sizes of a model with this config.json and base dtype on the workload's device."""
    return size_of(
        config,
        dtype,
        on_cpu=workload.on_cpu,
        tuning=workload.tuning,
        lora_rank=workload.lora_rank,
        lora_targets=workload.lora_targets,
        layer_dropout=workload.layer_dropout,
        **gpu_terms(workload.device, workload.memory_target),
    )


def choose_fit(size: ModelSize, workload: Workload, rows: Rows, *, free: int) -> Fit:
    """Choose from a model's sizes and `free`, the bytes next to the loaded model.

    Prepacked weights take at most a quarter of `free`. They save a few per cent of a training step,
    less than a checkpointed layer costs: they may not add one, nor leave a step too little.
    """
    fit = _fit_training(Fit(workload, size, free), rows.train)
    copies = prepacked_bytes(size)
    may_prepack = workload.on_cpu and not workload.compiles and can_prepack(size.dtype)
    if may_prepack and 0 < copies <= PREPACK_SHARE * free:
        start = Fit(workload, replace(size, prepacked=True), free - copies)
        prepacked = _fit_training(start, rows.train)
        if prepacked.fits and prepacked.checkpointed_layers == fit.checkpointed_layers:
            fit = prepacked
    return _fit_evaluation(fit, rows)


def _fit_training(start: Fit, rows: TokenDataset | None) -> Fit:
    """Choose the checkpointed layers and the loss's chunk: the first that fits, or the smallest.

    In this order: no layer; no layer and a smaller chunk; then one layer, two layers and so on,
    each with the chunk that needs the least. A fixed number of layers leaves the chunk to choose.
    """
    if rows is None:
        return start
    workload, size = start.workload, start.size
    batch = largest_batch(rows.lengths, rows.arrays.context_lengths, workload.train_batch)

    @cache
    def needed(count: int, chunk: int | None) -> int:
        way = replace(start, checkpointed_layers=count, chunk_tokens=chunk)
        return way.step_memory(batch).on_top

    given = workload.checkpoint_layers
    counts = range(size.num_layers + 1)
    if workload.checkpointing == "false":
        counts = counts[:1]
    elif given is not None:
        asked = min(given, size.num_layers)
        counts = counts[asked : asked + 1]
    elif workload.checkpointing == "true":
        counts = counts[-1:]
    chunks: list[int | None] = [None]
    if chunks_loss(size) and not size.on_cpu:
        chunks += [chunk for chunk in SMALLER_CHUNKS if chunk < batch.answer_tokens]
    ways = [(counts[0], chunk) for chunk in chunks]
    ways += [(count, min(chunks, key=partial(needed, count))) for count in counts[1:]]
    fitting = (way for way in ways if needed(*way) <= FREE_SHARE * start.free)
    count, chunk = next(fitting, min(ways, key=lambda way: needed(*way)))
    return replace(
        start,
        checkpointed_layers=count,
        chunk_tokens=chunk,
        needed=needed(count, chunk),
        needed_without=needed(0, None),
    )


def _fit_evaluation(fit: Fit, rows: Rows) -> Fit:
    """Halve the evaluation batch until it fits, unless it was typed."""
    free = fit.free
    if rows.train is not None:  # its gradients and optimizer state are still to come
        free = max(0, free - fit.size.trained * (FLOAT32 + ADAM_BYTES))
    given = fit.workload.eval_batch
    fit = replace(fit, eval_batch=given or MOST_ROWS, eval_free=free)
    while given is None and fit.eval_batch > LEAST_ROWS:
        if _evaluation_bytes(fit, rows) <= FREE_SHARE * free:
            break
        fit = replace(fit, eval_batch=fit.eval_batch // 2)
    return fit


def _evaluation_bytes(fit: Fit, rows: Rows) -> int:
    """Return what validating or answering the longest rows takes on top of the model."""
    needed = 0
    if rows.validation is not None:
        contexts = rows.validation.arrays.context_lengths
        batch = largest_batch(rows.validation.lengths, contexts, fit.eval_batch)
        needed = validation_bytes(fit.size, batch)
    if rows.test is not None:
        needed = max(needed, fit.answering_memory(rows.test.lengths.tolist()).on_top)
    return needed


def apply_fit(
    model: ChatGLMForConditionalGeneration,
    fit: Fit,
    checkpoint_options: Mapping[str, Any] | None = None,
) -> None:
    """Prepack a loaded model's weights; for training, checkpoint layers and set glibc's limits."""
    if fit.size.prepacked:
        prepack_weights_(model, room_bytes=prepacked_bytes(fit.size))
    if fit.needed:
        checkpoint_layers(model, fit.checkpointed_layers, checkpoint_options)
        model.loss_chunk_tokens = fit.chunk_tokens
        if fit.workload.on_cpu:
            keep_freed_memory(fit.checkpointed_layers == 0)


def checkpoint_layers(
    model: nn.Module, num_layers: int, options: Mapping[str, Any] | None = None
) -> None:
    """Checkpoint the model's first num_layers layers; ValueError if it has fewer.

    options are torch.utils.checkpoint's; None is use_reentrant=False. Unlike with transformers'
    switch, the embedding's output needs no gradient.
    """
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if not 0 <= num_layers <= len(layers):
        raise ValueError(
            f"--checkpoint_layers is {num_layers} and the model has {len(layers)} layers; use 0 to "
            f"{len(layers)}."
        )
    function: Any = partial(checkpoint, **(options or {"use_reentrant": False}))
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < num_layers
        layer._gradient_checkpointing_func = function
    for module in model.modules():
        if isinstance(module, ChatGLMModel):
            module.gradient_checkpointing = num_layers > 0


def keep_freed_memory(keep: bool) -> bool:
    """Set what glibc does with freed blocks, process-wide; False where there is no glibc.

    keep: blocks up to 32 MiB stay for the next step. By default glibc returns the top of the heap
    and faults it in again, which is a tenth of a small model's step on a busy machine. Otherwise
    blocks above 256 KiB are returned at once. By default glibc raises that limit as blocks are
    freed: an int4 model with all layers checkpointed held 1.21 GB instead of 0.72, by
    fragmentation.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is None or not hasattr(libc, "malloc_trim"):
        return False
    pad = 2 * HEAP_BLOCK if keep else 0
    limits = {
        M_MMAP_THRESHOLD: HEAP_BLOCK if keep else LARGE_BLOCK_BYTES,
        M_TRIM_THRESHOLD: 2**31 - 1 if keep else LARGE_BLOCK_BYTES,
        M_TOP_PAD: pad,
    }
    are_set = [bool(libc.mallopt(name, limit)) for name, limit in limits.items()]
    libc.malloc_trim(pad)
    return all(are_set)


def free_bytes(device: torch.device, processes: int = 1, target: int | None = None) -> int:
    """Return the free memory of a device in bytes; on a CPU, each process's share.

    target is --gpu_memory in bytes, from which this process's tensors are subtracted.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        # What torch's allocator caches for reuse is available too.
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        return free if target is None else max(0, min(free, target - held))
    if target is not None:
        return target
    return int(psutil.virtual_memory().available) // processes


def gpu_terms(device: torch.device, target: int | None) -> dict[str, int]:
    """Return ModelSize's block_bytes and workspace_bytes; nothing on a CPU.

    target is --gpu_memory in bytes: where device is no GPU, the memory of the one planned for.
    """
    if device.type == "cuda":
        is_hopper = torch.cuda.get_device_capability(device)[0] == HOPPER
        workspace = HOPPER_WORKSPACE if is_hopper else OTHER_WORKSPACE
        return {"block_bytes": block_bytes(device), "workspace_bytes": workspace}
    if target is None:
        return {}
    return {"block_bytes": device_block_bytes(target), "workspace_bytes": HOPPER_WORKSPACE}


def workload_of(config: RunConfig, device: torch.device, processes: int = 1) -> Workload:
    """Return what decides the memory of a run on that device, per process."""
    rank, targets = config.lora_rank or RANK, DEFAULT_TARGETS
    if config.lora_target_modules is not None:
        targets = tuple(config.lora_target_modules.split(","))
    if config.tuning == LORA and config.checkpoint is not None:
        rank, targets = read_adapter_shape(Path(config.checkpoint))
    return Workload(
        device=device,
        processes=processes,
        memory_target=config.memory_target,
        train_batch=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        eval_batch=config.per_device_eval_batch_size,
        checkpointing=config.checkpointing,
        checkpoint_layers=config.checkpoint_layers,
        new_tokens=config.new_tokens,
        num_beams=config.beams,
        tuning=config.tuning or PTUNING,
        lora_rank=rank,
        lora_targets=targets,
        layer_dropout=config.layer_dropout,
        quantization_bit=config.quantization_bit,
        compiles=config.torch_compile_backend is not None,
    )


# ---- torch.compile ----

# Compiling takes up to a minute and saves about 11 us per token on an H100 (17 ms of a step of
# 1,547 tokens, by the bytes it no longer moves): 60 s / 11 us = 5.5 million tokens.
TOKENS_TO_AMORTISE = 6_000_000

logger = logging.getLogger("main")


def compile_layers(
    model: nn.Module,
    device: torch.device,
    *,
    wanted: bool | None = None,
    backend: str | None = None,
    mode: str | None = None,
    num_tokens: float = 0,
) -> bool:
    """Compile the model's layers if that was asked for or pays off; return whether it was done.

    wanted, backend and mode are --torch_compile, --torch_compile_backend and --torch_compile_mode;
    num_tokens is how many tokens the run trains on. A layer that the compiler fails on later runs
    uncompiled, with the compiler's own warning.
    """
    if wanted is None:
        wanted = compiling_pays(device, next(model.parameters()).dtype, num_tokens)
    if not (wanted or backend or mode):
        return False
    if device.type == "cpu" and backend is None:
        logger.info(
            "--torch_compile is ignored: on a CPU compiled layers are slower. To compile them "
            "anyway, add --torch_compile_backend inductor."
        )
        return False
    options: dict[str, Any] = {"dynamic": True}  # batches differ in length
    options |= {"backend": backend} if backend else {}
    options |= {"mode": mode} if mode else {}
    if reason := compiler_error(device, options):
        logger.warning("--torch_compile: the layers run uncompiled, as %s", reason)
        return False
    torch._dynamo.config.suppress_errors = True  # what fails to compile runs, with a warning
    if device.type == "cpu":
        keep_row_attention_eager()
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for layer in layers:
        layer.compile(**options)
    logger.info(
        "Compiling %d layers: the first steps take longer, all others less. --torch_compile false "
        "turns it off.",
        len(layers),
    )
    return True


def compiling_pays(device: torch.device, dtype: torch.dtype, num_tokens: float) -> bool:
    """Return whether a run is compiled by default: on CUDA, in bfloat16, if it is long enough."""
    is_cuda = device.type == "cuda"
    return is_cuda and dtype is torch.bfloat16 and num_tokens >= TOKENS_TO_AMORTISE


@cache
def keep_row_attention_eager() -> None:
    """Exclude attention by rows from compilation: numpy's dropout masks cannot be traced."""
    attention: Any = Attention
    attention._attend_varlen = torch.compiler.disable(attention._attend_varlen)


def compiler_error(device: torch.device, options: dict[str, Any]) -> str:
    """Compile a small function; return the error in one line, "" if it works."""

    def line(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    before, torch._dynamo.config.suppress_errors = torch._dynamo.config.suppress_errors, False
    try:
        torch.compile(line, **options)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001  # a backend may raise anything; it is reported
        return " ".join(str(error).split())[:300] or type(error).__name__
    finally:
        torch._dynamo.config.suppress_errors = before
    return ""
