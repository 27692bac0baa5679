"""What commands share that ask a model: checks of their flags, the model, the endpoint."""

import argparse
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ptuning.commands.answer import open_model
from ptuning.commands.asking_flags import OPENAI_KEY_VARIABLE
from ptuning.completions.endpoint import EndpointSource
from ptuning.completions.source import EngineSource, Source
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.tunings.loading import base_of, find_model, refuse_other_kinds

CONCURRENCY = 5  # prompts in work at once
TIMEOUT_S = 120.0


def check_least(arguments: argparse.Namespace, **least: float) -> None:
    """Refuse a number below the least one for its flag (ValueError); unset ones pass."""
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= smallest:  # so NaN is refused too
            raise ValueError(f"--{name} is {value}; use {smallest:g} or more.")


def refuse_endpoint_flags(arguments: argparse.Namespace, *names: str) -> None:
    """Refuse the named flags, which do nothing without --endpoint."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is for --endpoint URL; give that too, or leave it out.")


def open_endpoint(arguments: argparse.Namespace) -> EndpointSource:
    """Connect to what the flags of `add_endpoint_flags` name; ValueError for one that is wrong."""
    url, key_name = arguments.endpoint, arguments.api_key_env or OPENAI_KEY_VARIABLE
    if arguments.model is None:
        raise ValueError("--endpoint needs the name of a model: --model NAME.")
    if not re.fullmatch(r"https?://(\[.+\]|[^/:]+)(:\d+)?(/.*)?", url):
        raise ValueError(f"--endpoint is {url}; give it as http://localhost:8000.")
    if importlib.util.find_spec("openai") is None:
        raise ValueError("openai is not installed; type: python -m pip install 'openai>=2'")
    if arguments.api_key_env is not None and key_name not in os.environ:
        raise ValueError(f"--api_key_env is {key_name}, a variable that is not set; export it.")
    check_least(arguments, concurrency=1, timeout=0.001)
    return EndpointSource(
        url.rstrip("/"),
        arguments.model,
        api=arguments.api or "chat",
        concurrency=arguments.concurrency or CONCURRENCY,
        timeout_s=arguments.timeout or TIMEOUT_S,
        key=os.environ.get(key_name),
        key_name=key_name,
    )


def open_source(arguments: argparse.Namespace) -> Source:
    """Return what --endpoint names, or load the model with its prefix."""
    if arguments.endpoint is None:
        refuse_endpoint_flags(arguments, "model", "api", "api_key_env", "timeout")
        model, tokenizer, name = open_base(arguments)
        max_rows = arguments.concurrency or CONCURRENCY
        return EngineSource(model, tokenizer, name=name, max_rows=max_rows)
    for flag in ("model_name_or_path", "prefix", "quantization_bit"):
        if getattr(arguments, flag) is not None:
            raise ValueError(
                f"--{flag} loads a model in this process; leave it out with --endpoint."
            )
    return open_endpoint(arguments)


def open_base(
    arguments: argparse.Namespace,
) -> tuple[ChatGLMForConditionalGeneration, ChatGLMTokenizer, str]:
    """Load --model_name_or_path, or what --prefix was trained on, with it; return its name too."""
    name, prefix, bits = (
        getattr(arguments, flag) for flag in ("model_name_or_path", "prefix", "quantization_bit")
    )
    if prefix is not None:
        refuse_other_kinds(prefix)
        name = name or base_of(prefix, flag="--model_name_or_path")
    named = find_model(name or "nano", flag="--model_name_or_path")
    model, tokenizer = open_model(named, bits, prefix=prefix)
    said = (name or "nano", prefix and f"with {prefix}", bits and f"in {bits} bits")
    return model, tokenizer, " ".join(part for part in said if part)


def check_out(
    out: Path, mark: Path, reads: Iterable[Path] = (), own: str = "(?!)", journals: str = "(?!)"
) -> None:
    """Refuse an --out that is no .jsonl file, another command's, or would overwrite what is read.

    mark is the file next to it by which this command knows its own. own and journals are patterns
    of the names, after the stem of out, of other files that it writes, or continues.
    """
    if out.is_dir():
        raise ValueError(f"--out is {out}, a folder; name a file in it that ends in .jsonl.")
    if out.suffix != ".jsonl":
        raise ValueError(f"--out is {out}; name a file that ends in .jsonl.")
    stem = re.escape(out.stem)
    for path in reads:
        is_beside = path.resolve().parent == out.resolve().parent
        if is_beside and re.fullmatch(rf"{stem}(\.jsonl|{own}|{journals})", path.name):
            raise ValueError(f"{path} is read, and --out {out} overwrites it; give another name.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: the folder {out.parent} cannot be written to.")
    others = [p for p in out.parent.iterdir() if re.fullmatch(rf"{stem}(\.jsonl|{own})", p.name)]
    if others and not mark.exists():
        which = f"--out {out}" if out in others else str(others[0])
        raise ValueError(f"{which} exists and is not of this command; give another name.")
