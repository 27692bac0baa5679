"""Threads follow a container's share of processors, the user's choice, and who computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptuning.model.cpu import threads as cpu_threads
from ptuning.model.cpu.threads import (
    container_cpus,
    leave_a_processor,
    limit_threads,
    release_helper_threads,
)


@pytest.fixture
def eight_threads(monkeypatch):
    """A machine on which PyTorch would take eight threads; nothing is really set."""
    threads = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return threads


@pytest.mark.parametrize(
    ("content", "cpus"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("max 100000", None),
        ("", None),
    ],
)
def test_the_share_is_read_from_the_limit(tmp_path, content, cpus):
    file = tmp_path / "cpu.max"
    file.write_text(content + "\n", encoding="utf-8")
    assert container_cpus(file) == cpus


def test_no_limit_where_there_is_no_such_file(tmp_path, eight_threads):
    assert container_cpus(tmp_path / "none") is None
    assert limit_threads(tmp_path / "none") == 8


def test_threads_are_lowered_never_raised(tmp_path, eight_threads):
    file = tmp_path / "cpu.max"
    file.write_text("1600000 100000", encoding="utf-8")
    assert limit_threads(file) == 8
    file.write_text("200000 100000", encoding="utf-8")
    assert limit_threads(file) == 2


def test_a_processor_is_left_but_never_the_last_one(eight_threads):
    assert leave_a_processor() == 7
    eight_threads[0] = 1
    assert leave_a_processor() == 1


def test_the_users_own_number_stays(tmp_path, eight_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert leave_a_processor() == 8
    file = tmp_path / "cpu.max"
    file.write_text("200000 100000", encoding="utf-8")
    assert limit_threads(file) == 8


TASKS = Path("/proc/self/task")
COUNT_HELPERS = """
import os
import torch
from ptuning.model.cpu.threads import release_helper_threads

torch.set_num_threads(2)
many = torch.empty(1_000_000)
before = len(os.listdir("/proc/self/task"))
many.fill_(1.0)
computing = len(os.listdir("/proc/self/task"))
released = release_helper_threads()
after = len(os.listdir("/proc/self/task"))
many.mul_(2.0)
again = len(os.listdir("/proc/self/task"))
print(computing - before, released, after - before, again - before, many[0].item())
"""


@pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted in Linux's /proc")
def test_helpers_end_and_come_back() -> None:
    run = [sys.executable, "-c", COUNT_HELPERS]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    found = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "True", "0", "1", "2.0"]


def test_without_a_list_of_libraries_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_threads, "LOADED_FILES", tmp_path / "none")
    assert release_helper_threads() is False


def test_a_library_that_is_no_more_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 08:01 42       "
    maps.write_text(f"{line}{tmp_path}/libgomp.so.1 (deleted)\n7f02-7f03 rw-p 0 00:00 0\n", "utf-8")
    monkeypatch.setattr(cpu_threads, "LOADED_FILES", maps)
    assert release_helper_threads() is False
