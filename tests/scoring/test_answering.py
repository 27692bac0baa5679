"""Scoring goes on beside generation, keeps row order, and stops with the run."""

import threading

import pytest

from ptuning.scoring import answering
from ptuning.scoring.answering import BackgroundScores
from ptuning.scoring.metrics import PairScores, score_pair


def test_scores_come_in_row_order_whatever_order_rows_finish_in() -> None:
    rows = [("今天天气很好", "今天天气不错"), ("", "裤子"), ("裤子", ""), (None, "裤子")]
    with BackgroundScores() as scores:
        for index in (2, 0, 3, 1):
            scores.add(index, *rows[index])
        assert scores.in_row_order() == [score_pair(*row) for row in rows]


def test_adding_a_row_does_not_wait_for_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def slow(prediction: str, label: str) -> PairScores:
        assert go_on.wait(10)
        return PairScores(1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(answering, "score_pair", slow)
    with BackgroundScores() as scores:
        scores.add(0, "a", "b")
        scores.add(1, "a", "b")  # reached although row 0 waits for the next line
        go_on.set()
        assert len(scores.in_row_order()) == 2


def test_an_interrupted_run_scores_no_further_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on, scored = threading.Event(), threading.Event(), []

    def slow(prediction: str, label: str) -> PairScores:
        started.set()
        assert go_on.wait(10)
        scored.append(prediction)
        return PairScores(1.0, 1.0, 1.0, 1.0)

    def interrupted_run() -> None:
        with BackgroundScores() as scores:
            for index in range(50):
                scores.add(index, str(index), "b")
            assert started.wait(10)
            threading.Timer(0.05, go_on.set).start()
            raise KeyboardInterrupt

    monkeypatch.setattr(answering, "score_pair", slow)
    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert scored == ["0"]


def test_what_scoring_raises_is_raised_where_the_scores_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(prediction: str, label: str) -> PairScores:
        raise RecursionError("too deep")

    monkeypatch.setattr(answering, "score_pair", broken)
    with BackgroundScores() as scores:
        scores.add(0, "a", "b")
        with pytest.raises(RecursionError, match="too deep"):
            scores.in_row_order()
