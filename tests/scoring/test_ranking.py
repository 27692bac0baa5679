"""The ranking of checkpoints by text: the order, the table, and how clear the lead is."""

import pytest

from ptuning.scoring.metrics import PairScores
from ptuning.scoring.ranking import Candidate, format_ranking, lead, rank


def candidate(name, rouge_l, *, bleu=1.0, loss=None):
    pairs = [None if score is None else PairScores(0.0, 0.0, score, bleu) for score in rouge_l]
    return Candidate(name=name, texts=["好"] * len(pairs), pairs=pairs, validation_loss=loss)


FIRST = candidate("checkpoint-1", [10.0, 20.0, None], bleu=9.0, loss=2.0)
SECOND = candidate("checkpoint-2", [20.0, 32.0, None], loss=2.5)
THIRD = candidate("checkpoint-3", [20.0, 28.0, None], loss=3.25)


def test_the_best_text_wins_whatever_the_loss_says():
    ranked = rank([FIRST, SECOND, THIRD], "rougeL")
    assert [row.name for row in ranked] == ["checkpoint-2", "checkpoint-3", "checkpoint-1"]
    base = candidate("base", [4.0, 2.0, None])
    assert format_ranking(ranked, base, "rougeL").splitlines() == [
        "                     rougeL     bleu  validation loss",
        "checkpoint-2          26.00     1.00           2.5000  best answers",
        "checkpoint-3          24.00     1.00           3.2500",
        "checkpoint-1          15.00     9.00           2.0000  lowest loss",
        "base                   3.00     1.00                -",
        "checkpoint-2 is ahead by 2.00, standard error 2.00: more dev prompts would tell them "
        "apart better",
    ]
    assert rank([FIRST, SECOND, THIRD], "bleu")[0] is FIRST


def test_of_equals_the_earlier_checkpoint_is_first():
    twin = candidate("checkpoint-4", [20.0, 32.0, None])
    assert [row.name for row in rank([SECOND, twin, FIRST], "rougeL")][:2] == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_a_run_without_validation_has_no_lowest_loss():
    table = format_ranking([candidate("checkpoint-9", [5.0])], None, "bleu")
    assert table.splitlines()[1:] == [
        "checkpoint-9           1.00     5.00                -  best answers"
    ]


def test_the_lead_is_measured_on_the_differences_of_rows():
    ahead = lead([THIRD, FIRST], "rougeL")  # 10 and 8
    assert ahead == {"ahead_by": 9.0, "standard_error": pytest.approx(1.0)}
    assert "more dev prompts" not in format_ranking([THIRD, FIRST], None, "rougeL")
    assert lead([FIRST], "rougeL") == {"ahead_by": None, "standard_error": None}
    one = [candidate(name, [3.0, None]) for name in "ab"]
    assert lead(one, "rougeL") == {"ahead_by": None, "standard_error": None}


def test_figures_have_every_mean_and_the_counts():
    assert THIRD.figures() == {
        "name": "checkpoint-3",
        "validation_loss": 3.25,
        "dev_rouge-1": 0.0,
        "dev_rouge-2": 0.0,
        "dev_rouge-l": 24.0,
        "dev_bleu-4": 1.0,
        "dev_samples": 3,
        "dev_scored": 2,
        "dev_empty": 0,
    }
