"""Threads follow a container's share of processors, and the user's own choice."""

import pytest
import torch

from ptuning.model.cpu_threads import container_cpus, limit_threads


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


def test_the_users_own_number_stays(tmp_path, eight_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    file = tmp_path / "cpu.max"
    file.write_text("200000 100000", encoding="utf-8")
    assert limit_threads(file) == 8
