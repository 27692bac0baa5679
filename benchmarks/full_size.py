"""Full-size test without weights: a random ChatGLM-6B in the published format, loaded and trained.

    python -m benchmarks.full_size [--quantization_bit 4] [--recompute 16] [--directory DIR]

The checkpoint is written by another process, so that this process's peak memory is that of loading
and training. It is then loaded as main.py does, and trained with the published setting: one row of
128 tokens, a prefix of 128. --recompute is the number of layers with gradient checkpointing (0);
main.py chooses it by free memory. Values are random: the loss need only be finite.
"""

import math
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.random_checkpoint import BITS, check_room, checkpoint_bytes, write_checkpoint
from benchmarks.row_lengths import MAX_LENGTH
from benchmarks.setting import SIZES, device_name, json_file, machine, synchronise, write_json
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import read_checkpoint
from ptuning.train.fit import checkpoint_layers, keep_freed_memory
from ptuning.tunings.loading import load_base

LEARNING_RATE = 2e-2  # the published one


def say(text: str) -> None:
    """Print and flush, so that a log shows the progress of a long run."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Stage(NamedTuple):
    """One part of the run; memory is the process's peak so far."""

    name: str
    time_s: float
    host_peak_bytes: int
    device_peak_bytes: int | None  # allocated by torch; None on a CPU


def host_peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """Return the largest resident set so far, mapped files included; Linux counts in KiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def measure(name: str, device: str, work: Callable[[], None]) -> Stage:
    """Run one stage and print its line."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    time_s = time.perf_counter() - started
    on_device = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    stage = Stage(name, time_s, host_peak_bytes(), on_device)
    say(row_of(stage))
    return stage


def row_of(stage: Stage) -> str:
    """Return the stage's line of the table."""
    on_device = "-" if stage.device_peak_bytes is None else gigabytes(stage.device_peak_bytes)
    return (
        f"{stage.name:<12}{stage.time_s:>10.1f}{gigabytes(stage.host_peak_bytes):>14}"
        f"{on_device:>16}"
    )


def gigabytes(num_bytes: int) -> str:
    """Write bytes in GB of 10**9.

    >>> gigabytes(4_700_000_000)
    '4.70'
    """
    return f"{num_bytes / 1e9:.2f}"


