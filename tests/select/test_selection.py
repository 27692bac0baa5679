"""Duplicates and rows of --against: planted copies go, and nothing else."""

import time
from typing import Any

from ptuning.select.selection import PENDING, choose, drop_duplicates, drop_known, remaining
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


def test_a_near_copy_of_a_dev_row_with_another_prompt_goes() -> None:
    answer = "绿茶清新微苦，回味甘甜，适合夏天饮用，也常用来招待客人，还可以配点心一起吃。"
    dev = candidate("介绍一下绿茶的味道", answer)
    twin = candidate("介绍一下绿茶的味道吧", answer + "真好。")
    known = [dev, candidate("请介绍一下绿茶的味道", answer)]
    for against in ([dev], known):
        pool = [
            twin,
            candidate(
                "介绍一下红茶的味道", "红茶醇厚温和，带有麦芽香气，冬天喝最合适，也可以加牛奶。"
            ),
        ]
        for row in pool:
            row.verdict = PENDING
        drop_known(pool, against)
        assert [row.verdict.name for row in pool] == ["in_against", ""]


def test_a_dev_prompt_among_the_earlier_turns_goes() -> None:
    pool = [candidate("And now?", "It is late.", history=[["What time is it?", "Early."]])]
    drop_known(pool, [candidate("What time is it", "")])
    assert pool[0].verdict.name == "in_against"


def test_rows_with_one_long_instruction_are_told_apart_by_their_own_lines() -> None:
    """They would be one cluster by their whole text, and each be compared with all others."""
    words = "decide whether the following review of a product is good or bad and say why".split()
    instruction = " ".join(words * 8)
    rows = [
        candidate(
            f"{instruction}\nreview {chr(97 + n % 26) * 3}{n} of item{n * 7} by user{n * 3}", "good"
        )
        for n in range(1500)
    ]
    started = time.process_time()
    drop_duplicates(rows)
    assert time.process_time() - started < 10
    assert remaining(rows) == rows


def test_rows_that_share_too_much_are_compared_with_the_likeliest_and_said(caplog) -> None:
    """On one line nothing tells the instruction from the rest."""
    words = "tell me in a few words whether this is a good thing to have at home and why".split()
    rows = [
        candidate(" ".join([*words * 8, f"item{n} {n * n}"]), f"answer number {n * 7919} it is {n}")
        for n in range(300)
    ]
    rows.append(candidate(rows[150].contract["prompt"] + " please", rows[150].answer))
    drop_duplicates(rows)
    assert [row.verdict.name for row in rows if row.verdict != PENDING] == ["near_duplicate"]
    assert "shared too much text with others" in caplog.text


def test_equal_scores_are_ordered_by_chance() -> None:
    def first(seed):
        rows = [candidate(f"问题{n}", f"回答{n}", f"a:{n}", score=5.0) for n in range(50)]
        return [
            row.contract["id"]
            for row in choose(rows, 5, None, lambda _: lambda _: None, seed).picked
        ]

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert first(1) != [f"a:{n}" for n in range(5)]


def test_the_longest_baseline_is_the_longest() -> None:
    rows = [candidate(f"问题{n}", "长" * n, f"a:{n}", score=float(-n)) for n in range(1, 20)]
    choice = choose(rows, 3, None, lambda _: lambda _: None, seed=1)
    assert [row.contract["id"] for row in choice.longest] == ["a:19", "a:18", "a:17"]
    assert [row.contract["id"] for row in choice.picked] == ["a:1", "a:2", "a:3"]


def test_earlier_turns_belong_to_a_rows_text() -> None:
    rows = [
        candidate("And now?", "It is late.", history=[["What time is it?", "Early."]]),
        candidate("And now?", "It is late."),
    ]
    drop_duplicates(rows)
    assert remaining(rows) == rows
    assert rows[0].text_row.history == (("What time is it?", "Early."),)
