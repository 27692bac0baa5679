"""The plan of a run: its numbers come from the rows and the configuration, no weight is read."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ptuning.__main__ import main
from ptuning.commands import plan
from ptuning.model.config import ChatGLMConfig
from ptuning.nano.paths import NANO_DIR
from ptuning.train.memory.memory_model import Batch, size_of
from ptuning.train.memory.plan import RunShape, advise_training, answering_flops, training_flops

NUM_ROWS = 40


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a run on the nano model's configuration and tokenizer, without its weights."""
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    base.mkdir()
    for file in NANO_DIR.iterdir():
        if "safetensors" not in file.name:
            (base / file.name).write_bytes(file.read_bytes())
    rows = [
        {"content": "类型#裤", "summary": "这条裤子很好看。" * (1 + n % 3)} for n in range(NUM_ROWS)
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return [
        "--do_train", "--do_predict", "--train_file", str(file), "--test_file", str(file),
        "--model_name_or_path", str(base), "--pre_seq_len", "16", "--output_dir",
        str(tmp_path / "out"), "--per_device_train_batch_size", "8", "--max_steps", "10",
        "--use_cpu",
    ]  # fmt: skip


def test_a_run_that_fits_is_planned_without_weights(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *flags]) == 0
    text = capsys.readouterr().out
    assert "steps      10, 5 an epoch: 2.00 epochs" in text
    assert "no layer is recomputed" in text
    assert f"{NUM_ROWS} prompts of" in text
    assert "64 rows at a time" in text  # what a run on a CPU takes by itself
    assert text.endswith("Fits.\n")


def test_a_run_that_does_not_fit_names_settings_with_their_numbers_and_ends_with_3(
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(plan, "free_bytes", lambda *_: 6_000_000)
    assert main(["plan", *flags]) == plan.NOT_FITTING == 3
    text = capsys.readouterr().out
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in text
    assert "GB  --quantization_bit 4" in text
    assert "Answering and validating 8 rows at a time, as 64 need more than" in caplog.text
    assert "Does not fit" in text


def test_a_gpu_that_is_not_here_is_planned_without_a_time(
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GPU's dtype and no packed copies; the flags are those of a run there."""
    caplog.set_level("INFO")
    monkeypatch.setattr(plan, "product_flops", lambda *_: pytest.fail("there is nothing to time"))
    assert main(["plan", *flags, "--gpu_memory", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("planned for a GPU with 8.0 GB\n")
    assert "8.00 GB are free on the planned GPU" in text
    assert "Python" not in text, "the process's memory is not the GPU's"
    assert "64 rows at a time" in text
    assert text.count(f"  time       {plan.NO_TIME}\n") == 2
    situation = plan.look(plan.parse_arguments([*flags, "--gpu_memory", "8"]))
    size = situation.size
    assert (size.dtype_bytes, size.packs, situation.on_cpu) == (2, False, False)

    assert main(["plan", *flags, "--gpu_memory", "0.01"]) == 3
    text = capsys.readouterr().out
    assert "it may not fit" in text
    assert "GB  --quantization_bit 4" in text
    assert "Answering and validating 8 rows at a time, as 64 need more than" in caplog.text


def test_the_published_model_is_planned_for_a_small_gpu(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """ChatGLM-6B's size with the nano model's tokenizer: what is chosen is what is counted."""
    config = tmp_path / "base" / "config.json"
    config.write_text(ChatGLMConfig(tie_word_embeddings=True).to_json_string(), encoding="utf-8")
    more = ["--per_device_train_batch_size", "1", "--pre_seq_len", "128", "--quantization_bit", "4"]
    for target, code in (("4.8", 0), ("4.6", 0), ("4.2", 3)):
        typed = [*(flag for flag in flags if flag != "--do_predict"), *more]
        assert main(["plan", *typed, "--gpu_memory", target]) == code, target
        text = capsys.readouterr().out
        (peak,) = re.findall(r"memory     ([\d.]+) GB at the peak", text)
        assert code or float(peak) <= float(target)
        assert "cuBLAS 0.03" in text


def test_wrong_flags_are_one_line_and_help_names_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--do_train", "--nonsense"]) == 2
    assert capsys.readouterr().err.startswith("ptuning plan: unknown flags: --nonsense")
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "python -m ptuning plan" in capsys.readouterr().out


def test_useful_work_is_that_of_the_written_arithmetic() -> None:
    """docs/performance.md: 2NT forward and 2NT back, attention three times, the head twice."""
    size = size_of(ChatGLMConfig(), dtype_bytes=2, prefix_length=128)
    weights = 12 * 4096**2 * 28
    assert size.layer_weights == weights
    attention = 3 * 4 * 100 * (128 + 100) * 4096 * 28
    head = 2 * 2 * 60 * 4096 * 130528
    flops = training_flops(size, num_rows=1, tokens=100, answer_tokens=60)
    assert flops == pytest.approx(4 * weights * 100 + attention + head)
    again = training_flops(size, num_rows=1, tokens=100, answer_tokens=60, recomputed_layers=14)
    assert again - flops == pytest.approx((2 * weights * 100 + attention / 3) / 2)
    answering = answering_flops(size, prompt_tokens=40, new_tokens=60)
    assert answering == 2 * weights * 100 + 2 * 60 * 4096 * 130528


def test_advice_needs_less_and_what_fits_comes_first() -> None:
    size = size_of(ChatGLMConfig(), dtype_bytes=2, prefix_length=128)
    shape = RunShape(16, 1, 1, 3.0, 0, 0, 8, 64)
    lengths, contexts = np.full(100, 128), np.full(100, 64)
    available = 12 * 10**9
    advice = advise_training(size, lengths, contexts, shape, on_cpu=False, available=available)
    fitting = [one.needed <= 0.9 * available for one in advice]
    assert fitting == sorted(fitting, reverse=True)
    assert {one.flags for one in advice} >= {
        "--gradient_checkpointing true",
        "--quantization_bit 4",
    }


@pytest.mark.gpu
def test_a_step_on_cuda_peaks_where_it_is_predicted() -> None:
    from benchmarks.memory import CASES, measure, parse

    assert torch.cuda.is_available()
    for case in CASES:
        if case.size == "wide":
            result = measure(case, parse(["--device", "cuda"]))
            assert result.predicted == pytest.approx(result.measured, rel=0.15), case


def test_a_batch_counts_its_tokens() -> None:
    assert Batch((5, 9), 6).tokens == 14
