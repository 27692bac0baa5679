"""Whole checkpoints are found, halves are not."""

import pytest

from ptuning.train.run_directory import (
    NEEDED_FILES,
    checkpoint_to_resume,
    checkpoints,
    remove_checkpoints,
)


def make_checkpoint(directory, step, leave_out=()):
    folder = directory / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in set(NEEDED_FILES) - set(leave_out):
        (folder / name).write_text("{}")
    return folder


def test_checkpoints_come_by_step_and_only_whole_ones(tmp_path):
    newest = make_checkpoint(tmp_path, 1000)
    older = make_checkpoint(tmp_path, 200)
    make_checkpoint(tmp_path, 3000, leave_out=["trainer_state.json"])
    (tmp_path / "checkpoint-4000").write_text("a file")
    assert checkpoints(tmp_path) == [older, newest]
    assert checkpoints(tmp_path / "nowhere") == []


def test_auto_takes_the_newest_whole_one_or_starts_anew(tmp_path):
    assert checkpoint_to_resume(tmp_path, "auto") is None
    folder = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 20, leave_out=["prefix.safetensors"])
    assert checkpoint_to_resume(tmp_path, "auto") == folder
    assert checkpoint_to_resume(tmp_path, "True") == folder


def test_true_needs_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint-N"):
        checkpoint_to_resume(tmp_path, "true")


def test_a_named_half_is_refused_with_what_it_lacks(tmp_path):
    half = make_checkpoint(tmp_path, 20, leave_out=["prefix.safetensors"])
    with pytest.raises(FileNotFoundError, match=r"has no prefix\.safetensors"):
        checkpoint_to_resume(tmp_path, str(half))


def test_removing_takes_checkpoints_and_nothing_else(tmp_path):
    make_checkpoint(tmp_path, 20, leave_out=["prefix.safetensors"])
    make_checkpoint(tmp_path, 30)
    (tmp_path / "checkpoint-mine").mkdir()
    (tmp_path / "report.html").write_text("x")
    assert remove_checkpoints(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-mine", "report.html"]
