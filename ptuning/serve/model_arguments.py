"""The flags that chat and serve share: which base and prefixes, and how the base is loaded."""

import argparse
from typing import Any


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    parser.add_argument(
        "--prefix",
        action="append",
        default=[],
        metavar="NAME=DIRECTORY",
        help="a trained prefix and the name it is asked for by; may be given many times. Unset, "
        "with --model unset too: what was tuned last under output/, else the nano model alone",
    )
    parser.add_argument(
        "--model",
        metavar="DIRECTORY",
        help="base model, a directory or hub id, or the directory of a LoRA adapter or of a model "
        "that was tuned whole; unset: what the first prefix was trained on",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; unset: a CUDA device if any")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the base; unset: float32 on the CPU, half precision elsewhere",
    )
    parser.add_argument(
        "--quantization_bit",
        type=int,
        choices=(4, 8),
        help="quantise the base as it is read; unset: as it is stored",
    )


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `Session.load` takes of them."""
    return {
        "dtype": arguments.dtype,
        "device": arguments.device,
        "quantization_bit": arguments.quantization_bit,
    }