def make_batch(model: ChatGLMForConditionalGeneration, device: str) -> dict[str, Tensor]:
    """Return one row of 64 prompt and 64 answer tokens; the answer begins with <sop>."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, config.vocab_size // 2, (1, 2 * MAX_LENGTH), generator=generator)
    ids[0, MAX_LENGTH - 1], ids[0, MAX_LENGTH] = config.gmask_token_id, config.bos_token_id
    labels = ids.clone()
    labels[0, :MAX_LENGTH] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def load(directory: Path, flags: Namespace) -> ChatGLMForConditionalGeneration:
    """Load the base as main.py does, put it on the device and give it a fresh prefix."""
    where = {"device_map": flags.device} if flags.device != "cpu" else {}
    model = load_base(
        str(directory),
        dtype=getattr(torch, flags.dtype),
        quantization_bit=flags.quantization_bit or None,
        quantization_backend=flags.quantization_backend,
        **where,
    )
    model.add_prefix(flags.prefix)
    model.freeze_base()
    if flags.recompute:
        checkpoint_layers(model, flags.recompute)
        if flags.device == "cpu":
            keep_freed_memory(False)
    return model.train()


def train(model: ChatGLMForConditionalGeneration, flags: Namespace) -> tuple[list[Stage], float]:
    """Take the steps, each a stage; return them and the last loss, finite or FloatingPointError."""
    encoder = model.prefix_encoder
    assert encoder is not None, "load attaches one"
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )  # as the trainer does
    batch = make_batch(model, flags.device)
    losses: list[float] = []

    def step() -> None:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    stages = [measure(f"step {n + 1}", flags.device, step) for n in range(flags.steps)]
    if not math.isfinite(losses[-1]):
        raise FloatingPointError(f"the loss is {losses[-1]} after {flags.steps} steps.")
    return stages, losses[-1]


@contextmanager
def directory_for(flags: Namespace) -> Iterator[Path]:
    """Yield the directory to use: an existing checkpoint's, or a new one.

    A new one is removed at the end unless --keep, and always if writing did not finish.
    """
    if flags.directory is not None and flags.directory.exists() and any(flags.directory.iterdir()):
        yield flags.directory  # an existing checkpoint is loaded as it is and never removed
        return
    check_room(
        flags.directory or Path(tempfile.gettempdir()),
        checkpoint_bytes(flags.size, flags.stored_bit),
    )
    if flags.directory is None:
        directory = Path(tempfile.mkdtemp(prefix="chatglm-full-size-"))
    else:
        directory = flags.directory
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield directory
    finally:
        if not (flags.keep and (directory / "config.json").is_file()):
            shutil.rmtree(directory)


def write(directory: Path, flags: Namespace) -> Stage:
    """Write the checkpoint in another process; return its time and its peak memory."""
    started = time.perf_counter()
    arguments = (directory, flags.size, flags.stored_bit)
    process = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise OSError(f"writing to {directory} ended with status {process.exitcode}.")
    time_s = time.perf_counter() - started
    stage = Stage("write", time_s, host_peak_bytes(resource.RUSAGE_CHILDREN), None)
    say(row_of(stage))
    return stage


def run(directory: Path, flags: Namespace) -> dict[str, object]:
    """Write unless there is a checkpoint already, load, train; return all figures."""
    say(f"{'':<12}{'seconds':>10}{'host peak GB':>14}{'device peak GB':>16}")
    stages = [] if any(directory.iterdir()) else [write(directory, flags)]
    models: list[ChatGLMForConditionalGeneration] = []
    stages.append(measure("load", flags.device, lambda: models.append(load(directory, flags))))
    steps, loss = train(models[0], flags)
    summary = read_checkpoint(directory)
    disk_bytes = sum(file.stat().st_size for file in directory.glob("*.bin"))
    weight_bytes = sum(value.nbytes for _, value in models[0].base_parameters())
    say(
        f"read: {summary}\n"
        f"weights: {gigabytes(disk_bytes)} GB on disk, {gigabytes(weight_bytes)} GB in memory; "
        f"last loss {loss:.2f}\n"
        f"{describe(flags)}\n{machine()}"
    )
    return {
        "setting": describe(flags),
        "machine": machine(),
        "stages": [stage._asdict() for stage in stages + steps],
        "disk_bytes": disk_bytes,
        "weight_bytes": weight_bytes,
        "loss": loss,
    }


def describe(flags: Namespace) -> str:
    """Return one line that describes the run."""
    weights = f"int{flags.quantization_bit}" if flags.quantization_bit else flags.dtype
    stored = f"int{flags.stored_bit}" if flags.stored_bit else "float16"
    return (
        f"{flags.size}, {weights} weights from {stored}, {flags.dtype} activations on "
        f"{flags.device}, batch 1 x {2 * MAX_LENGTH} tokens, prefix {flags.prefix}, gradient "
        f"checkpointing of {flags.recompute} layers"
    )


def parse(argv: list[str]) -> Namespace:
    """Read the flags and fill in defaults."""
    parser = ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("--quantization_bit", type=int, choices=BITS, default=4)
    parser.add_argument(
        "--stored_bit",
        type=int,
        choices=BITS,
        help="bits of the layers' weights on disk, 0 for float16; unset is --quantization_bit",
    )
    parser.add_argument("--quantization_backend", default="auto")
    parser.add_argument("--size", choices=SIZES, default="chatglm-6b")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=default)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="unset is float32 on a CPU with quantised weights, else bfloat16",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; unset is torch's own choice")
    parser.add_argument("--prefix", type=int, default=128, help="prefix length in tokens")
    parser.add_argument("--steps", type=int, default=1, help="training steps, each timed alone")
    parser.add_argument(
        "--recompute",
        type=int,
        default=0,
        help="number of layers with gradient checkpointing",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        help="where to write, or a checkpoint to load as it lies; unset is the temporary folder",
    )
    parser.add_argument("--keep", action="store_true", help="do not remove what was written")
    parser.add_argument("--json", type=json_file, help="write the figures here too")
    flags = parser.parse_args(argv)
    if flags.stored_bit is None:
        flags.stored_bit = flags.quantization_bit
    if flags.stored_bit not in (0, flags.quantization_bit):
        parser.error(
            f"--stored_bit is {flags.stored_bit} with --quantization_bit {flags.quantization_bit}; "
            "use 0 or the same."
        )
    num_layers = SIZES[flags.size][0]
    if not 0 <= flags.recompute <= num_layers:
        parser.error(f"--recompute is {flags.recompute}; use 0 to {num_layers}.")
    if flags.dtype is None:
        is_small = flags.device == "cpu" and flags.quantization_bit
        flags.dtype = "float32" if is_small else "bfloat16"
    return flags


def main(argv: list[str]) -> int:
    """Print the table; return 2 with a one-line error for a bad disk or checkpoint."""
    flags = parse(argv)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    try:
        with directory_for(flags) as directory:
            figures = run(directory, flags)
            if flags.keep:
                say(f"kept: {directory}")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"full_size: {error}\n")
        return 2
    write_json(flags, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
