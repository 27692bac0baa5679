"""Ctrl-C and SIGTERM save first and end exactly; a second Ctrl-C stops at once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ptuning.train import endings
from ptuning.train.signals import Stopped, StopRequest
from tests.train.conftest import same
from trainer_seq2seq import Seq2SeqTrainer

ROOT = Path(__file__).resolve().parents[2]


def signal_in(monkeypatch, method, step, *signums):
    """Send signals to this process in a method of the trainer, at one step (counted from 1)."""
    real = getattr(Seq2SeqTrainer, method)
    sent = []

    def call(trainer, *args, **kwargs):
        if trainer.state.global_step + (method == "training_step") == step and not sent:
            for signum in signums:
                sent.append(signum)
                os.kill(os.getpid(), signum)
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(Seq2SeqTrainer, method, call)


def log_without_times(run):
    state = json.loads((run.out / "trainer_state.json").read_text("utf-8"))
    return [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}
        for entry in state["log_history"]
    ]


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
@pytest.mark.parametrize("method", ["training_step", "prediction_step", "_write_checkpoint"])
def test_the_first_signal_saves_after_the_step(method, signum, code, short_run, monkeypatch, capfd):
    flags = ("--logging_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2")
    step = 3 if method == "training_step" else 2
    assert short_run.start(*flags) == 0
    whole, log = short_run.prefix(), log_without_times(short_run)
    with monkeypatch.context() as patched:
        signal_in(patched, method, step, signum)
        assert short_run.start(*flags, "--overwrite_output_dir") == code
    error = capfd.readouterr().err
    assert "Ctrl-C now stops at once" in error
    assert f"checkpoint-{step} is complete: type the same command with --resume_from" in error
    assert short_run.checkpoints() == sorted({"checkpoint-2", f"checkpoint-{step}"})
    assert not (short_run.out / ".run.lock").exists()
    assert short_run.start(*flags, "--resume_from_checkpoint", "auto") == 0
    assert same(short_run.prefix(), whole)
    assert log_without_times(short_run) == log


def test_a_second_ctrl_c_stops_at_once(short_run, monkeypatch, capfd):
    signal_in(monkeypatch, "training_step", 4, signal.SIGINT, signal.SIGINT)
    assert short_run.start() == 130
    assert short_run.checkpoints() == ["checkpoint-2"]
    assert "stopped at once. " in capfd.readouterr().err


def test_a_second_sigterm_does_not_interrupt_the_save(short_run, monkeypatch, capfd):
    signal_in(monkeypatch, "_write_checkpoint", 2, signal.SIGTERM, signal.SIGTERM)
    assert short_run.start() == 143
    assert short_run.checkpoints() == ["checkpoint-2"]


def test_a_signal_before_training_stops_at_once(short_run, monkeypatch, capsys):
    def interrupted(*_args, **_options):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("ptuning.train.tuning.load_base", interrupted)
    assert short_run.start() == 143
    assert "No checkpoint was written yet" in capsys.readouterr().err


def test_handlers_are_put_back():
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_deferred_signal_that_nobody_acts_on_stops_at_the_end():
    done = []

    def work(stop):
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("went on")

    with StopRequest() as stop, pytest.raises(Stopped) as stopped:
        work(stop)
    assert done == ["went on"]
    assert stopped.value.exit_code == 143


def test_a_forked_worker_leaves_ctrl_c_to_its_parent():
    with StopRequest():
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_a_signal_after_an_error_does_not_hide_it():
    """A launcher ends the others when one process fails; what they met is what they report."""

    def work(stop):
        try:
            with stop.deferred():
                raise RuntimeError("connection closed by peer")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest() as stop, pytest.raises(RuntimeError, match="by peer"):
        work(stop)


def test_a_signal_while_the_ending_is_explained_does_not_cut_it_off(short_run, monkeypatch, capsys):
    """Of several processes, the launcher ends the others the moment one fails."""
    received = []
    real = endings.ending_of

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(endings, "ending_of", interrupted)
    before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    try:
        assert short_run.start("--train_file", "missing.json") == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "main.py: --train_file" in capsys.readouterr().err
    assert received == []


@pytest.mark.slow
def test_ctrl_c_while_modules_load_is_one_line(tmp_path):
    """A signal in the middle of `import torch` waits for its end."""
    flags = ["--do_train", "--train_file", "x.json", "--model_name_or_path", "nano"]
    flags += ["--output_dir", str(tmp_path / "out"), "--pre_seq_len", "4"]
    code = (
        "import os, signal, sys, builtins, main\n"
        "real = builtins.__import__\n"
        "def stop(name, *args, **kwargs):\n"
        "    if name == 'torch':\n"
        "        builtins.__import__ = real\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *args, **kwargs)\n"
        "builtins.__import__ = stop\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 130
    assert done.stderr.startswith("main.py: stopped at once. No checkpoint was written yet")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
