"""Intact checkpoints are found, others are not; no run changes or deletes what another one left."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from ptuning.train.checkpoints import (
    MANIFEST_NAME,
    fault_of,
    finish_checkpoint,
    staging_path,
    start_checkpoint,
)
from ptuning.train.endings import how_to_resume
from ptuning.train.run_config import parse_arguments
from ptuning.train.run_directory import (
    LOCK_NAME,
    RECORD_NAME,
    OutputDirectoryError,
    RunDirectory,
)
from tests.tiny import rows, write_rows
from tests.train.conftest import same
from tests.train.test_signals import log_without_times, signal_in
from trainer_seq2seq import Seq2SeqTrainer

FACTS = {
    **{"max_steps": 60, "processes": 1, "resumable": True, "sound": True},
    **{"rows": "", "rows_per_step": 2},
}
SETTINGS = {"learning_rate": 0.02, "max_steps": 60}


def make_published(directory, step):
    """A checkpoint as the published code writes it."""
    folder = directory / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_text("{}")
    return folder


def stage(directory, step):
    folder = directory / f"checkpoint-{step}"
    start_checkpoint(folder)
    staging = staging_path(folder)
    (staging / "weights").mkdir()
    (staging / "weights" / "a.bin").write_bytes(bytes(range(100)))
    (staging / "optimizer.pt").write_bytes(b"x" * 1000)
    return folder


def make_checkpoint(directory, step, **facts):
    folder = stage(directory, step)
    finish_checkpoint(folder, {"step": step, **FACTS, **facts})
    return folder


def record(directory, settings=SETTINGS):
    """Leave the run.json of a run with these settings."""
    with RunDirectory(directory) as run:
        run.choose(settings, requested="auto", overwrite=False)
        run.begin()


def choose(directory, requested=None, *, settings=SETTINGS, overwrite=False, rows=""):
    """Return the checkpoint that a run with these flags resumes."""
    with RunDirectory(directory) as run:
        run.choose(settings, requested=requested, overwrite=overwrite)
        return run.start(rows, rows_per_step=2, processes=1)


def contents(directory: Path) -> dict[str, str]:
    """Return a hash of every file, and the time of its last change."""
    return {
        path.relative_to(directory).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns)
        )
        for path in directory.rglob("*")
        if path.is_file()
    }


# ---- Checkpoints ----


def test_checkpoints_come_by_step_and_only_intact_ones(tmp_path):
    newest, older = make_checkpoint(tmp_path, 1000), make_checkpoint(tmp_path, 200)
    make_published(tmp_path, 3000)
    stage(tmp_path, 5000)
    (tmp_path / "checkpoint-4000").write_text("a file")
    assert RunDirectory(tmp_path).checkpoints() == [older, newest]
    assert RunDirectory(tmp_path / "nowhere").checkpoints() == []


def test_auto_takes_the_newest_intact_one_or_starts_over(tmp_path):
    assert choose(tmp_path, "auto") is None
    record(tmp_path)
    folder = make_checkpoint(tmp_path, 10)
    (make_checkpoint(tmp_path, 20) / "optimizer.pt").unlink()
    assert choose(tmp_path, "auto") == folder
    assert choose(tmp_path, "True") == folder


def test_the_clock_does_not_decide_which_is_newest(tmp_path):
    older, newer = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    os.utime(older, (4e9, 4e9))
    os.utime(newer, (1, 1))
    assert choose(tmp_path, "auto") == newer
    RunDirectory(tmp_path).rotate(1)
    assert RunDirectory(tmp_path).checkpoints() == [newer]


def test_true_needs_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no intact checkpoint-N"):
        choose(tmp_path, "true")


@pytest.mark.parametrize("name", ["checkpoint-20", "nowhere"])
def test_a_published_or_missing_checkpoint_is_refused(name, tmp_path):
    make_published(tmp_path, 20)
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint\.json|does not exist") as error:
        choose(tmp_path / "out", str(tmp_path / name))
    assert "--init_from starts a new training" in str(error.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + b"?")


DAMAGE = {
    "cut short": (lambda folder: cut(folder / "optimizer.pt"), "999 bytes of 1,000"),
    "a bit flipped": (lambda folder: flip(folder / "weights" / "a.bin"), "checksum of weights/a"),
    "a file gone": (lambda folder: (folder / "optimizer.pt").unlink(), "has no optimizer.pt"),
    "no list": (lambda folder: cut(folder / MANIFEST_NAME) or cut(folder / MANIFEST_NAME), "read"),
    "a list of nothing": (lambda folder: (folder / MANIFEST_NAME).write_text("[]"), "of format 2"),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_a_damaged_checkpoint_is_skipped_and_named(case, tmp_path, caplog):
    good, bad = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    damage, words = DAMAGE[case]
    damage(bad)
    assert choose(tmp_path, "auto") == good
    assert "checkpoint-20 is skipped" in caplog.text
    assert words in caplog.text
    with pytest.raises(FileNotFoundError, match="cannot be resumed"):
        choose(tmp_path, str(bad))


def test_one_without_an_optimizer_is_not_resumed(tmp_path):
    record(tmp_path)
    folder = make_checkpoint(tmp_path, 10, resumable=False)
    with pytest.raises(FileNotFoundError, match="--save_only_model"):
        choose(tmp_path, str(folder))
    for requested in (None, "auto"):
        with pytest.raises(OutputDirectoryError, match="it left nothing to resume from"):
            choose(tmp_path, requested)
    assert choose(tmp_path, overwrite=True) is None


def test_rotation_keeps_the_newest_the_best_and_the_last_sound_one(tmp_path):
    made = {step: make_checkpoint(tmp_path, step, sound=step < 40) for step in (10, 20, 30, 40, 50)}
    (made[10] / "optimizer.pt").unlink()  # a damaged one counts for nothing
    run = RunDirectory(tmp_path)
    assert run.rotate(None) == []
    assert run.rotate(1, keep=[made[20]]) == [made[40]]
    assert run.checkpoints() == [made[20], made[30], made[50]]
    assert run.last_sound() == made[30]
    assert made[10].is_dir()


def test_rotation_leaves_as_many_as_asked(tmp_path):
    for step in range(1, 6):
        make_checkpoint(tmp_path, step)
        RunDirectory(tmp_path).rotate(2)
    names = [folder.name for folder in RunDirectory(tmp_path).checkpoints()]
    assert names == ["checkpoint-4", "checkpoint-5"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_rotation_never_deletes_the_one_just_saved(tmp_path):
    make_checkpoint(tmp_path, 1000)
    saved = make_checkpoint(tmp_path, 10)
    assert RunDirectory(tmp_path).rotate(1, keep=[saved]) == []


def test_entering_sweeps_what_a_killed_run_left(tmp_path):
    stage(tmp_path, 10)
    make_checkpoint(tmp_path, 20).rename(tmp_path / ".checkpoint-20.unfinished")
    make_checkpoint(tmp_path, 30).rename(tmp_path / ".checkpoint-30.removed")
    make_checkpoint(tmp_path, 40).rename(tmp_path / ".checkpoint-40.unfinished")
    cut(tmp_path / ".checkpoint-40.unfinished" / "optimizer.pt")
    (tmp_path / ".checkpoint-mine.unfinished").mkdir()
    (tmp_path / ".report.html.4711.tmp").write_text("hal")
    with RunDirectory(tmp_path):
        names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".checkpoint-mine.unfinished", LOCK_NAME, "checkpoint-20"]
    assert fault_of(tmp_path / "checkpoint-20") is None


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path):
    folder = make_checkpoint(tmp_path, 10)
    (folder / "old").write_text("of an earlier run")
    make_checkpoint(tmp_path, 10, rows="new")
    assert json.loads((folder / MANIFEST_NAME).read_text())["rows"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert not (folder / "old").exists()


# ---- What a new run may do with an old one ----


def test_an_empty_folder_or_a_run_killed_before_its_first_checkpoint_starts(tmp_path):
    assert choose(tmp_path) is None
    record(tmp_path, {"learning_rate": 1.0})
    assert choose(tmp_path) is None


def test_the_same_settings_and_rows_resume(tmp_path, caplog):
    record(tmp_path)
    folder = make_checkpoint(tmp_path, 15, rows="30-1")
    with caplog.at_level("INFO"):
        assert choose(tmp_path, rows="30-1") == folder
    assert "checkpoint-15, which the same command wrote (step 15 of 60)" in caplog.text
    assert "to start over, add --overwrite_output_dir" in caplog.text


def test_other_settings_are_refused_by_name(tmp_path):
    record(tmp_path, {**SETTINGS, "seed": 1})
    make_checkpoint(tmp_path, 15)
    with pytest.raises(OutputDirectoryError) as error:
        choose(tmp_path, settings={**SETTINGS, "learning_rate": 0.001, "bf16": True})
    text = str(error.value)
    assert "holds checkpoint-15 (step 15 of 60) of an earlier run" in text
    assert "--bf16 was unset and is true, --learning_rate was 0.02 and is 0.001, --seed was" in text
    assert "give another folder (--output_dir, or NAME=... before bash train.sh)" in text
    assert "add --resume_from_checkpoint auto" in text
    assert "add --overwrite_output_dir" in text


def test_other_rows_are_refused(tmp_path):
    record(tmp_path)
    make_checkpoint(tmp_path, 15, rows="30-1")
    with pytest.raises(OutputDirectoryError, match="now 20 rows, checksum 2") as error:
        choose(tmp_path, rows="20-2")
    assert "its own training file and lengths with --resume_from_checkpoint auto" in str(
        error.value
    )


@pytest.mark.parametrize("content", [None, "{", '{"format_version": 99}'])
def test_a_run_of_unknown_settings_is_refused(content, tmp_path):
    make_published(tmp_path, 500)
    if content is not None:
        (tmp_path / RECORD_NAME).write_text(content)
    for requested in (None, "auto"):
        with pytest.raises(OutputDirectoryError, match="its settings are not known") as error:
            choose(tmp_path, requested)
        assert "holds checkpoint-500" in str(error.value)
        assert "add --resume_from_checkpoint auto" not in str(error.value)


def test_a_finished_run_without_checkpoints_is_not_replaced(tmp_path):
    record(tmp_path)
    (tmp_path / "prefix.safetensors").write_bytes(b"weeks of work")
    with pytest.raises(OutputDirectoryError, match="a trained model of an earlier run"):
        choose(tmp_path)
    assert choose(tmp_path, overwrite=True) is None


def test_overwriting_removes_checkpoints_and_nothing_else(tmp_path, caplog):
    make_published(tmp_path, 20)
    make_checkpoint(tmp_path, 30)
    (tmp_path / "checkpoint-mine").mkdir()
    (tmp_path / "report.html").write_text("x")
    with RunDirectory(tmp_path) as run, caplog.at_level("INFO"):
        run.choose(SETTINGS, overwrite=True)
        assert run.start("", rows_per_step=2, processes=1) is None
        assert len(RunDirectory(tmp_path).checkpoints()) == 1  # not before the first step
        run.begin()
    assert "Removed the earlier run's checkpoints" in caplog.text
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-mine", "report.html", RECORD_NAME]


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tmp_path):
    (tmp_path / "there").mkdir()

    def fail(folder, name=None):
        with RunDirectory(folder):
            if name:
                (folder / name).touch()
            raise RuntimeError("no model")

    for folder in (tmp_path / "there" / "a" / "b", tmp_path / "there"):
        with pytest.raises(RuntimeError):
            fail(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(RuntimeError):
        fail(tmp_path / "c" / "d", "result")
    assert (tmp_path / "c" / "d" / "result").exists()


# ---- The same with main.py ----


def test_the_same_command_after_ctrl_c_resumes(short_run, monkeypatch, capfd, caplog):
    alone = short_run.folder / "alone"
    assert short_run.start(out=alone) == 0
    with monkeypatch.context() as patched:
        signal_in(patched, "training_step", 3, signal.SIGINT)
        assert short_run.start() == 130
    assert "checkpoint-3 is complete: type the same command again" in capfd.readouterr().err
    with caplog.at_level("INFO"):
        assert short_run.start() == 0
    assert "checkpoint-3, which the same command wrote (step 3 of 6)" in caplog.text
    assert same(short_run.prefix(), short_run.prefix(alone))
    wanted = json.loads((alone / "trainer_state.json").read_text("utf-8"))["log_history"]
    steps = [entry["loss"] for entry in wanted if "loss" in entry]
    assert [entry["loss"] for entry in log_without_times(short_run) if "loss" in entry] == steps


def test_another_learning_rate_or_other_rows_change_nothing(short_run, monkeypatch, capsys):
    assert short_run.start("--save_total_limit", "1") == 0
    before = contents(short_run.out)
    with monkeypatch.context() as patched:
        patched.setattr(
            "ptuning.train.rows.load_rows", lambda *_a, **_o: pytest.fail("rows were read")
        )
        assert short_run.start("--learning_rate", "1e-3") == 2
    error = capsys.readouterr().err
    assert "holds checkpoint-6 (step 6 of 6)" in error
    assert "--learning_rate was 0.02 and is 0.001" in error
    write_rows(short_run.folder / "train.json", rows(29))
    assert short_run.start("--save_total_limit", "1") == 2
    assert "it was trained on different rows (30 rows, " in capsys.readouterr().err
    assert contents(short_run.out) == before
    assert short_run.start("--overwrite_output_dir", "--max_steps", "2") == 0
    assert short_run.checkpoints() == ["checkpoint-2"]


def test_a_finished_run_goes_on_to_validation(short_run, caplog):
    assert short_run.start() == 0
    prefix = short_run.prefix()
    with caplog.at_level("INFO"):
        assert short_run.start("--do_eval") == 0
    assert "(step 6 of 6)" in caplog.text
    assert same(short_run.prefix(), prefix)
    assert "eval_loss" in json.loads((short_run.out / "eval_results.json").read_text("utf-8"))


def test_a_finished_run_of_whole_epochs_keeps_its_figures(short_run):
    """No epoch is left to run, so transformers goes straight to the end."""
    flags = ("--max_steps", "-1", "--num_train_epochs", "1", "--save_steps", "8")
    assert short_run.start(*flags) == 0
    path = short_run.out / "train_results.json"
    first = json.loads(path.read_text("utf-8"))
    assert short_run.start(*flags) == 0
    assert json.loads(path.read_text("utf-8"))["train_loss"] == first["train_loss"]


def test_a_run_without_checkpoints_is_not_trained_again(short_run, capsys):
    assert short_run.start("--save_strategy", "no") == 0
    before = contents(short_run.out)
    assert short_run.start("--save_strategy", "no") == 2
    assert "it left nothing to resume from" in capsys.readouterr().err
    assert contents(short_run.out) == before


def test_the_trainer_changes_no_arguments_but_its_own(short_run, monkeypatch):
    real, seen = Seq2SeqTrainer.__init__, []

    def init(trainer, model, args, run):
        seen.append((args, dict(vars(args)), trainer))
        real(trainer, model, args, run)

    monkeypatch.setattr(Seq2SeqTrainer, "__init__", init)
    flags = ("--eval_on_start", "true", "--eval_strategy", "steps", "--eval_steps", "2")
    flags += ("--per_device_eval_batch_size", "3")
    assert short_run.start(*flags) == 0
    assert short_run.start(*flags) == 0
    for args, before, trainer in seen:
        assert vars(args) == before
        assert trainer.args.per_device_eval_batch_size == 3
    assert not seen[1][2].args.eval_on_start


def test_files_of_others_stay(short_run):
    short_run.out.mkdir()
    (short_run.out / "notes.txt").write_text("mine")
    (short_run.out / "checkpoint-mine").mkdir()
    before = contents(short_run.out)
    assert short_run.start() == 0
    assert before.items() <= contents(short_run.out).items()
    assert (short_run.out / "checkpoint-mine").is_dir()


def test_a_start_that_fails_leaves_no_folder(short_run, monkeypatch):
    def fail(*_args, **_options):
        raise FileNotFoundError("no weights")

    monkeypatch.setattr("ptuning.train.tuning.load_base", fail)
    assert short_run.start(out=short_run.out / "deeper") == 2
    assert not short_run.out.exists()


def test_a_learning_rate_that_the_checkpoint_overrides_is_said_and_not_recorded(
    short_run, monkeypatch, caplog
):
    """The optimizer state holds the rate, so that a typed one would be ignored in silence."""
    assert short_run.start() == 0
    uninterrupted = short_run.prefix()
    with monkeypatch.context() as patched:
        signal_in(patched, "training_step", 3, signal.SIGINT)
        assert short_run.start("--overwrite_output_dir") == 130
    caplog.clear()
    assert short_run.start("--learning_rate", "1e-3", "--resume_from_checkpoint", "auto") == 0
    assert "--learning_rate 0.001 has no effect" in caplog.text
    assert same(short_run.prefix(), uninterrupted)
    record = json.loads((short_run.out / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["learning_rate"] != 1e-3


def test_a_finished_run_keeps_the_record_of_its_training(short_run, caplog):
    assert short_run.start() == 0
    before = (short_run.out / "train_results.json").read_bytes()
    with caplog.at_level("INFO"):
        assert short_run.start() == 0
    assert "Nothing is left to train" in caplog.text
    assert "nan" not in caplog.text
    assert (short_run.out / "train_results.json").read_bytes() == before


def test_a_resumed_run_whose_first_checkpoint_was_rotated_away_finishes(short_run, monkeypatch):
    flags = ("--save_total_limit", "1")
    with monkeypatch.context() as patched:
        signal_in(patched, "training_step", 3, signal.SIGINT)
        assert short_run.start(*flags) == 130
    assert short_run.start(*flags) == 0
    assert (short_run.out / "train_results.json").is_file()
    (short_run.out / "train_results.json").unlink()  # as if killed right after the last checkpoint
    assert short_run.start(*flags) == 0
    assert (short_run.out / "train_results.json").is_file()


def test_advice_after_a_stop_names_the_flag_that_the_next_command_needs(short_run):
    assert short_run.start() == 0
    config = parse_arguments(short_run.flags())
    assert "type the same command again" in how_to_resume(config)
    assert "--resume_from_checkpoint auto" in how_to_resume(config, changed=True)
    named = parse_arguments([*short_run.flags(), "--resume_from_checkpoint", "somewhere"])
    assert "--resume_from_checkpoint auto" in how_to_resume(named)
    for checkpoint in short_run.out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert "--ptuning_checkpoint" in how_to_resume(config)
