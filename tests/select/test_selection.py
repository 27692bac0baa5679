"""Duplicates and rows of --against: planted copies go, and nothing else."""

from typing import Any

from ptuning.select.selection import PENDING, drop_duplicates, drop_known, remaining
from tests.select.conftest import candidate


def planted(lima: Any) -> list[Any]:
    return [
        candidate(row["prompt"], row["response"], row["id"], score=row["score"])
        for row in lima["near_duplicates"]["rows"]
    ]


def test_the_first_of_each_planted_cluster_survives(lima: Any) -> None:
    rows = planted(lima)
    drop_duplicates(rows)
    facts = lima["near_duplicates"]
    left = [row.contract["id"] for row in remaining(rows)]
    assert left == facts["survivors_first_in_file_order"]
    exact = [row.contract["id"] for row in rows if row.verdict.name == "exact_duplicate"]
    assert sorted(exact) == sorted(facts["exact_duplicates_after_the_first_in_file_order"])


def test_every_dropped_row_names_the_one_it_is_like(lima: Any) -> None:
    rows = planted(lima)
    drop_duplicates(rows)
    clusters = {row["id"]: row["cluster"] for row in lima["near_duplicates"]["rows"]}
    for row in rows:
        if row.verdict != PENDING:
            assert clusters[row.verdict.like] == clusters[row.contract["id"]]
            assert 0.7 <= row.verdict.similarity <= 1


def test_rows_that_share_a_question_pattern_differ_by_their_answers() -> None:
    rows = [
        candidate("What is the capital city of France?", "Paris"),
        candidate("What is the capital city of Spain?", "Madrid"),
        candidate("What is the capital city of Spain ?", "Madrid."),
    ]
    drop_duplicates(rows)
    assert [row.verdict.name for row in rows] == ["", "", "near_duplicate"]


def test_planted_copies_of_a_dev_set_go_and_nothing_else(lima: Any) -> None:
    facts = lima["near_duplicates"]
    rows = planted(lima)
    against = [row for row, given in zip(rows, facts["rows"], strict=True) if given["edit"] == 0]
    against = [row for row in against if row.contract["id"].endswith(("0", "5"))]
    clusters = {row["id"]: row["cluster"] for row in facts["rows"]}
    known = {clusters[row.contract["id"]] for row in against}
    assert 5 < len(known) < 40
    pool = planted(lima)
    drop_known(pool, planted_only(against))
    for row in pool:
        gone = row.verdict.name == "in_against"
        assert gone == (clusters[row.contract["id"]] in known), row.contract["id"]


def planted_only(rows: list[Any]) -> list[Any]:
    return [candidate(row.contract["prompt"], row.contract["response"], "dev") for row in rows]


def test_a_dev_prompt_with_another_answer_goes_too() -> None:
    pool = [
        candidate("What is a harbour?", "A place for ships."),
        candidate("what is a harbour", "Somewhere to moor boats in a storm."),
        candidate("What is a canal?", "A waterway."),
        candidate("😀", "A smile."),
        candidate("!!!", "Three marks."),
    ]
    drop_known(pool, [candidate("What is a harbour?", ""), candidate("???", "")])
    assert [row.verdict.name for row in pool] == ["in_against", "in_against", "", "", ""]
