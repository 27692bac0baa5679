"""Faults from outside: no room on the disk, two runs in one folder, damage, a clock that jumps."""

import errno
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ptuning.train.run_directory as run_directory
from ptuning.train.checkpoints import capture_random_state, fault_of, restore_random_state
from ptuning.train.endings import (
    OutOfMemoryStop,
    advice_for,
    is_out_of_memory,
    memory_explained,
)
from ptuning.train.fit import Workload
from ptuning.train.run_directory import (
    LOCK_NAME,
    OutputDirectoryError,
    RunDirectory,
    run_lock,
)
from tests.train.conftest import same
from trainer_seq2seq import Seq2SeqTrainer

FORK = multiprocessing.get_context("fork")

# ---- A full disk ----


def full_from(monkeypatch, count):
    """Let every file operation of a checkpoint fail from the count-th on, as on a full disk."""
    calls = []

    def failing(real, error):
        def call(*args, **kwargs):
            calls.append(real)
            if len(calls) >= count:
                raise error
            return real(*args, **kwargs)

        return call

    no_room = OSError(errno.ENOSPC, "No space left on device")
    torch_error = RuntimeError("[enforce fail at inline_container.cc:858] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", failing(torch.save, torch_error))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text, no_room))
    monkeypatch.setattr(os, "fsync", failing(os.fsync, no_room))


@pytest.mark.parametrize("count", [12, 14, 25, 31, 34, 36, 40, 44])
def test_a_full_disk_leaves_the_last_good_checkpoint(count, short_run, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        full_from(patched, count)
        assert short_run.start("--save_steps", "1", "--save_total_limit", "1") == 5
    error = capsys.readouterr().err
    assert "could not be written to" in error
    assert "MiB are free there" in error
    assert "Make room, then: " in error
    assert "Traceback" not in error
    left = RunDirectory(short_run.out).checkpoints()
    assert {path for path in short_run.out.iterdir() if path.is_dir()} == set(left)
    if left:
        assert f"{left[-1]} is complete" in error
        assert "; it takes about 0.0 MiB" in error
    assert short_run.start("--save_steps", "1", "--resume_from_checkpoint", "auto") == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1,000 KiB; only root may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(short_run, small_disk, capsys):
    out = small_disk / "out"
    flags = ("--pre_seq_len", "128", "--save_steps", "1", "--save_total_limit", "1")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(600 * 1024))  # one checkpoint of 240 KiB fits, two do not
    assert short_run.start(*flags, out=out) == 5
    error = capsys.readouterr().err
    assert "No space left on device" in error or "the disk is full or fails" in error
    left = RunDirectory(out).checkpoints()
    assert len(left) == 1
    assert f"{left[0]} is complete" in error
    filler.unlink()
    assert short_run.start(*flags, "--resume_from_checkpoint", "auto", out=out) == 0
    assert short_run.start(*flags) == 0
    assert same(short_run.prefix(out), short_run.prefix())


# ---- Two runs in one folder ----


def hold(folder, seconds=30):
    """Hold the lock of a folder in a forked process; returns it when it does."""
    reader, writer = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hold_and_tell, args=(folder, seconds, writer))
    process.start()
    writer.close()
    assert reader.recv() == "held"
    reader.close()
    return process


def hold_and_tell(folder, seconds, writer):
    with RunDirectory(folder):
        writer.send("held")
        time.sleep(seconds)


def test_a_second_run_in_one_folder_is_refused_and_a_dead_one_is_not(short_run, capsys):
    short_run.out.mkdir()
    holder = hold(short_run.out)
    assert short_run.start("--train_file", "nowhere.json") == 2  # refused before rows are read
    error = capsys.readouterr().err
    assert "is being written by a run started 2" in error
    assert f"process {holder.pid} on {socket.gethostname()}" in error
    assert "another --output_dir" in error
    holder.kill()
    holder.join()
    assert (short_run.out / LOCK_NAME).exists()
    assert short_run.start() == 0
    assert not (short_run.out / LOCK_NAME).exists()


def test_a_run_that_cannot_start_lets_go_of_the_folder_and_makes_none(short_run, capsys):
    assert short_run.start("--train_file", "nowhere.json") == 2
    assert not short_run.out.exists()
    short_run.out.mkdir()
    for wrong in ("--train_file", "--tokenizer_name"):
        assert short_run.start(wrong, "nowhere.json") == 2
        assert "nowhere.json" in capsys.readouterr().err
        assert list(short_run.out.iterdir()) == []
    holder = hold(short_run.out, seconds=0)  # nobody's, for another process too
    holder.join()
    assert holder.exitcode == 0


def test_without_locks_the_process_decides(tmp_path, monkeypatch):
    def no_locks(_descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_directory, "lock_file", no_locks)
    mark = {"pid": os.getppid(), "host": socket.gethostname(), "started": "today"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(mark))
    with pytest.raises(OutputDirectoryError, match=f"process {os.getppid()} on"):
        run_lock(tmp_path).__enter__()
    elsewhere = {**mark, "host": "another-machine"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(elsewhere))
    with pytest.raises(OutputDirectoryError, match="on another-machine"):
        run_lock(tmp_path).__enter__()
    for stale in ({**mark, "pid": 2**22 + 1}, {**mark, "process_start": "1"}, {}):
        (tmp_path / LOCK_NAME).write_text(json.dumps(stale))
        with run_lock(tmp_path):
            assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_NAME).exists()


