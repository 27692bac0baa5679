"""Log lines and progress: what a terminal shows, and what a file gets."""

import logging
import subprocess
import sys

import pytest
from transformers.utils import logging as transformers_logging

from ptuning import output
from ptuning.output import Progress, duration, open_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    return now


def count(progress, clock, *, seconds):
    with progress:
        for _ in range(progress.total - progress.initial):
            clock[0] += seconds
            progress.update()


def test_a_loop_logs_a_line_per_tenth_with_the_time_left(clock, caplog, capsys):
    caplog.set_level(logging.INFO)
    count(Progress(200, "answering"), clock, seconds=1.0)
    assert caplog.messages == [
        *(
            f"answering: {done} of 200 rows ({done // 2} %), {duration(200 - done)} left"
            for done in range(20, 200, 20)
        ),
        "answering: 200 of 200 rows (100 %), took 3 min 20 s",
    ]
    assert capsys.readouterr().err == ""  # and no bar


def test_time_left_counts_only_what_was_done_here(clock, caplog):
    caplog.set_level(logging.INFO)
    count(Progress(200, "answering", initial=150), clock, seconds=2.0)
    assert caplog.messages[0] == "answering: 160 of 200 rows (80 %), 1 min 20 s left"


def test_a_loop_of_a_moment_logs_nothing(clock, caplog):
    caplog.set_level(logging.INFO)
    count(Progress(200, "tokenising"), clock, seconds=0.009)
    assert not caplog.messages


def test_tenths_that_follow_at_once_share_a_line(clock, caplog):
    caplog.set_level(logging.INFO)
    count(Progress(100, "validating", unit="batch"), clock, seconds=1 / 16)
    assert [message.split(",")[0] for message in caplog.messages] == [
        "validating: 32 of 100 batches (32 %)",
        "validating: 64 of 100 batches (64 %)",
        "validating: 96 of 100 batches (96 %)",
        "validating: 100 of 100 batches (100 %)",
    ]


def test_hidden_and_unbounded_loops_log_nothing(clock, caplog):
    caplog.set_level(logging.INFO)
    count(Progress(100, "answering", visible=False), clock, seconds=1.0)
    with Progress(None, "checking") as progress:
        clock[0] += 100.0
        progress.update(7)
    assert progress.done == 7
    assert not caplog.messages


@pytest.mark.parametrize(
    ("time_s", "words"),
    [
        (0.0, "0.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (3599.7, "1 h"),
        (7199.0, "2 h"),
        (86_399.0, "1 day"),
        (457.4 * 3600, "19 days 1 h"),
    ],
)
def test_a_duration_is_rounded_to_whole_units(time_s, words):
    assert duration(time_s) == words


def test_a_bar_needs_both_streams_on_a_terminal_and_leave_to_show(monkeypatch):
    for out, err, allowed in ((1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with monkeypatch.context() as patched:
            patched.setattr(sys.stdout, "isatty", lambda out=out: bool(out))
            patched.setattr(sys.stderr, "isatty", lambda err=err: bool(err))
            patched.setattr(output, "_bars_allowed", bool(allowed))
            with open_bar(3, "training") as bar:
                assert bar.disable == (not (out and err and allowed))


def test_a_terminal_without_unicode_gets_escapes_and_no_traceback():
    program = (
        "import logging, sys; from ptuning.output import start_logging; "
        "start_logging(logging.INFO, sys.stdout); logging.info('裤子 │ \\udcff'); print('裙')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        capture_output=True,
        check=False,
    )
    assert done.stderr == b""
    assert done.stdout.split() == [rb"\u88e4\u5b50", rb"\u2502", rb"\udcff", rb"\u88d9"]


def test_bars_of_transformers_are_kept_for_large_files_on_a_terminal_only(monkeypatch):
    for on_terminal, num_bytes, enabled in ((1, 10**10, 1), (1, 10**6, 0), (0, 10**10, 0)):
        monkeypatch.setattr(output, "shows_bars", lambda on_terminal=on_terminal: bool(on_terminal))
        with output.bars_for(num_bytes):
            assert transformers_logging.is_progress_bar_enabled() == bool(enabled)
        assert transformers_logging.is_progress_bar_enabled()
