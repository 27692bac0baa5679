"""The stages of `python -m benchmarks.cuda`: each yields its figures as soon as they are known.

A stage runs in its own process, so it may fail, run out of memory or be stopped. Models are random,
created and quantised on the device. Stages that need no CUDA also run on a CPU, at a small size.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import full_size
from benchmarks.cuda_tiles import tile_times
from benchmarks.generate import Speed, answer, make_questions, memory_gb_per_s, own_prefix
from benchmarks.memory import forget_peak, peak_bytes
from benchmarks.row_lengths import MAX_LENGTH
from benchmarks.setting import ROOT, SIZES, make_model, make_rows, matmul_flops_per_s, seconds
from benchmarks.train import measure_steps, our_step
from benchmarks.train import parse as train_flags
from ptuning.model.quantization.backends import AUTO, pick_backend
from ptuning.model.quantization.reference import packed_columns
from ptuning.train.fit import checkpoint_layers, compile_layers

PACKAGES = "torch transformers triton accelerate numpy jieba rouge-chinese nltk pytest-xdist"
DTYPE = "bfloat16"
BATCHES = (1, 16, 64)  # rows of a training step
COMPILED_ROWS = (3, 16, 64, 100, 128, 256, 1547)  # of products: one for each kernel and row tile
MOST_WORKERS = 12
NUM_KERNELS = 12  # lines of a profile


class Target(NamedTuple):
    """Where a stage runs, and a key of SIZES."""

    device: str
    size: str

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a CUDA device."""
        return self.device.startswith("cuda")


class Figure(NamedTuple):
    """One line of the table."""

    name: str
    value: float | str
    unit: str = ""


class Decoding(NamedTuple):
    """Rows to decode, how many at a time, and whether steps may be captured as CUDA graphs."""

    num_rows: int
    batch: int
    graphs: bool = True


class Stage(NamedTuple):
    """A stage and its time limit on a GPU."""

    run: Callable[[Target], Iterator[Figure]]
    limit_s: float
    needs_cuda: bool = False


def flags_for(target: Target, bits: int = 0, steps: int = 5) -> Namespace:
    """Return the flags of benchmarks.train; bits 0 leaves the weights in bfloat16."""
    words = ["--device", target.device, "--size", target.size, "--dtype", DTYPE]
    words += ["--steps", str(steps)]
    return train_flags(words + (["--quantization_bit", str(bits)] if bits else []))


def device(target: Target) -> Iterator[Figure]:
    """Versions, the device, its bandwidth and matmul rate, and attention's back ends."""
    yield Figure("versions", ", ".join(f"{name} {version_of(name)}" for name in PACKAGES.split()))
    if target.on_cuda:
        found = torch.cuda.get_device_properties(torch.device(target.device))
        yield Figure(
            "device",
            f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{found.multi_processor_count} SMs, CUDA {torch.version.cuda}, "
            f"cuDNN {torch.backends.cudnn.version()}",
        )
        yield Figure("device memory", found.total_memory / 1e9, "GB")
    yield Figure("read bandwidth", memory_gb_per_s(target.device), "GB/s")
    yield Figure("matmul rate", matmul_flops_per_s(flags_for(target)) / 1e12, "TFLOP/s")
    yield from attention_times(target)


