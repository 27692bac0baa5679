"""Steps that cannot be right are skipped and counted; too many in a row end the run with a reason."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from ptuning.train.guards import Evidence, fault_in, likely_cause
from tests.train.conftest import same
from trainer_seq2seq import Seq2SeqTrainer

FINE = {
    "loss": math.nan,
    "grad_norm": math.nan,
    "num_labels": 40,
    "dtype": "float32",
    "base_is_finite": True,
    "largest_weight": 4.0,
    "learning_rate": 0.02,
    "logged_losses": (5.0, 4.0),
}
CAUSES = {
    "masked": ({"num_labels": 0}, "every label of the batch is masked"),
    "broken base": ({"base_is_finite": False}, "the base itself holds weights"),
    "rising": ({"logged_losses": (5.0, 4.0, 9.0)}, "the loss rose from 4 to 9"),
    "grown": ({"largest_weight": 3e4}, "the largest trained weight is 3e+04"),
    "trained to nan": ({"largest_weight": math.nan}, "the largest trained weight is nan"),
    "overflow": ({"dtype": "float16"}, "65504 overflows; use --bf16 true"),
    "underflow": ({"dtype": "float16", "loss": 4.0, "grad_norm": 0.0}, "becomes 0; use --bf16"),
    "rising in float16": ({"dtype": "float16", "largest_weight": 1e3}, "--learning_rate 0.002"),
    "nothing": ({}, "nothing stands out"),
}


@pytest.mark.parametrize("case", sorted(CAUSES))
def test_the_cause_follows_from_the_evidence(case):
    changed, words = CAUSES[case]
    assert words in likely_cause(Evidence(**{**FINE, **changed}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_a_step_is_at_fault_for_its_loss_or_its_gradient(value):
    assert "loss" in fault_in(value, 1.0)
    assert "gradient" in fault_in(1.0, value)
    assert fault_in(1e-30, 1e30) is None


def spoil(monkeypatch, steps, how):
    """Make the loss of these steps (counted from 1) what how(loss) gives."""
    real = Seq2SeqTrainer.compute_loss

    def compute_loss(trainer, model, inputs, **options):
        loss = real(trainer, model, inputs, **options)
        return how(loss) if trainer.state.global_step + 1 in steps else loss

    monkeypatch.setattr(Seq2SeqTrainer, "compute_loss", compute_loss)


def log_of(run):
    state = json.loads((run.out / "trainer_state.json").read_text("utf-8"))
    return state["log_history"]


SPOILT = {
    "nan loss": lambda loss: loss * math.nan,
    "infinite loss": lambda loss: loss * math.inf,
    "zero loss": lambda loss: loss * 0,
    "nan gradient": lambda loss: loss + 0 * (loss - loss.detach()).sqrt(),
}


@pytest.mark.parametrize("case", sorted(SPOILT))
def test_a_spoilt_step_is_skipped_and_counted(case, short_run, monkeypatch, caplog):
    spoil(monkeypatch, {3}, SPOILT[case])
    assert short_run.start("--logging_steps", "2") == 0
    assert "Step 3 is skipped: the" in caplog.text
    assert all(value.isfinite().all() for value in short_run.prefix().values())
    results = json.loads((short_run.out / "train_results.json").read_text("utf-8"))
    assert results["skipped_steps"] == 1
    assert math.isfinite(results["train_loss"])
    entries = [entry for entry in log_of(short_run) if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in entries] == [None, 1, None]
    assert entries[1]["loss"] == pytest.approx(entries[0]["loss"], rel=0.1)  # not halved by a zero


def test_a_skipped_step_leaves_weights_and_optimiser_untouched(short_run, monkeypatch):
    spoil(monkeypatch, {3, 4}, SPOILT["nan loss"])
    assert short_run.start() == 0
    before, after = (short_run.out / f"checkpoint-{step}" for step in (2, 4))
    assert same(short_run.prefix(before), short_run.prefix(after))
    states = [torch.load(f / "optimizer.pt")["state"] for f in (before, after)]
    assert all(same(states[0][key], states[1][key]) for key in states[0])
    rates = [torch.load(f / "scheduler.pt")["last_epoch"] for f in (before, after)]
    assert rates == [2, 4]  # the schedule goes by the step number


def test_the_count_survives_a_resume(short_run, monkeypatch):
    spoil(monkeypatch, {2, 3}, SPOILT["nan loss"])
    assert short_run.start("--logging_steps", "3") == 0
    whole, log = short_run.prefix(), log_of(short_run)
    for step in (4, 6):
        (short_run.out / f"checkpoint-{step}" / "checkpoint.json").unlink()
        (short_run.out / f"checkpoint-{step}" / "prefix.safetensors").unlink()
    assert short_run.start("--logging_steps", "3", "--resume_from_checkpoint", "auto") == 0
    assert same(short_run.prefix(), whole)
    assert [e.get("skipped_steps") for e in log_of(short_run)] == [2, None, 2]
    assert [e.get("loss") for e in log_of(short_run)] == [e.get("loss") for e in log]


def test_too_many_in_a_row_stop_the_run_and_show_the_batch(short_run, monkeypatch, capsys):
    spoil(monkeypatch, {1, 4, 5, 6}, SPOILT["nan loss"])
    assert short_run.start("--max_bad_steps", "3", "--save_total_limit", "1") == 3
    error = capsys.readouterr().err
    assert "Stopped after 3 consecutive skipped steps" in error
    assert "step 6, the loss is nan" in error
    assert "Likely cause: " in error
    assert "--init_from" in error
    shown = (short_run.out / "bad_batch.txt").read_text("utf-8")
    assert "row 1 of 4" in shown
    assert "类型#" in shown
    assert "labels: [-100" in shown


def test_the_last_sound_checkpoint_outlives_the_bad_steps(short_run, monkeypatch, capsys):
    spoil(monkeypatch, set(range(4, 20)), SPOILT["nan loss"])
    flags = ("--save_steps", "1", "--save_total_limit", "1", "--max_steps", "20")
    assert short_run.start(*flags) == 3
    assert short_run.checkpoints() == ["checkpoint-3", "checkpoint-7"]
    assert "checkpoint-3 is kept" in capsys.readouterr().err


def test_a_learning_rate_far_too_high_is_named(short_run, capsys):
    flags = ("--learning_rate", "1e38", "--max_steps", "30", "--max_grad_norm", "0")
    assert short_run.start(*flags) == 3
    error = capsys.readouterr().err
    assert "the learning rate is too high" in error
    assert "the largest trained weight is" in error


def test_max_bad_steps_0_never_stops(short_run, monkeypatch):
    spoil(monkeypatch, set(range(1, 7)), SPOILT["nan loss"])
    assert short_run.start("--max_bad_steps", "0") == 0
    results = json.loads((short_run.out / "train_results.json").read_text("utf-8"))
    assert results["skipped_steps"] == 6


def test_looking_at_a_step_costs_one_transfer(short_run, monkeypatch):
    """These methods wait for the device; trainers and guard call them once per step together."""
    waits = []

    def counted(real):
        def call(tensor, *args):
            caller = Path(sys._getframe(1).f_code.co_filename).name
            if caller in ("trainer_seq2seq.py", "guards.py", "trainer.py", "clip_grad.py"):
                waits.append(caller)
            return real(tensor, *args)

        return call

    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    flags = ("--max_steps", "10", "--save_strategy", "no", "--logging_steps", "1000")
    assert short_run.start(*flags) == 0
    assert waits == ["trainer_seq2seq.py"] * 10 + ["trainer.py"]  # the last is the run's mean loss


@pytest.mark.parametrize("answer", ["\u200b", "\ufeff", " \u200b "])
def test_a_row_without_an_answer_token_is_dropped_and_counted(answer, short_run, caplog):
    path = short_run.folder / "train.json"
    row = json.dumps({"content": "类型#裤", "summary": answer})
    path.write_text(path.read_text("utf-8") + row + "\n", encoding="utf-8")
    with caplog.at_level("INFO"):
        assert short_run.start("--max_steps", "1") == 0
    assert "31 rows read, 30 kept" in caplog.text


def test_a_file_of_rows_without_an_answer_token_is_refused(short_run, capsys):
    row = json.dumps({"content": "类型#裤", "summary": "\u200b"})
    (short_run.folder / "train.json").write_text(row + "\n", encoding="utf-8")
    assert short_run.start() == 2
    assert 'no row is left of 1: 1 x no token in "summary"' in capsys.readouterr().err
