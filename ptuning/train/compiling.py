"""Compiled layers: `--torch_compile`, and the default on CUDA in bfloat16 for long runs.

The compiler fuses the element-wise steps between the products, which are bound by memory bandwidth.
On a CPU that does not pay: its matrix products are slower than oneDNN's, which this toolkit uses
(docs/performance.md).
"""

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ptuning.model.attention import Attention
from ptuning.model.layer import Layer

# Compiling takes up to a minute and saves about 11 us a token on an H100 (17 ms of a step of 1,547
# tokens, by the bytes it no longer moves): 60 s / 11 us = 5.5 million tokens.
TOKENS_TO_AMORTISE = 6_000_000

logger = logging.getLogger("main")


class Compiling(NamedTuple):
    """What --torch_compile, --torch_compile_backend and --torch_compile_mode ask for."""

    wanted: bool | None  # None: where it pays
    backend: str | None
    mode: str | None


def take_compiling(training: Any) -> Compiling:
    """Read the flags, and tell transformers nothing: it would compile the model as a whole."""
    backend, mode = training.torch_compile_backend, training.torch_compile_mode
    wanted = True if backend or mode else training.torch_compile
    training.torch_compile = False
    training.torch_compile_backend = training.torch_compile_mode = None
    return Compiling(wanted, backend, mode)


def compile_layers(
    model: nn.Module, asked: Compiling, device: torch.device, *, num_tokens: float = 0
) -> bool:
    """Compile the model's layers if that was asked for or pays; return whether it was done.

    num_tokens is how many tokens the run trains on. A layer that the compiler cannot take later
    runs as it is, with the compiler's own warning.
    """
    wanted = asked.wanted
    if wanted is None:
        wanted = pays(device, next(model.parameters()).dtype, num_tokens)
    if not wanted:
        return False
    if device.type == "cpu" and asked.backend is None:
        logger.info(
            "--torch_compile is left out: on a CPU a compiled step is slower than a plain one. "
            "To have it all the same, add --torch_compile_backend inductor."
        )
        return False
    options: dict[str, Any] = {"dynamic": True}  # batches differ in length
    options |= {"backend": asked.backend} if asked.backend else {}
    options |= {"mode": asked.mode} if asked.mode else {}
    reason = why_not(device, options)
    if reason:
        logger.warning("--torch_compile: the layers run uncompiled, as %s", reason)
        return False
    torch._dynamo.config.suppress_errors = True  # what it cannot compile runs, with a warning
    if device.type == "cpu":
        keep_row_attention_eager()
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for layer in layers:
        layer.compile(**options)
    logger.info(
        "Compiling %d layers: the first steps take longer, the others less. --torch_compile false "
        "leaves it out.",
        len(layers),
    )
    return True


def pays(device: torch.device, dtype: torch.dtype, num_tokens: float) -> bool:
    """Say whether a run is compiled when no flag decides: on CUDA, in bfloat16, if it is long."""
    is_cuda = device.type == "cuda"
    return is_cuda and dtype is torch.bfloat16 and num_tokens >= TOKENS_TO_AMORTISE


@cache
def keep_row_attention_eager() -> None:
    """Have the compiler step over attention of packed rows: its dropout masks are made of numpy's
    random bytes, which cannot be traced.
    """
    attention: Any = Attention
    attention._attend_rows = torch.compiler.disable(attention._attend_rows)


def why_not(device: torch.device, options: dict[str, Any]) -> str:
    """Compile one line of arithmetic and return how that failed in one line, "" when it works.

    The commonest are a missing C compiler, a missing Triton and an unknown backend.
    """

    def line(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    before, torch._dynamo.config.suppress_errors = torch._dynamo.config.suppress_errors, False
    try:
        torch.compile(line, **options)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001  # a backend may raise anything; all of it is told
        return " ".join(str(error).split())[:300] or type(error).__name__
    finally:
        torch._dynamo.config.suppress_errors = before
    return ""
