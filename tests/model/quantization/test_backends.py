"""Which back end runs, what is said about it, and why the others cannot."""

import logging
from collections.abc import Iterator

import pytest
import torch

from ptuning.model.quantization import backends as selection
from ptuning.model.quantization.backends import (
    BACKEND_NAMES,
    get_backend,
    pick_backend,
    report_backends,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def forget_choices() -> Iterator[None]:
    """Choices are remembered for the process; each test starts with none."""
    pick_backend.cache_clear()
    yield
    pick_backend.cache_clear()


def test_auto_on_a_cpu_is_torch_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=selection.__name__):
        for _ in range(3):
            assert pick_backend("auto", CPU, torch.float32, 4).name == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "quantization backend for int4 weights and float32 activations on cpu: torch"
    ]


def test_auto_says_why_the_faster_ones_were_passed_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get_backend("triton")), "unavailable_reason", lambda *_: "no compiler")
    monkeypatch.setattr(type(get_backend("cpm_kernels")), "unavailable_reason", lambda *_: None)
    with caplog.at_level(logging.INFO, logger=selection.__name__):
        assert pick_backend("auto", CUDA, torch.float16, 8).name == "cpm_kernels"
    assert caplog.records[0].getMessage().endswith("on cuda: cpm_kernels; not triton: no compiler")


@pytest.mark.parametrize("name", ["triton", "cpm_kernels"])
def test_asking_for_one_that_cannot_run_is_an_error_with_reason_and_remedy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=rf"--quantization_backend is {name}, which cannot run int4"
    ) as raised:
        pick_backend(name, CPU, torch.float32, 4)
    message = str(raised.value)
    assert "needs a CUDA device" in message or "not installed" in message
    assert "--quantization_backend auto" in message


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="is 'fast'; use auto, triton, cpm_kernels or torch"):
        pick_backend("fast", CPU, torch.float32, 4)


def test_an_unsupported_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no quantization backend can run .*float64"):
        pick_backend("auto", CPU, torch.float64, 8)


def test_the_report_names_every_back_end_once_with_a_reason_where_it_is_missing() -> None:
    reports = report_backends(CPU, torch.float32)
    assert tuple(report.name for report in reports) == BACKEND_NAMES
    for report in reports:
        assert report.available == (report.reason is None)
    assert reports[-1] == ("torch", True, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_build_without_cuda_gives_reasons_and_raises_nothing() -> None:
    for report in report_backends(CUDA, torch.float16)[:2]:
        assert not report.available
        assert report.reason
