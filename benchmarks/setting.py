"""What every benchmark needs: a random model of a given size, real row lengths, the machine in
words.

Weights and token ids are random; the lengths of prompts and answers are those of real rows.
"""

import json
import platform
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from ptuning.data.dataset import load_training_dataset
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.model.linear import Linear, pack_weights_
from ptuning.nano.paths import NANO_DIR

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # name -> layers, hidden size, heads, vocabulary
    "small": (28, 512, 8, 16384),
    "chatglm-6b": (28, 4096, 32, 130528),
}
MAX_LENGTH = 64  # tokens of prompt and of answer, as published


def refuse_below_one(parser: ArgumentParser, flags: Namespace, *names: str) -> None:
    """End with the parser's error where one of the named counts is not 1 or more."""
    for name in names:
        if getattr(flags, name) < 1:
            parser.error(f"--{name} is {getattr(flags, name)}; use 1 or more.")


class BenchRow(NamedTuple):
    """One row of random tokens with a real row's lengths."""

    input_ids: Tensor  # (S,)
    labels: Tensor  # (S,), -100 for the context


def add_common_flags(parser: ArgumentParser) -> None:
    """Declare the flags that all benchmarks of the model share."""
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; unset is torch's own choice")
    parser.add_argument("--prefix", type=int, default=128, help="prefix length in tokens")
    parser.add_argument(
        "--rows_file",
        default=str(ROOT / "AdvertiseGen/sample/train.json"),
        help="rows whose lengths count",
    )
    parser.add_argument(
        "--tokenizer", default=str(NANO_DIR), help="folder of the tokenizer that gives the lengths"
    )
    parser.add_argument("--json", type=json_file, help="write the figures here too")


def make_model(flags: Namespace) -> ChatGLMForConditionalGeneration:
    """Build a random model with a fresh prefix, its base frozen."""
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
    model.add_prefix(flags.prefix)
    model.freeze_base()
    return model


def make_rows(flags: Namespace, config: ChatGLMConfig, count: int) -> list[BenchRow]:
    """Return random rows with the lengths of the first `count` rows of the file."""
    tokenizer = ChatGLMTokenizer.from_pretrained(flags.tokenizer)
    dataset, _ = load_training_dataset(
        Path(flags.rows_file),
        tokenizer,
        prompt_column="content",
        response_column="summary",
        max_source_length=MAX_LENGTH,
        max_target_length=MAX_LENGTH,
        max_rows=count,
        show_progress=False,
    )
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(len(dataset)):
        labels = dataset[index]["labels"]
        context = int((labels == -100).sum())
        ids = torch.randint(10, config.vocab_size - 10, (len(labels),), generator=generator)
        ids[context - 1], ids[context] = config.gmask_token_id, config.bos_token_id
        rows.append(BenchRow(ids, torch.where(labels == -100, -100, ids)))
    return rows


def synchronise(device: str) -> None:
    """Wait for the device, so that a clock read now means something."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(device: str, work: Callable[[], object]) -> float:
    """Run work once and return how long it took."""
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
    pack_weights_(linear, room_bytes=2**30)
    best = min(best, *(seconds(flags.device, lambda: linear.product(x)) for _ in range(6)))
    return 2 * size**3 / best


def machine() -> str:
    """Name the hardware and the versions in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return (
        f"{device or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}"
    )


def json_file(text: str) -> Path:
    """Return a path for --json, of which the folder is there: a benchmark writes last."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{text}: there is no folder {path.absolute().parent}; make it")
    return path


def write_json(flags: Namespace, figures: dict[str, object]) -> None:
    """Write the figures where --json says."""
    if flags.json:
        flags.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