def version_of(package: str) -> str:
    """Return the installed version, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def attention_times(target: Target) -> Iterator[Figure]:
    """Time attention of 16 rows in one layer, both passes; a new shape may need a new plan."""
    _, hidden_size, num_heads, _ = SIZES[target.size]
    where = {"device": target.device, "dtype": getattr(torch, DTYPE), "requires_grad": True}
    query = torch.randn(16, num_heads, 128, hidden_size // num_heads, **where)
    keys = torch.randn(16, num_heads, 256, hidden_size // num_heads, **where)

    def attend(length: int) -> None:
        own = keys[:, :, : 128 + length]
        mask = query.new_zeros(16, 1, length, 256)[..., : 128 + length]  # row strides stay 256
        found = functional.scaled_dot_product_attention(query[:, :, :length], own, own, mask)
        found.sum().backward()

    every = dict(SDPBackend.__members__)
    named = {"torch's choice": list(every.values())}
    named |= {name: [every[name]] for name in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")}
    for name, backends in named.items():
        try:
            with sdpa_kernel(backends):
                for what, length in (("first", 128), ("again", 128), ("new shape", 121)):
                    time_s = seconds(target.device, partial(attend, length))
                    yield Figure(f"attention, {name}: {what}", 1e3 * time_s, "ms")
        except RuntimeError as error:  # torch's for a back end that does not take these tensors
            yield Figure(f"attention, {name}", f"not available: {str(error).splitlines()[0]}")


def smoke(target: Target) -> Iterator[Figure]:
    """Train and decode at hidden size 512 in every precision: a crash here costs only seconds."""
    target = target._replace(size="small") if target.size == "chatglm-6b" else target
    rate = matmul_flops_per_s(flags_for(target))
    for bits in (0, 8, 4):
        flags = flags_for(target, bits, steps=2)
        model, name = make_model(flags), f"int{bits}" if bits else "bf16"
        for count in BATCHES[:2]:
            rows = make_rows(flags, model.config, count)
            time_s = measure_steps("ours", model, rows, flags, rate)["step_time_s"]
            yield Figure(f"{name}, batch {count}: step", 1e3 * time_s, "ms")
        asked = dict(enumerate(make_questions(flags, model, 6, MAX_LENGTH)))
        shares = own_prefix(model)
        speed = answer(model.eval(), asked, max_rows=4, shares=shares, device=target.device)
        yield Figure(f"{name}, decoding", speed.tokens_per_s, "tokens/s")
        if speed.why_no_graphs:
            yield Figure(f"{name}, decoding: no CUDA graphs", speed.why_no_graphs)


class Outcomes:
    """A pytest plugin that counts tests by outcome."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Read the counts at the end of the run."""
        kinds = ("passed", "failed", "error", "skipped")
        self.counts = {kind: len(terminalreporter.stats.get(kind, ())) for kind in kinds}


def tests(target: Target) -> Iterator[Figure]:
    """Run the tests marked gpu, on several workers where pytest-xdist is installed."""
    import pytest

    found = (ROOT / "tests").rglob("test_*.py")  # others import what a GPU machine may lack
    files = [str(file) for file in found if "mark.gpu" in file.read_text(encoding="utf-8")]
    workers = ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))] if util.find_spec("xdist") else []
    outcomes = Outcomes()
    arguments = ["-v", "-m", "gpu", "-p", "no:cacheprovider", *workers, *files]
    code = pytest.main(arguments, plugins=[outcomes])
    for kind, count in outcomes.counts.items():
        yield Figure(kind, count, "tests")
    if code:
        raise SystemExit(f"pytest ended with {int(code)}.")


