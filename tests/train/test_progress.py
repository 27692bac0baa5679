"""What a run prints and where else it logs: lines in a file, a bar on a terminal, --report_to, --push_to_hub."""

import contextlib
import fcntl
import importlib
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from transformers import TrainerControl, TrainerState
from transformers.integrations import integration_utils

import ptuning.output as output
import ptuning.train.progress as progress
from main import main
from ptuning.output import open_bar
from ptuning.train.progress import ProgressLines, check_push_to_hub, check_reporting
from trainer_seq2seq import Seq2SeqTrainer

ROOT = Path(__file__).resolve().parents[2]
STEP = re.compile(r"step +(\d+) of (\d+) \( *(\d+) %\)  loss \d+\.\d{3}  (?:.*  )?(.* left)$")
EVERYTHING = "--do_eval --do_predict --eval_strategy steps --eval_steps 10 --max_steps 20".split()


def start_process(short_run, *more, **options):
    flags = short_run.flags(*more, "--disable_tqdm", "false")
    return subprocess.run([sys.executable, str(ROOT / "main.py"), *flags], check=False, **options)


def told(caplog, short_run, *more):
    caplog.set_level("INFO")
    caplog.clear()
    assert short_run.start(*more) == 0
    return [line for message in caplog.messages for line in message.splitlines()]


