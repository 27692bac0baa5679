"""Shared by the benchmarks: a random model of a given size, rows, a description of the machine.

Weights and token ids are random; the lengths of prompts and answers are those of real rows of ADGEN
(`benchmarks.row_lengths`), or of the rows that --rows_file names.
"""

import json
import platform
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from benchmarks.row_lengths import ADGEN, RowLength, lengths_of
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import Linear, prepack_weights_
from ptuning.model.quantization.layers import quantize_model_
from ptuning.storage import SUPPORTED_BITS
from ptuning.tunings.loading import NANO_DIR

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # name -> layers, hidden size, heads, vocabulary
    "tiny": (2, 64, 2, 512),  # to try a command; its figures are meaningless
    "nano": (4, 192, 4, 2300),  # the shipped model's
    "small": (28, 512, 8, 16384),
    "chatglm-6b": (28, 4096, 32, 130528),
}


def refuse_below_one(parser: ArgumentParser, flags: Namespace, *names: str) -> None:
    """Exit with the parser's error if one of the named counts is below 1."""
    for name in names:
        if getattr(flags, name) < 1:
            parser.error(f"--{name} is {getattr(flags, name)}; use 1 or more.")


class BenchRow(NamedTuple):
    """One row of random tokens with a real row's lengths."""

    input_ids: Tensor  # (S,)
    labels: Tensor  # (S,), -100 for the context


def add_common_flags(parser: ArgumentParser) -> None:
    """Declare the flags that the model's benchmarks share."""
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--quantization_bit",
        type=int,
        choices=SUPPORTED_BITS,
        help="bits of the layers' weights; unset leaves them in --dtype",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=default)
    parser.add_argument("--threads", type=int, help="CPU threads; unset is torch's own choice")
    parser.add_argument("--prefix", type=int, default=128, help="prefix length in tokens")
    parser.add_argument(
        "--rows_file", help="take the lengths of these rows; unset takes real ones of ADGEN"
    )
    parser.add_argument(
        "--tokenizer",
        help="folder of the tokenizer that counts the tokens of --rows_file; unset is nano's",
    )
    parser.add_argument("--json", type=json_file, help="write the figures here too")


def parse_common(parser: ArgumentParser, argv: list[str], *counts: str) -> Namespace:
    """Read the flags; refuse a named count below 1, and a tokenizer without rows."""
    flags = parser.parse_args(argv)
    refuse_below_one(parser, flags, *counts)
    if flags.tokenizer and not flags.rows_file:
        parser.error("--tokenizer counts the tokens of --rows_file; give that too.")
    return flags


def make_model(flags: Namespace) -> ChatGLMForConditionalGeneration:
    """Build a random model on the device, quantised there, with a fresh prefix, its base frozen."""
    if flags.threads:
        torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    num_layers, hidden_size, num_heads, vocab_size = SIZES[flags.size]
    config = ChatGLMConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_attention_heads=num_heads,
        inner_hidden_size=4 * hidden_size,
        bos_token_id=vocab_size - 4,
        eos_token_id=vocab_size - 3,
        mask_token_id=vocab_size - 2,
        gmask_token_id=vocab_size - 1,
        tie_word_embeddings=True,
    )
    dtype: torch.dtype = getattr(torch, flags.dtype)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(flags.device):
            model = ChatGLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    bits = getattr(flags, "quantization_bit", None)
    if bits:
        quantize_model_(model, bits)
        if flags.device.startswith("cuda"):
            torch.cuda.empty_cache()  # otherwise the float weights stay reserved
    model.add_prefix(flags.prefix)
    model.freeze_base()
    return model


def make_rows(flags: Namespace, config: ChatGLMConfig, count: int) -> list[BenchRow]:
    """Return `count` random rows with real lengths, repeated if there are fewer."""
    lengths: Sequence[RowLength] = ADGEN
    if flags.rows_file:
        lengths = lengths_of(Path(flags.rows_file), flags.tokenizer or str(NANO_DIR), count)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, answer in islice(cycle(lengths), count):
        ids = torch.randint(10, config.vocab_size - 10, (prompt + answer,), generator=generator)
        ids[prompt - 1], ids[prompt] = config.gmask_token_id, config.bos_token_id
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append(BenchRow(ids, labels))
    return rows


def synchronise(device: str) -> None:
    """Wait for the device before the clock is read."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(device: str, work: Callable[[], object]) -> float:
    """Run work once and return its time in seconds."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def matmul_flops_per_s(flags: Namespace) -> float:
    """Measure the machine's fastest matrix product in the benchmark's dtype, FLOP/s."""
    size = 8192 if flags.device.startswith("cuda") else 2048
    dtype: torch.dtype = getattr(torch, flags.dtype)
    linear = Linear(size, size, bias=False, device=flags.device, dtype=dtype)
    linear.requires_grad_(False)
    x = torch.randn(size, size, device=flags.device, dtype=dtype)
    best = min(seconds(flags.device, lambda: linear.product(x)) for _ in range(6))
    prepack_weights_(linear, room_bytes=2**30)
    best = min(best, *(seconds(flags.device, lambda: linear.product(x)) for _ in range(6)))
    return 2 * size**3 / best


def weights_of(flags: Namespace) -> str:
    """Return the storage of the layers' weights and the dtype of activations."""
    bits = getattr(flags, "quantization_bit", None)
    return f"int{bits} in {flags.dtype}" if bits else str(flags.dtype)


def machine() -> str:
    """Return the hardware and the versions in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return (
        f"{device or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}"
    )


def device_name(text: str) -> str:
    """Return a --device; refuse CUDA where PyTorch sees none."""
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentTypeError(f"{text}: torch {torch.__version__} sees no CUDA device; use cpu")
    return text


def json_file(text: str) -> Path:
    """Return a path for --json whose folder exists: a benchmark writes at the end."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{text}: there is no folder {path.absolute().parent}; make it")
    return path


def write_json(flags: Namespace, figures: dict[str, object]) -> None:
    """Write the figures to the --json file."""
    if flags.json:
        flags.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
