"""Which back end runs a product: the one asked for, or the first that can; never a silent third.

`auto` tries the fast ones first and says once, at INFO, which it took. Asking by name for one that
cannot run is an error. The reasons are always there to read: `report_backends`, which `python -m
ptuning doctor` prints.
"""

import logging
from functools import cache
from typing import NamedTuple

import torch

from ptuning.model.quantization.cpm_backend import CpmBackend
from ptuning.model.quantization.interface import Backend
from ptuning.model.quantization.reference import SUPPORTED_BITS
from ptuning.model.quantization.torch_backend import TorchBackend
from ptuning.model.quantization.triton_backend import TritonBackend

logger = logging.getLogger(__name__)

AUTO = "auto"
BACKEND_NAMES = ("triton", "cpm_kernels", "torch")
# A device type that is not named here takes DEFAULT_ORDER.
AUTO_ORDER = {"cuda": BACKEND_NAMES}
DEFAULT_ORDER = ("torch",)


class BackendReport(NamedTuple):
    """One line of the doctor's table: reason is None when the back end is available."""

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
    """Return the one instance of the named back end; "auto" is not one."""
    check_backend_name(name)
    backends: dict[str, Backend] = {
        "triton": TritonBackend(),
        "cpm_kernels": CpmBackend(),
        "torch": TorchBackend(),
    }
    return backends[name]


@cache
def pick_backend(requested: str, device: torch.device, dtype: torch.dtype, bits: int) -> Backend:
    """Return the back end for activations of dtype on device; ValueError if it cannot run there."""
    check_backend_name(requested)
    where = f"int{bits} weights and {str(dtype).removeprefix('torch.')} activations on {device}"
    if requested != AUTO:
        backend = get_backend(requested)
        reason = backend.unavailable_reason(device, dtype, bits)
        if reason is not None:
            raise ValueError(
                f"--quantization_backend is {requested}, which cannot run {where}: {reason}. "
                f"Or use --quantization_backend {AUTO}."
            )
        return backend
    reasons: list[str] = []
    for name in AUTO_ORDER.get(device.type, DEFAULT_ORDER):
        backend = get_backend(name)
        reason = backend.unavailable_reason(device, dtype, bits)
        if reason is None:
            passed_over = "".join(f"; not {text}" for text in reasons)
            logger.info("quantization backend for %s: %s%s", where, name, passed_over)
            return backend
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no quantization backend can run {where}: {'; '.join(reasons)}.")


def report_backends(device: torch.device, dtype: torch.dtype) -> list[BackendReport]:
    """Return whether each back end runs int4 and int8 there, and if not, why; fast ones first."""
    reports = []
    for name in BACKEND_NAMES:
        reasons = {
            bits: get_backend(name).unavailable_reason(device, dtype, bits)
            for bits in SUPPORTED_BITS
        }
        distinct = set(reasons.values())
        if len(distinct) == 1:
            reason = distinct.pop()
        else:
            reason = "; ".join(
                f"int{bits}: {text or 'available'}" for bits, text in reasons.items()
            )
        reports.append(BackendReport(name, reason is None, reason))
    return reports