def log_steps(out: Path) -> list[int]:
    history = json.loads((out / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry["step"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_a_file_gets_plain_lines_in_any_encoding(short_run):
    """No bar, no carriage return, no escape sequence, no Python dict; names are Chinese."""
    out = short_run.folder / "输出"
    flags = [*EVERYTHING, "--logging_steps", "500", "--save_steps", "20"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    with (short_run.folder / "log").open("wb") as log:
        done = start_process(
            short_run, *flags, "--output_dir", str(out), stdout=log, stderr=log, env=environment
        )
    text = (short_run.folder / "log").read_bytes().decode("ascii")
    assert done.returncode == 0, text
    for unwanted in ("{", "}", "\r", "\x1b", "it/s", "row/s", "*****", "Traceback", "%|", "flos"):
        assert unwanted not in text
    steps = [match for match in map(STEP.match, text.splitlines()) if match]
    assert [int(match[3]) for match in steps] == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert [int(match[1]) for match in steps] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert text.count("  validation loss ") == 2
    assert text.count("\nTrained 20 steps in ") == 1
    assert len(re.findall(r"\nValidation loss \d+\.\d{3} \(perplexity .*\): 10 rows in", text)) == 1
    escaped = (r"\u8f93\u51fa", r"\udce8\udcbe\udc93")  # by the locale that Python took
    assert any(name in text for name in escaped)
    assert log_steps(out) == []  # --logging_steps alone decides what the history holds


def test_a_terminal_gets_a_bar_with_the_loss_and_a_line_per_log_entry(short_run):
    flags = [*EVERYTHING, "--logging_steps", "5", "--save_steps", "20"]
    done, text = on_a_terminal(lambda **streams: start_process(short_run, *flags, **streams))
    assert done.returncode == 0, text
    assert re.search(r"training: +\d+%\|.*\d+/20 .*loss \d+\.\d{3}", text)
    assert re.search(r"answering with the base: +100%\|", text)
    assert "{'" not in text
    seen = re.findall(r"step +(\d+) of 20 \( *\d+ %\)  loss \d+\.\d{3}  learning rate \S+", text)
    assert seen == ["5", "10", "15", "20"]
    assert text.count("  validation loss ") == 2


def on_a_terminal(run):
    """Return what run(stdin, stdout, stderr) returns, and what 100 columns of a terminal showed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    seen = []

    def read():
        with contextlib.suppress(OSError):  # Linux: every writer has closed the terminal
            while data := os.read(master, 65536):
                seen.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = run(stdin=slave, stdout=slave, stderr=slave)
    finally:
        os.close(slave)
        reader.join()
        os.close(master)
    return done, b"".join(seen).decode("utf-8", "replace")


def test_without_bars_a_terminal_gets_the_lines_alone(short_run, caplog, monkeypatch, capsys):
    """One for every log entry, and for a tenth that passes between two of them."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lines = told(caplog, short_run, "--max_steps", "20", "--logging_steps", "7")
    steps = [int(match[1]) for match in map(STEP.match, lines) if match]
    assert steps == [2, 4, 6, 7, 8, 10, 12, 14, 16, 18]
    assert capsys.readouterr().err == ""


def test_lines_name_every_tenth_and_the_first_log_entry(short_run, caplog):
    lines = told(caplog, short_run, "--max_steps", "40")
    steps = [int(match[1]) for match in map(STEP.match, lines) if match]
    assert steps == [1, *range(4, 40, 4)]
    assert log_steps(short_run.out) == list(range(1, 41))


def test_the_loss_of_a_line_is_the_mean_since_the_line_before(short_run, caplog):
    lines = told(caplog, short_run, "--max_steps", "20", "--logging_steps", "1")
    losses = [
        (int(match[1]), float(re.search(r"loss (\S+)", match[0])[1]))
        for match in map(STEP.match, lines)
        if match
    ]
    history = json.loads((short_run.out / "trainer_state.json").read_text("utf-8"))["log_history"]
    logged = [entry["loss"] for entry in history if "loss" in entry]
    before = 0
    for step, loss in losses:
        assert loss == pytest.approx(sum(logged[before:step]) / (step - before), abs=6e-4)
        before = step


def test_a_resumed_run_counts_its_own_steps(short_run, caplog):
    assert short_run.start("--max_steps", "20", "--save_steps", "10") == 0
    (short_run.out / "checkpoint-20").rename(short_run.folder / "last")
    flags = ["--max_steps", "20", "--save_steps", "10", "--resume_from_checkpoint", "auto"]
    lines = told(caplog, short_run, *flags)
    steps = [int(match[1]) for match in map(STEP.match, lines) if match]
    assert steps == [11, 12, 14, 16, 18]
    assert any(line.startswith("Trained 10 steps in ") for line in lines)


def test_skipped_steps_are_counted_in_the_line(short_run, caplog, monkeypatch):
    real = Seq2SeqTrainer.compute_loss

    def spoiled(trainer, *args, **kwargs):
        loss = real(trainer, *args, **kwargs)
        return loss * float("nan") if trainer.state.global_step + 1 in (5, 6, 7) else loss

    monkeypatch.setattr(Seq2SeqTrainer, "compute_loss", spoiled)
    lines = told(caplog, short_run, "--max_steps", "20", "--logging_steps", "2")
    by_step = {int(match[1]): match[0] for match in map(STEP.match, lines) if match}
    assert "1 step skipped" in by_step[8]
    assert "skipped" not in by_step[10]
    assert any("step  6 of 20 ( 30 %)  no usable loss" in line for line in lines)
    assert any(line.startswith("Trained 20 steps") and "3 steps skipped" in line for line in lines)


def test_early_stopping_and_the_best_step_are_named(short_run, caplog):
    flags = ["--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end"]
    flags += ["--early_stopping_patience", "1", "--learning_rate", "100", "--max_steps", "40"]
    lines = told(caplog, short_run, *flags)
    assert any(re.fullmatch(r"Stopped early, at step \d+ of 40", line) for line in lines)
    assert any(re.fullmatch(r"Kept the best step, \d+: validation loss .*", line) for line in lines)


def test_saving_a_whole_model_shows_no_bar_in_a_file(short_run, capsys):
    flags = short_run.flags("--tuning", "full", "--learning_rate", "1e-4")
    place = flags.index("--pre_seq_len")
    assert main([*flags[:place], *flags[place + 2 :]]) == 0
    assert capsys.readouterr().err == ""


def test_time_left_leaves_out_the_first_step_which_may_compile(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    state = TrainerState(max_steps=10, is_world_process_zero=True)
    lines, control = ProgressLines(), TrainerControl()
    lines.on_train_begin(None, state, control)
    for step in (1, 2, 3):
        now[0] += 100.0 if step == 1 else 2.0
        state.global_step = step
        lines.add_step(1.0)
        lines.on_step_end(None, state, control)
    lines.close()
    assert [message.split("  ")[-1] for message in caplog.messages] == [
        "15 min left",
        "16 s left",
        "14 s left",
    ]


def test_a_long_tenth_has_lines_of_its_own(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    state = TrainerState(max_steps=1000, is_world_process_zero=True)
    lines, control = ProgressLines(), TrainerControl()
    lines.on_train_begin(None, state, control)
    control.should_log = True
    for step in range(1, 51):
        now[0] += 60.0
        state.global_step = step
        lines.add_step(1.0)
        lines.on_step_end(None, state, control)
        lines.on_log(None, state, control, logs={"loss": 1.0, "learning_rate": 0.02})
    lines.close()
    assert [int(message.split()[1]) for message in caplog.messages] == [1, 11, 21, 31, 41]


def test_a_run_that_fails_closes_its_bar(short_run, monkeypatch):
    """Log lines are printed through an open bar, so one that stays open would keep them."""
    closed = []

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def watched(*args, **options):
        try:
            with open_bar(*args, **options) as bar:
                yield bar
        finally:
            closed.append("closed")

    monkeypatch.setattr(progress, "open_bar", watched)
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", fails)
    assert short_run.start() == 130
    assert closed == ["closed"]


def test_bars_are_told_by_the_flag(short_run, monkeypatch):
    monkeypatch.setattr(output, "_bars_allowed", True)
    assert short_run.start() == 0  # with --disable_tqdm true
    assert output._bars_allowed is False


# ---- --report_to ----


@pytest.fixture
def without_wandb(monkeypatch):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)


@pytest.mark.parametrize("value", ["none", ["none"], "all", ["tensorboard"]])
def test_asking_for_what_is_there_needs_nothing(value, without_wandb):
    check_reporting(value)


def test_a_missing_package_is_named_with_what_to_type(without_wandb):
    with pytest.raises(ValueError, match=r"--report_to is wandb: .*pip install wandb"):
        check_reporting("wandb")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"--report_to is wandbb: .*swanlab"):
        check_reporting("wandbb")


# ---- --push_to_hub ----


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_pushing_offline_is_refused(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set: unset it"):
        check_push_to_hub("output/run", {"hub_token": "hf_x"})


def test_pushing_needs_a_token(online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        check_push_to_hub("output/run", {})


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (HTTPError("Name or service not known"), "cannot be reached (Name or service not known)"),
        (OSError("no route"), "cannot be reached (no route)"),
        (HFValidationError("Repo id must be ..."), "refuses the repository run: Repo id must be"),
    ],
)
def test_a_hub_that_fails_is_told_in_one_line(error, needed, online, monkeypatch):
    def fails(*_args, **_options):
        raise error

    monkeypatch.setattr(HfApi, "create_repo", fails)
    with pytest.raises(ValueError, match="--push_to_hub: ") as caught:
        check_push_to_hub("output/run", {"hub_token": "hf_x"})
    assert needed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_without_the_right_is_told_as_such(online, monkeypatch):
    client = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx, or httpx2

    def forbidden(*_args, **_options):
        response = client.Response(403, request=client.Request("POST", "https://huggingface.co"))
        raise RepositoryNotFoundError("403 Forbidden: no rights\nmore", response=response)

    monkeypatch.setattr(HfApi, "create_repo", forbidden)
    with pytest.raises(ValueError, match="refuses the repository me/run: 403 Forbidden") as caught:
        check_push_to_hub("output/run", {"hub_model_id": "me/run", "hub_token": "hf_x"})
    assert "more" not in str(caught.value)


def test_the_repository_is_made_as_transformers_would(online, monkeypatch):
    made = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda _api, name, **options: made.append((name, options))
    )
    check_push_to_hub("output/run", {"hub_token": "hf_x", "hub_private_repo": True})
    assert made == [("run", {"token": "hf_x", "private": True, "exist_ok": True})]


# ---- In a run ----


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--report_to", "wandb"], "pip install wandb"),
        (["--report_to", "wandbb"], "--report_to is wandbb: "),
        (["--push_to_hub"], "--push_to_hub needs"),
    ],
)
def test_a_run_that_cannot_report_does_not_start(
    flags, needed, short_run, without_wandb, monkeypatch, capsys
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "ptuning.train.tuning.load_base", lambda *_a, **_o: pytest.fail("was loaded")
    )
    assert short_run.start(*flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: ")
    assert needed in error
    assert len(error.splitlines()) == 1
    assert not short_run.out.exists()


STUB = '''
"""Records the calls of transformers' callback for this package."""
import json, os, types

def note(*what):
    with open(os.environ["CALLS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(what, default=str) + "\\n")

class Config(dict):
    def update(self, values, **options):
        note("config", sorted(values))

class Run:
    id = name = url = "stub"
    summary = {}
    def _label(self, **options): pass

config, run = Config(), None

def init(**options):
    global run
    run = Run()
    note("init", options.get("project"))
    return run

def get_run():
    return run

def define_metric(*args, **options): pass
def termwarn(*args, **options): pass
def log(values, **options): note("log", values)
def finish(): note("finish")
'''


def run_with(short_run, name, environment, *more):
    flags = short_run.flags("--report_to", name, "--logging_steps", "2", *more)
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_run_reports_to_a_package_that_is_there(name, short_run, tmp_path):
    """With a stand-in for the package; transformers' own callback calls it."""
    packages, calls = tmp_path / "packages", tmp_path / "calls"
    (packages / name / "sdk" / "lib").mkdir(parents=True)
    (packages / name / "__init__.py").write_text(STUB, encoding="utf-8")
    error = packages / name / "sdk" / "lib" / "config_util.py"
    error.write_text("class ConfigError(Exception): pass\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(packages), "CALLS": str(calls)}
    done = run_with(short_run, name, environment)
    assert done.returncode == 0, done.stderr
    assert "{'" not in done.stdout
    made = [json.loads(line) for line in calls.read_text("utf-8").splitlines()]
    assert made[0][0] == "init"
    losses = [values for kind, values in made if kind == "log" and "train/loss" in values]
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("name", "environment", "left"),
    [
        ("wandb", {"WANDB_MODE": "offline"}, "wandb"),
        ("swanlab", {"SWANLAB_MODE": "offline"}, "swanlog"),
        ("mlflow", {}, "mlruns"),
    ],
)
def test_a_real_package_works_offline(name, environment, left, short_run, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.chdir(short_run.folder)
    environment = {
        **os.environ,
        **environment,
        "WANDB_DIR": str(short_run.folder),
        "MLFLOW_TRACKING_URI": (short_run.folder / "mlruns").as_uri(),
        "SWANLAB_LOG_DIR": str(short_run.folder / "swanlog"),
    }
    done = run_with(short_run, name, environment)
    assert done.returncode == 0, done.stderr
    assert any((short_run.folder / left).iterdir())


def test_tensorboard_gets_the_losses(short_run, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(short_run.folder / "board"))
    assert short_run.start("--report_to", "tensorboard") == 0
    assert any((short_run.folder / "board").glob("events.*"))
