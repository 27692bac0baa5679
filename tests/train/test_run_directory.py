"""Whole checkpoints are found, halves are not; the last good one is never deleted."""

import json
import os

import pytest

from ptuning.train.resume.checkpointing import (
    LEGACY_FILES,
    MANIFEST_NAME,
    fault_of,
    finish_checkpoint,
    staging_path,
    start_checkpoint,
)
from ptuning.train.resume.run_directory import (
    checkpoint_to_resume,
    checkpoints,
    is_whole,
    last_sound,
    remove_checkpoints,
    rotate,
    sweep,
)

FACTS = {"processes": 1, "resumable": True, "sound": True, "rows": "", "rows_per_step": 2}


def make_legacy(directory, step, leave_out=()):
    folder = directory / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in set(LEGACY_FILES) - {"prefix.safetensors", *leave_out}:
        (folder / name).write_text("{}")
    if "prefix.safetensors" not in leave_out:
        (folder / "prefix.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
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


def test_checkpoints_come_by_step_and_only_whole_ones(tmp_path):
    newest = make_checkpoint(tmp_path, 1000)
    older = make_legacy(tmp_path, 200)
    make_legacy(tmp_path, 3000, leave_out=["trainer_state.json"])
    stage(tmp_path, 5000)
    (tmp_path / "checkpoint-4000").write_text("a file")
    assert checkpoints(tmp_path) == [older, newest]
    assert checkpoints(tmp_path / "nowhere") == []


def test_auto_takes_the_newest_whole_one_or_starts_anew(tmp_path):
    assert checkpoint_to_resume(tmp_path, "auto") is None
    folder = make_legacy(tmp_path, 10)
    make_legacy(tmp_path, 20, leave_out=["prefix.safetensors"])
    assert checkpoint_to_resume(tmp_path, "auto") == folder
    assert checkpoint_to_resume(tmp_path, "True") == folder


def test_the_clock_does_not_decide_which_is_newest(tmp_path):
    older, newer = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    os.utime(older, (4e9, 4e9))
    os.utime(newer, (1, 1))
    assert checkpoint_to_resume(tmp_path, "auto") == newer
    rotate(tmp_path, 1)
    assert checkpoints(tmp_path) == [newer]


def test_true_needs_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint-N"):
        checkpoint_to_resume(tmp_path, "true")


def test_a_named_half_is_refused_with_what_it_lacks(tmp_path):
    half = make_legacy(tmp_path, 20, leave_out=["prefix.safetensors"])
    with pytest.raises(FileNotFoundError, match=r"has no prefix\.safetensors"):
        checkpoint_to_resume(tmp_path, str(half))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + b"?")


DAMAGE = {
    "cut short": (lambda folder: cut(folder / "optimizer.pt"), "999 bytes of 1,000"),
    "a bit flipped": (lambda folder: flip(folder / "weights" / "a.bin"), "other content"),
    "a file gone": (lambda folder: (folder / "optimizer.pt").unlink(), "has no optimizer.pt"),
    "no list": (lambda folder: cut(folder / MANIFEST_NAME) or cut(folder / MANIFEST_NAME), "read"),
    "a list of nothing": (lambda folder: (folder / MANIFEST_NAME).write_text("[]"), "not a list"),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_a_damaged_checkpoint_is_passed_over_and_named(case, tmp_path, caplog):
    good, bad = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    damage, words = DAMAGE[case]
    damage(bad)
    assert checkpoint_to_resume(tmp_path, "auto") == good
    assert "checkpoint-20 is passed over" in caplog.text
    assert words in caplog.text
    with pytest.raises(FileNotFoundError, match="cannot be gone on from"):
        checkpoint_to_resume(tmp_path, str(bad))


@pytest.mark.parametrize("name", ["trainer_state.json", "prefix.safetensors", "optimizer.pt"])
def test_a_file_cut_short_in_an_old_checkpoint_is_noticed(name, tmp_path):
    folder = make_legacy(tmp_path, 10)
    assert fault_of(folder, thorough=True) is None
    (folder / name).write_bytes(b"{"[: name.endswith("json")])
    assert fault_of(folder, thorough=True) == f"{name} is cut short"


def test_one_without_an_optimiser_is_not_gone_on_from(tmp_path):
    folder = make_checkpoint(tmp_path, 10, resumable=False)
    assert checkpoint_to_resume(tmp_path, "auto") is None
    with pytest.raises(FileNotFoundError, match="--init_from"):
        checkpoint_to_resume(tmp_path, str(folder))


def test_rotation_keeps_the_newest_the_best_and_the_last_sound_one(tmp_path):
    made = {step: make_checkpoint(tmp_path, step, sound=step < 40) for step in (10, 20, 30, 40, 50)}
    (made[10] / "optimizer.pt").unlink()  # a half one counts for nothing
    assert rotate(tmp_path, None) == []
    assert rotate(tmp_path, 1, keep=[made[20]]) == [made[40]]
    assert checkpoints(tmp_path) == [made[20], made[30], made[50]]
    assert last_sound(tmp_path) == made[30]
    assert made[10].is_dir()


def test_rotation_leaves_as_many_as_asked(tmp_path):
    for step in range(1, 6):
        make_checkpoint(tmp_path, step)
        rotate(tmp_path, 2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_sweeping_takes_halves_and_names_whole_ones(tmp_path):
    stage(tmp_path, 10)
    make_checkpoint(tmp_path, 20).rename(tmp_path / ".checkpoint-20.unfinished")
    make_checkpoint(tmp_path, 30).rename(tmp_path / ".checkpoint-30.removed")
    make_checkpoint(tmp_path, 40).rename(tmp_path / ".checkpoint-40.unfinished")
    cut(tmp_path / ".checkpoint-40.unfinished" / "optimizer.pt")
    (tmp_path / ".checkpoint-mine.unfinished").mkdir()
    (tmp_path / ".report.html.4711.tmp").write_text("hal")
    sweep(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".checkpoint-mine.unfinished", "checkpoint-20"]
    assert is_whole(tmp_path / "checkpoint-20")
    sweep(tmp_path / "nowhere")


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path):
    folder = make_checkpoint(tmp_path, 10)
    (folder / "old").write_text("of an earlier run")
    make_checkpoint(tmp_path, 10, rows="new")
    assert json.loads((folder / MANIFEST_NAME).read_text())["rows"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert not (folder / "old").exists()


def test_removing_takes_checkpoints_and_nothing_else(tmp_path):
    make_legacy(tmp_path, 20, leave_out=["prefix.safetensors"])
    make_checkpoint(tmp_path, 30)
    (tmp_path / "checkpoint-mine").mkdir()
    (tmp_path / "report.html").write_text("x")
    assert remove_checkpoints(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-mine", "report.html"]
