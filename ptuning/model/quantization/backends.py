"""Choose the back end of quantised products: the one asked for, or the fastest that can run.

`auto` logs its choice once, at INFO. Asking by name for a back end that cannot run is an error.
`python -m ptuning doctor` prints which back ends run.
Shapes: M rows of activations, num_out x num_in the weight; packed is (num_out, num_in), in int4
(num_out, num_in / 2).
"""

import logging
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ptuning.model.quantization.cpm_backend import CpmBackend
from ptuning.model.quantization.torch_backend import ACTIVATION_DTYPES, TorchBackend

logger = logging.getLogger(__name__)

AUTO = "auto"
BACKEND_NAMES = ("triton", "cpm_kernels", "torch")  # the fastest first
AUTO_ORDER = {"cuda": BACKEND_NAMES}  # by device type; on all others torch alone


class Backend(Protocol):
    """Multiplies by the weight that `dequantize_weight` returns, without a float copy of it."""

    name: str

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot run there and what to do about that; None if it can."""
        ...

    def matmul(self, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
        ...

    def matmul_transposed(self, grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
        ...


class BackendReport(NamedTuple):
    """Whether a back end runs; reason is None for one that does."""

    name: str
    available: bool
    reason: str | None


def check_backend_name(requested: str) -> None:
    """Raise ValueError unless requested is "auto" or a back end's name."""
    if requested not in (AUTO, *BACKEND_NAMES):
        raise ValueError(
            f"--quantization_backend is {requested!r}; "
            f"use {AUTO}, {', '.join(BACKEND_NAMES[:-1])} or {BACKEND_NAMES[-1]}."
        )


@cache
def get_backend(name: str) -> Backend:
    """Return the only instance of the named back end; ValueError for another name."""
    check_backend_name(name)
    if name == "triton":
        from ptuning.model.quantization.triton_backend import TritonBackend  # imports triton

        return TritonBackend()
    backends: dict[str, type[Backend]] = {"cpm_kernels": CpmBackend, "torch": TorchBackend}
    return backends[name]()


def unavailable_reason(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the named back end cannot multiply activations of dtype on device, or None."""
    if dtype not in ACTIVATION_DTYPES:
        names = ", ".join(map(_short, ACTIVATION_DTYPES))
        return f"the activations are {_short(dtype)}; use one of {names}"
    return get_backend(name).unavailable_reason(device, dtype)


@cache
def pick_backend(requested: str, device: torch.device, dtype: torch.dtype, bits: int) -> Backend:
    """Return the back end for activations of dtype on device; ValueError if it cannot run there.

    bits is for the messages only.
    """
    check_backend_name(requested)
    where = f"int{bits} weights and {_short(dtype)} activations on {device}"
    names = AUTO_ORDER.get(device.type, ("torch",)) if requested == AUTO else (requested,)
    reasons: dict[str, str] = {}
    for name in names:
        reason = unavailable_reason(name, device, dtype)
        if reason is None:
            if requested == AUTO:
                passed_over = "".join(f"; not {other}: {why}" for other, why in reasons.items())
                logger.info("quantization backend for %s: %s%s", where, name, passed_over)
            return get_backend(name)
        reasons[name] = reason
    if requested != AUTO:
        raise ValueError(
            f"--quantization_backend is {requested}, which cannot run {where}: "
            f"{reasons[requested]}. Or use --quantization_backend {AUTO}."
        )
    listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    raise ValueError(f"no quantization backend can run {where}: {listed}.")


def report_backends(device: torch.device, dtype: torch.dtype) -> list[BackendReport]:
    """Return whether each back end runs there, and if not, why; the fastest first."""
    reasons = {name: unavailable_reason(name, device, dtype) for name in BACKEND_NAMES}
    return [BackendReport(name, reason is None, reason) for name, reason in reasons.items()]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