# ---- Damage, clocks, other rows ----


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "prefix.safetensors", "trainer_state.json", "run_state_0.json"]
)
def test_a_checkpoint_cut_short_is_skipped(name, short_run, caplog):
    assert short_run.start() == 0
    whole = short_run.prefix()
    file = short_run.out / "checkpoint-6" / name
    file.write_bytes(file.read_bytes()[:-10])
    assert short_run.start("--resume_from_checkpoint", "auto") == 0
    assert "checkpoint-6 is skipped: " + name in caplog.text
    assert same(short_run.prefix(), whole)
    assert fault_of(short_run.out / "checkpoint-6") is None


def test_a_finished_run_that_is_resumed_takes_no_step(short_run, caplog):
    assert short_run.start() == 0
    whole = short_run.prefix()
    assert short_run.start("--resume_from_checkpoint", "auto") == 0
    assert "asks for" not in caplog.text
    assert same(short_run.prefix(), whole)
    state = json.loads((short_run.out / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == 6
    assert short_run.checkpoints() == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(
    ("trained", "asked", "more", "said"),
    [
        (
            "6",
            "8",
            (),
            "at step 4 of 6, and this run asks for 8: the linear learning-rate schedule now "
            "spans 8 steps and jumps here, so the result matches neither "
            "length. To keep the old schedule, type --max_steps 6",
        ),
        ("4", "6", (), "For a schedule of its own, start a new training from the weights: --init"),
        ("6", "3", (), "asks for 3: no step is left to train. To train on, type a larger --max_st"),
        (
            "6",
            "8",
            ("--lr_scheduler_type", "constant"),
            "at step 8, with the learning rate unchanged",
        ),
    ],
)
def test_another_number_of_steps_is_told_with_what_it_does(
    trained, asked, more, said, short_run, caplog
):
    assert short_run.start("--max_steps", trained, *more) == 0
    shutil.rmtree(short_run.out / "checkpoint-6", ignore_errors=True)
    caplog.clear()
    resumed = ("--resume_from_checkpoint", "auto", *more)
    assert short_run.start("--max_steps", asked, *resumed) == 0
    (warning,) = [text for text in map(str, caplog.messages) if "asks for" in text]
    assert said in warning


def test_other_rows_are_refused_and_another_batch_is_told(short_run, capsys, caplog):
    assert short_run.start("--max_steps", "2") == 0
    flags = ("--resume_from_checkpoint", "auto")
    assert short_run.start(*flags, "--max_train_samples", "20") == 2
    error = capsys.readouterr().err
    assert "was trained on different rows than --train_file now" in error
    assert "--init_from" in error
    assert short_run.start(*flags, "--per_device_train_batch_size", "2") == 0
    assert (
        "was written with 4 rows per step by 1 processes, and this run has 2 and 1" in caplog.text
    )


def test_a_clock_that_jumps_changes_nothing(short_run, monkeypatch):
    assert short_run.start("--save_total_limit", "1") == 0
    whole = short_run.prefix()
    real, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 86400.0 * 365 * next(jumps))
    flags = ("--save_total_limit", "1", "--overwrite_output_dir")
    assert short_run.start(*flags, "--max_steps", "6", "--save_steps", "1") == 0
    assert same(short_run.prefix(), whole)
    assert short_run.checkpoints() == ["checkpoint-6"]


def test_a_broken_results_file_of_a_killed_run_is_replaced(short_run):
    short_run.out.mkdir()
    (short_run.out / "all_results.json").write_text('{"train_lo')
    assert short_run.start() == 0
    assert "train_loss" in json.loads((short_run.out / "all_results.json").read_text("utf-8"))


def test_the_random_state_comes_back_bit_for_bit():
    import random

    import numpy as np

    random.gauss(0, 1)
    state = json.loads(json.dumps(capture_random_state()))
    first = random.gauss(0, 1), np.random.rand(), torch.rand(3)  # noqa: NPY002
    restore_random_state(state)
    second = random.gauss(0, 1), np.random.rand(), torch.rand(3)  # noqa: NPY002
    assert first[:2] == second[:2]
    assert torch.equal(first[2], second[2])


# ---- --init_from ----


def test_init_from_starts_a_new_training_from_an_old_prefix(short_run, caplog):
    assert short_run.start() == 0
    second = short_run.folder / "second"
    start = ("--init_from", str(short_run.out))
    assert short_run.start(*start, "--learning_rate", "0", out=second) == 0
    assert same(short_run.prefix(second), short_run.prefix())
    state = json.loads((second / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == 6
    assert "Resuming" not in caplog.text


def test_init_from_is_refused_where_it_means_nothing(short_run, capsys):
    both = ("--init_from", "a", "--ptuning_checkpoint", "b")
    assert short_run.start(*both) == 2
    assert "--init_from is a and --ptuning_checkpoint is b" in capsys.readouterr().err
    assert short_run.start("--init_from", "nowhere") == 2
    assert "main.py: --init_from: nowhere does not exist" in capsys.readouterr().err
    flags = short_run.flags("--init_from", "a", "--do_predict")
    assert short_run_main([word for word in flags if word != "--do_train"]) == 2
    assert "--init_from is a without --do_train" in capsys.readouterr().err


def short_run_main(flags):
    from main import main

    return main(flags)


# ---- Out of memory ----

CUDA_WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB."
CPU_WORDS = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
WORKLOAD = Workload(torch.device("cpu"), train_batch=4, accumulation=4, eval_batch=8)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(CUDA_WORDS), RuntimeError(CPU_WORDS), MemoryError()],
    ids=["GPU", "CPU", "Python"],
)
def test_running_out_of_memory_says_which_setting_to_change(error, short_run, monkeypatch, capsys):
    real = Seq2SeqTrainer.compute_loss

    def compute_loss(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            raise error
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(Seq2SeqTrainer, "compute_loss", compute_loss)
    assert short_run.start() == 4
    told = capsys.readouterr().err
    assert "out of memory on cpu while training a batch of 4 x 26 tokens: " in told
    assert "GiB free of" in told
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 (now 4 x 1" in told
    assert "--gradient_checkpointing true" in told
    assert "--quantization_bit 4" in told
    assert "checkpoint-4 is complete" in told
    assert "Traceback" not in told


def test_memory_advice_leaves_out_what_is_in_use():
    in_use = {"eval_batch": 1, "checkpointing": "true", "quantization_bit": 4}
    frugal = Workload(torch.device("cpu"), accumulation=16, **in_use)
    assert len(advice_for(frugal, "training")) == 1
    assert "--max_source_length" in advice_for(frugal, "training")[0]
    uneven = Workload(torch.device("cpu"), train_batch=5, accumulation=3, **in_use)
    smaller = "--per_device_train_batch_size 1 --gradient_accumulation_steps 15"
    assert smaller in advice_for(uneven, "training")[0]
    assert "--per_device_eval_batch_size 4" in advice_for(WORKLOAD, "answering")[0]
    loading = advice_for(WORKLOAD, "loading the base")
    assert [line.split()[:2] for line in loading] == [
        ["--quantization_bit", "8"],
        ["--quantization_bit", "4"],
    ]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes") as other, memory_explained("x", WORKLOAD):
        raise RuntimeError("shapes")
    assert not isinstance(other.value, OutOfMemoryStop)
    assert "while answering: " in str(OutOfMemoryStop(MemoryError(), WORKLOAD, "answering"))


def test_the_trainers_explanation_is_not_explained_again():
    with (
        pytest.raises(OutOfMemoryStop, match="a batch of 2 x 3 tokens"),
        memory_explained("training", WORKLOAD),
        memory_explained("training", WORKLOAD, (2, 3)),
    ):
        raise RuntimeError(CPU_WORDS)


def test_a_safetensors_error_on_a_full_disk_is_known():
    from ptuning.train.endings import is_disk_error

    with pytest.raises(Exception, match="No such file") as found:
        save_file({"a": torch.ones(1)}, "/nowhere/at/all/a.safetensors")
    assert not is_disk_error(found.value)
    full = type(found.value)("I/O error: No space left on device (os error 28)")
    assert is_disk_error(full)


# ---- The data and its cache ----


@pytest.mark.parametrize("damage", ["cut", "flipped header", "other arrays"])
def test_a_corrupt_token_cache_is_made_again(damage, short_run, caplog):
    assert short_run.start() == 0
    whole = short_run.prefix()
    for file in (short_run.folder / "cache").glob("*.safetensors"):
        content = file.read_bytes()
        if damage == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "flipped header":
            file.write_bytes(b"\xff" + content[1:])
        else:
            save_file({"a": torch.ones(1)}, file, metadata={"notes": "{}"})
    assert short_run.start("--overwrite_output_dir") == 0
    assert "is corrupt" in caplog.text
    assert same(short_run.prefix(), whole)


def test_a_row_that_lacks_a_column_is_dropped_and_counted(short_run, caplog):
    path = short_run.folder / "train.json"
    lines = path.read_text("utf-8").splitlines()
    lines[6] = json.dumps({"content": "类型#裤"})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with caplog.at_level("INFO"):
        assert short_run.start("--max_steps", "1") == 0
    assert "30 rows read, 29 kept" in caplog.text
    assert '1 row (3.3%) dropped: empty "summary"' in caplog.text


def test_a_read_only_folder_is_told_before_the_base_is_loaded(
    short_run, small_disk, monkeypatch, capsys
):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setattr(
        "ptuning.train.tuning.load_base", lambda *_a, **_o: pytest.fail("was loaded")
    )
    assert short_run.start(out=small_disk / "out") == 2
    assert "cannot be written (Read-only file system)" in capsys.readouterr().err
