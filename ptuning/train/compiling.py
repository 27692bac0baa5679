"""`--torch_compile`: the layers compiled where that pays, and said aloud where it does not.

On a CPU it does not: the compiler's matrix products are slower than oneDNN's, which this toolkit
uses, and each new batch length is compiled anew (docs/performance.md). On CUDA the element-wise
steps between the products are fused.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from ptuning.model.layer import Layer

logger = logging.getLogger("main")


class Compiling(NamedTuple):
    """What --torch_compile, --torch_compile_backend and --torch_compile_mode ask for."""

    wanted: bool
    backend: str | None
    mode: str | None


def take_compiling(training: Any) -> Compiling:
    """Read the flags, and tell transformers nothing: it would compile the model as a whole."""
    backend, mode = training.torch_compile_backend, training.torch_compile_mode
    wanted = bool(training.torch_compile or backend or mode)
    training.torch_compile = False
    training.torch_compile_backend = training.torch_compile_mode = None
    return Compiling(wanted, backend, mode)


def compile_layers(model: nn.Module, asked: Compiling, device: torch.device) -> bool:
    """Compile the model's layers if that was asked for, and say so; return whether it was done.

    A layer that the compiler cannot take later runs as it is, with the compiler's own warning.
    """
    if not asked.wanted:
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
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for layer in layers:
        layer.compile(**options)
    logger.info("Compiling %d layers; the first steps take longer.", len(layers))
    return True


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
