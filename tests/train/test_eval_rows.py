"""How many rows are answered at a time: what was typed, else what suits the device and its memory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ptuning.data.cache import TokenArrays
from ptuning.data.dataset import GenerationDataset, GenerationRow, TokenDataset
from ptuning.model.config import ChatGLMConfig
from ptuning.train.flags import Arguments, TrainingArguments, parse_arguments
from ptuning.train.memory.eval_rows import fitting_rows, settle_eval_rows
from ptuning.train.memory.memory_model import size_of
from ptuning.train.rows import Rows
from ptuning.train.settings import RunSettings

SIZE = size_of(ChatGLMConfig(), dtype_bytes=4, prefix_length=128)  # ChatGLM-6B in float32
GB = 10**9


def parse(*more: str) -> Arguments:
    flags = ["--do_predict", "--test_file", "dev.json", "--ptuning_checkpoint", "run"]
    flags += ["--model_name_or_path", "base"]
    return parse_arguments([*flags, "--output_dir", "out", "--use_cpu", *more])


def prompts(count: int, length: int) -> Rows:
    row = GenerationRow([0] * length, "", "", 1)
    return Rows(None, None, GenerationDataset([row] * count))


def validation_rows(count: int, length: int) -> Rows:
    ids = np.zeros(count * length, dtype=np.int32)
    offsets = np.arange(0, count * length + 1, length)
    return Rows(None, TokenDataset(TokenArrays(ids, offsets, np.full(count, length // 2))), None)


def fitting(rows: Rows, free_gb: float, *, num_beams: int = 1, on_cpu: bool = True) -> int:
    free = int(free_gb * GB)
    return fitting_rows(SIZE, rows, new_tokens=64, num_beams=num_beams, free=free, on_cpu=on_cpu)


def test_a_processor_takes_64_and_what_was_typed_wins() -> None:
    assert parse().training.per_device_eval_batch_size == 64
    assert parse("--per_device_eval_batch_size", "3").training.eval_batch_size == 3
    assert parse("--per_gpu_eval_batch_size", "8").training.eval_rows_typed


def test_a_gpu_takes_64_too_and_a_memory_target_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    device = property(lambda self: torch.device("cuda", 0))
    monkeypatch.setattr(TrainingArguments, "device", device)
    assert TrainingArguments(output_dir=str(tmp_path)).per_device_eval_batch_size == 64
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 13 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 13 * GB)
    size = replace(SIZE, dtype_bytes=2)  # 64 rows of 64 + 128 tokens are 5.6 GB
    for target, fitting in ((), 64), (("--gpu_memory", "24"), 64), (("--gpu_memory", "18"), 32):
        arguments = parse(*target)
        settle_eval_rows(arguments, prompts(100, 64), RunSettings(), size, free=None)
        assert arguments.training.per_device_eval_batch_size == fitting
    assert "Answering and validating 32 rows at a time, as 64 need more than the 5.0" in caplog.text


def test_rows_are_halved_until_their_keys_and_values_fit() -> None:
    rows = prompts(100, 64)
    cache_gb = 64 * 128 * 2 * 28 * 4096 * 4 / GB  # 64 rows of 64 + 64 tokens
    assert fitting(rows, 2 * cache_gb) == 64
    assert fitting(rows, cache_gb) == 32, "a tenth stays free, and prompts need room to be read"
    assert fitting(rows, 0.5 * cache_gb) == 16
    assert fitting(rows, 0.0) == 8, "transformers' own default, however little there is"
    assert fitting(rows, 2 * cache_gb, num_beams=4) == 16
    assert fitting(prompts(100, 1024), 2 * cache_gb) == 8, "long rows hold more"


def test_validation_counts_its_longest_rows() -> None:
    assert fitting(validation_rows(100, 128), 4.0) == 64
    assert fitting(validation_rows(100, 1152), 4.0) == 8
    assert fitting(validation_rows(100, 128), 4.0, on_cpu=False) == 64
    assert fitting(validation_rows(100, 1152), 4.0, on_cpu=False) == 8


def test_only_an_untyped_number_is_lowered_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    typed, untyped = parse("--per_device_eval_batch_size", "64"), parse()
    for arguments in (typed, untyped):
        settle_eval_rows(arguments, prompts(100, 64), RunSettings(), SIZE, free=0)
    assert typed.training.per_device_eval_batch_size == 64
    assert untyped.training.per_device_eval_batch_size == 8
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "Answering and validating 8 rows at a time, as 64 need more than the 0.0"
    )
