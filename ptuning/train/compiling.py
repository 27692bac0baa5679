"""torch.compile for layers: `--torch_compile`, and the default on CUDA in bfloat16 for long runs.

The compiler fuses the element-wise operations between the matrix products, which are bound by
memory bandwidth. On a CPU that does not pay off: its matrix products are slower than oneDNN's,
which this toolkit uses (docs/performance.md).
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from ptuning.model.attention import Attention
from ptuning.model.layers import Layer

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
    wanted None compiles where it pays off, and a backend or a mode asks for it too. num_tokens is
    how many tokens the run trains on. A layer that the compiler fails on later runs uncompiled,
    with the compiler's own warning.
    """
    if backend or mode:
        wanted = True
    if wanted is None:
        wanted = pays(device, next(model.parameters()).dtype, num_tokens)
    if not wanted:
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
    reason = why_not(device, options)
    if reason:
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


def pays(device: torch.device, dtype: torch.dtype, num_tokens: float) -> bool:
    """Tell whether a run is compiled by default: on CUDA, in bfloat16, if it is long enough."""
    is_cuda = device.type == "cuda"
    return is_cuda and dtype is torch.bfloat16 and num_tokens >= TOKENS_TO_AMORTISE


@cache
def keep_row_attention_eager() -> None:
    """Exclude attention by rows from compilation: its dropout masks come from numpy's random
    bytes, which cannot be traced.
    """
    attention: Any = Attention
    attention._attend_rows = torch.compiler.disable(attention._attend_rows)


def why_not(device: torch.device, options: dict[str, Any]) -> str:
    """Compile one line of arithmetic; return the error in one line, "" if it works.

    The most common are a missing C compiler, a missing Triton and an unknown backend.
    """

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
