"""The plan of a run: its numbers come from the rows and the configuration, no weight is read."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning.__main__ import main
from ptuning.commands import plan
from ptuning.model.config import ChatGLMConfig
from ptuning.train.fit import Fit, Workload
from ptuning.train.memory import Batch, size_of
from ptuning.train.run_config import parse_arguments
from ptuning.tunings.loading import NANO_DIR
from tests.train.memory_rows import NO_ROWS, prompts, training_rows

NUM_ROWS = 40
CONFIG = parse_arguments(
    "--do_train --train_file rows.json --model_name_or_path my/base --output_dir out "
    "--pre_seq_len 128 --per_device_train_batch_size 16".split()
)
SIZE = size_of(ChatGLMConfig(), torch.bfloat16, on_cpu=False, prefix_length=128)


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
    assert "steps      10, 5 per epoch: 2.00 epochs" in text
    assert "Gradient checkpointing: none of 4 layers" in text
    assert f"{NUM_ROWS} prompts of" in text
    assert "64 rows at a time" in text  # what a run on a CPU takes by itself
    assert text.endswith("Fits in memory.\n")


def test_a_run_that_does_not_fit_names_settings_with_their_numbers_and_ends_with_3(
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda *_: 6_000_000)
    assert main(["plan", *flags]) == plan.NOT_FITTING == 3
    text = capsys.readouterr().out
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in text
    assert "GB  --quantization_bit 4" in text
    assert "Evaluation batch size: 8 rows; 64 need more than the 0.0 GB" in text
    assert "Does not fit" in text


def test_a_gpu_that_is_not_here_is_planned_without_a_time(
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU's dtype and no prepacked weights; the flags are those of a run there."""
    monkeypatch.setattr(plan, "product_flops", lambda *_: pytest.fail("there is nothing to time"))
    assert main(["plan", *flags, "--gpu_memory", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("planned for a GPU with 8.0 GB\n")
    assert "8.00 GB are free on the planned GPU" in text
    assert "Python" not in text, "the process's memory is not the GPU's"
    assert "64 rows at a time" in text
    assert text.count(f"  time       {plan.NO_TIME}\n") == 2
    situation = plan.read_situation(parse_arguments([*flags, "--gpu_memory", "8"]))
    size = situation.fit.size
    assert (size.unit, size.prepacked, size.on_cpu) == (2, False, False)

    assert main(["plan", *flags, "--gpu_memory", "0.01"]) == 3
    text = capsys.readouterr().out
    assert "it may not fit" in text
    assert "GB  --quantization_bit 4" in text
    assert "Evaluation batch size: 8 rows; 64 need more than the 0.0 GB" in text


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
    text = " ".join(capsys.readouterr().out.split())
    assert "python -m ptuning plan" in text
    assert "python main.py --help lists them" in text


def test_useful_work_is_that_of_the_written_arithmetic() -> None:
    """docs/performance.md: 2NT forward and 2NT back, attention three times, the head twice."""
    size = SIZE
    weights = 12 * 4096**2 * 28
    assert size.layer_weights == weights
    attention = 3 * 4 * 100 * (128 + 100) * 4096 * 28
    head = 2 * 2 * 60 * 4096 * 130528
    flops = plan.training_flops(size, num_rows=1, tokens=100, answer_tokens=60)
    assert flops == pytest.approx(4 * weights * 100 + attention + head)
    again = plan.training_flops(
        size, num_rows=1, tokens=100, answer_tokens=60, checkpointed_layers=14
    )
    assert again - flops == pytest.approx((2 * weights * 100 + attention / 3) / 2)
    answering = plan.answering_flops(size, prompt_tokens=40, new_tokens=60)
    assert answering == 2 * weights * 100 + 2 * 60 * 4096 * 130528


def planned(**how: Any) -> plan.Situation:
    """Return a plan's situation with ChatGLM-6B on a GPU with 16 GB."""
    situation = plan.Situation(
        config=CONFIG,
        rows=NO_ROWS,
        fit=Fit(Workload(torch.device("cuda"), train_batch=16, eval_batch=8), SIZE, 0, needed=1),
        max_length=2048,
        process=0,
        free=16 * 10**9,
        product_flops=1e12,
    )
    return situation._replace(**how)


def test_advice_needs_less_and_what_fits_comes_first() -> None:
    lines, fits = plan.plan_training(planned(), training_rows([128] * 100, num_answer_tokens=64))
    assert not fits
    advice = lines[lines.index("  too much; each of these alone would need:") + 1 :]
    peak = float(re.findall(r"memory     ([\d.]+) GB", "\n".join(lines))[0])
    assert all(float(line.split()[0]) < peak for line in advice)
    fitting = [line.endswith("(fits)") for line in advice]
    assert fitting == sorted(fitting, reverse=True)
    assert set(fitting) == {True, False}
    for flags in (
        "--per_device_train_batch_size 8 --gradient_accumulation_steps 2",
        "--gradient_checkpointing true",
        "--quantization_bit 8",
        "--quantization_bit 4",
        "--max_source_length and --max_target_length halved",
    ):
        assert any(flags in line for line in advice), flags


def test_rows_beyond_the_base_models_length_are_warned_of() -> None:
    rows = training_rows([100, 3000], num_answer_tokens=50)
    text = "\n".join(plan.plan_training(planned(), rows)[0])
    assert "1 of 2 rows are longer than the 2,048 tokens" in text
    assert "3,000 at most" in text
    assert "warning" not in "\n".join(plan.plan_training(planned(max_length=3000), rows)[0])
    workload = Workload(torch.device("cuda"), new_tokens=1000)
    situation = planned(fit=Fit(workload, SIZE, 0))
    text = "\n".join(plan.plan_answering(situation, prompts(5, 1049))[0])
    assert "5 of 5 rows are longer than the 2,048 tokens" in text
    text = "\n".join(plan.plan_answering(situation, prompts(5, 1048))[0])
    assert "warning" not in text


@pytest.mark.parametrize(("device", "note"), [("cpu", " (use a GPU)"), ("cuda", "")])
def test_days_are_printed_as_days(device: str, note: str) -> None:
    size = replace(SIZE, on_cpu=device == "cpu")
    fit = Fit(Workload(torch.device(device), train_batch=16), size, 0)
    rows = training_rows([128] * 114599, num_answer_tokens=64)
    lines = plan.plan_training(planned(fit=fit), rows)[0]
    (line,) = [line for line in lines if line.startswith("  time")]
    assert re.match(rf"  time       \d+ days( \d+ h)?{re.escape(note)}: \d+\.\d\d s per step", line)


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


def test_lengths_beyond_the_base_models_are_warned_of(flags, capsys):
    assert main(["plan", *flags, "--max_source_length", "2000"]) == 0
    text = capsys.readouterr().out
    assert "allow 2,128 tokens, and the base model was trained with at most 2,048" in text