def nano(target: Target) -> Iterator[Figure]:
    """Run train.sh on the nano model for 40 steps: training, decoding and scoring."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"PYTHON": sys.executable, "MODEL": "nano", "MAX_STEPS": "40"}
        environment = os.environ | settings | {"OUTPUT_DIR": folder}
        done = subprocess.run(["bash", "train.sh"], cwd=ROOT, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"train.sh ended with {done.returncode}.")
        text = (Path(folder) / "train_results.json").read_text(encoding="utf-8")
    results = json.loads(text)
    yield Figure("training", results["train_steps_per_second"], "steps/s")
    yield Figure("loss", results["train_loss"])


def kernels(target: Target) -> Iterator[Figure]:
    """Compile the kernels of the quantised products in parallel; later stages find them on disk."""
    jobs = [(bits, count) for bits in (4, 8) for count in COMPILED_ROWS]
    workers = min(MOST_WORKERS, os.cpu_count() or 1, len(jobs))
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        names = set(pool.map(partial(run_products, target), *zip(*jobs, strict=True)))
    yield Figure("back end", ", ".join(sorted(names)))
    yield Figure(f"all kernels, {workers} processes", time.perf_counter() - started, "s")


def run_products(target: Target, bits: int, num_rows: int) -> str:
    """Multiply by a layer's four weights, forward and backward; return the back end's name."""
    place, dtype = torch.device(target.device), getattr(torch, DTYPE)
    backend = pick_backend(AUTO, place, dtype, bits)
    hidden = SIZES[target.size][1]
    for num_out, num_in in ((3, 1), (1, 1), (4, 1), (1, 4)):  # times the hidden size
        num_out, num_in = num_out * hidden, num_in * hidden
        packed = torch.zeros(num_out, packed_columns(num_in, bits), dtype=torch.int8, device=place)
        scale = torch.ones(num_out, dtype=torch.float16, device=place)
        x = torch.zeros(num_rows, num_in, device=place, dtype=dtype)
        product = backend.matmul(x, packed, scale, bits)  # (num_rows, num_out)
        backend.matmul_transposed(product, packed, scale, bits)
    if target.on_cuda:
        torch.cuda.synchronize()
    return backend.name


def train(target: Target, bits: int) -> Iterator[Figure]:
    """Train with 1, 16 and 64 rows per step, profile one, and compare with the published recipe."""
    flags = flags_for(target, bits)
    rate = matmul_flops_per_s(flags)
    model = make_model(flags)
    speeds = {}
    for count in BATCHES:
        rows = make_rows(flags, model.config, count)
        try:
            measured = measure_steps("ours", model, rows, flags, rate)
        except torch.OutOfMemoryError:  # expected of small devices, which answer the rest
            yield Figure(f"batch {count}", "out of memory")
            continue
        speeds[count] = measured["real_tokens_per_s"]
        yield from step_figures(f"batch {count}", measured)
    rows = make_rows(flags, model.config, 16)
    yield from profiled(target, "batch 16", lambda: our_step(model, rows))
    measured = measure_steps("published", model, rows, flags, rate)
    yield from step_figures("batch 16, published recipe", measured)
    if 16 in speeds:
        yield Figure("batch 16: ours / published", speeds[16] / measured["real_tokens_per_s"])


def step_figures(name: str, measured: dict[str, float]) -> Iterator[Figure]:
    """Yield the lines of one training setting."""
    yield Figure(f"{name}: first step", 1e3 * measured["first_step_s"], "ms")
    yield Figure(f"{name}: step", 1e3 * measured["step_time_s"], "ms")
    yield Figure(f"{name}: real tokens", measured["real_tokens_per_s"], "tokens/s")
    yield Figure(f"{name}: MFU", 100 * measured["mfu"], "%")
    if "peak_memory_bytes" in measured:
        yield Figure(f"{name}: peak memory", measured["peak_memory_bytes"] / 1e9, "GB")


def profiled(target: Target, name: str, work: Callable[[], object]) -> Iterator[Figure]:
    """Yield the total GPU kernel time and the slowest kernels; nothing on a CPU."""
    if not target.on_cuda:
        return
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.device_type != DeviceType.CPU]
    events.sort(key=lambda event: -event.self_device_time_total)
    total_us = sum(event.self_device_time_total for event in events)
    launches = sum(event.count for event in events)
    yield Figure(f"{name}: all kernels, {launches} launches", total_us / 1e3, "ms")
    for event in events[:NUM_KERNELS]:
        kernel = f"{name}: {event.key[:60]} x {event.count}"
        yield Figure(kernel, event.self_device_time_total / 1e3, "ms")


def memory(target: Target, bits: int) -> Iterator[Figure]:
    """Measure the published setting, 1 row of 128 tokens, with increasing gradient checkpointing.

    Also with the loss in chunks of 16 tokens, which --gpu_memory 4.6 chooses for int4.
    """
    flags = flags_for(target, bits, steps=2)  # the second finds the optimizer's state
    model = make_model(flags).train()
    weight_bytes = sum(value.nbytes for _, value in model.base_parameters())
    yield Figure("weights", weight_bytes / 1e9, "GB")
    num_layers = model.config.num_layers
    some = min(16, num_layers)
    for count, chunk in dict.fromkeys(((0, None), (some, None), (some, 16), (num_layers, None))):
        checkpoint_layers(model, count)
        model.loss_chunk_tokens = chunk
        forget_peak(target.device)
        full_size.train(model, flags)
        name = f"{count} checkpointed layers{f', chunks of {chunk}' if chunk else ''}"
        yield Figure(f"{name}: peak", peak_bytes(target.device) / 1e9, "GB")
        if target.on_cuda:
            free, total = torch.cuda.mem_get_info()
            reserved = torch.cuda.max_memory_reserved()
            yield Figure(f"{name}: peak of the allocator's pool", reserved / 1e9, "GB")
            yield Figure(f"{name}: in use on the device", (total - free) / 1e9, "GB")


def decode(target: Target, bits: int, cases: Sequence[Decoding]) -> Iterator[Figure]:
    """Decode 64 tokens per row, and profile a single row."""
    flags = flags_for(target, bits)
    model = make_model(flags).eval()
    bandwidth = memory_gb_per_s(target.device)
    run = partial(answer, model, shares=own_prefix(model), device=target.device)
    questions = make_questions(flags, model, max(case.num_rows for case in cases), MAX_LENGTH)
    for num_rows, batch, graphs in cases:
        asked = dict(enumerate(questions[:num_rows]))
        warm = dict(enumerate(questions[:batch]))
        run(warm, max_rows=batch, use_graphs=graphs)  # compiles kernels
        speed = run(asked, max_rows=batch, use_graphs=graphs)
        name = f"{num_rows} rows, batch {batch}{'' if graphs else ', no graphs'}"
        yield from speed_figures(name, speed, bandwidth)
    few = {0: questions[0]._replace(num_answer_tokens=12)}
    work = partial(run, few, max_rows=1, use_graphs=False)
    yield from profiled(target, "batch 1, 12 tokens, no graphs", work)


def speed_figures(name: str, speed: Speed, bandwidth: float) -> Iterator[Figure]:
    """Yield the lines of one decoding setting; with CUDA graphs the median step is a replay."""
    step_s = statistics.median(speed.step_times_s)
    read_gb_per_s = speed.read_bytes / len(speed.step_times_s) / step_s / 1e9
    yield Figure(f"{name}: time with prefill", speed.time_s, "s")
    yield Figure(f"{name}: speed with prefill", speed.tokens_per_s, "tokens/s")
    yield Figure(f"{name}: median step", 1e3 * step_s, "ms")
    yield Figure(f"{name}: reads", read_gb_per_s, "GB/s")
    yield Figure(f"{name}: share of the bandwidth", 100 * read_gb_per_s / bandwidth, "%")
    if speed.why_no_graphs:
        yield Figure(f"{name}: no CUDA graphs", speed.why_no_graphs)


def compiled(target: Target, bits: int) -> Iterator[Figure]:
    """Train with 16 rows, with and without torch.compile."""
    flags = flags_for(target, bits)
    rate = matmul_flops_per_s(flags)
    model = make_model(flags)
    rows = make_rows(flags, model.config, 16)
    plain = measure_steps("ours", model, rows, flags, rate)
    yield from step_figures("batch 16, plain", plain)
    backend = None if target.on_cuda else "eager"
    if not compile_layers(model, torch.device(target.device), wanted=True, backend=backend):
        raise SystemExit("torch.compile was left out; the lines above say why.")
    measured = measure_steps("ours", model, rows, flags, rate)
    yield from step_figures("batch 16, compiled", measured)
    yield Figure("batch 16: plain / compiled", plain["step_time_s"] / measured["step_time_s"])


PAIRS = [Decoding(batch, batch, graphs) for batch in (1, 64) for graphs in (True, False)]
DEV_ROWS = [Decoding(1070, batch) for batch in (64, 128)]  # as many as ADGEN's dev.json has


def tiles(target: Target) -> Iterator[Figure]:
    """Time the fused int4 kernels' tiles."""
    for figure in tile_times(target.device, target.size):
        yield Figure(*figure)


STAGES = {  # the smallest first
    "device": Stage(device, 40),
    "smoke": Stage(smoke, 60),
    "tests": Stage(tests, 100, needs_cuda=True),
    "nano": Stage(nano, 60),
    "kernels": Stage(kernels, 75),
    "train-bf16": Stage(partial(train, bits=0), 70),
    "train-int4": Stage(partial(train, bits=4), 70),
    "memory-int4": Stage(partial(memory, bits=4), 45),
    "decode-int4": Stage(partial(decode, bits=4, cases=PAIRS), 70),
    "evaluate-bf16": Stage(partial(decode, bits=0, cases=DEV_ROWS), 60),
    "train-int8": Stage(partial(train, bits=8), 60),
    "evaluate-int4": Stage(partial(decode, bits=4, cases=DEV_ROWS), 60),
    "compiled-bf16": Stage(partial(compiled, bits=0), 90),
    "tiles": Stage(tiles, 120, needs_cuda=True),
}
