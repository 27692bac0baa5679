"""Quotas by temperature, the greedy choice, and what counts as too similar to a picked row."""

from typing import Any

import numpy as np
import pytest

from ptuning.data.near_duplicates import NearDuplicates
from ptuning.select.choosing import EMBED_ROWS, SimilarStates, pick, quotas
from ptuning.select.selection import choose
from tests.select.test_selection import planted


def test_quotas_are_the_golden_ones(lima: Any) -> None:
    assert len(lima["quotas"]) == 13
    for case in lima["quotas"]:
        exact, rows = quotas(case["counts"], case["budget"], case["temperature"])
        assert rows == case["rows"], case["case"]
        assert exact == pytest.approx(case["real"], abs=1e-9), case["case"]


@pytest.mark.parametrize(
    ("facts", "clusters"),
    [
        ("survivors_best_score", 60),
        ("budget_40_of_all_rows_best_score", 60),
        ("budget_40_of_clusters_0_to_39_best_score", 40),
    ],
)
def test_the_best_of_each_planted_cluster_is_picked(lima: Any, facts: str, clusters: int) -> None:
    expected = lima["near_duplicates"][facts]
    known = {row["id"] for row in lima["near_duplicates"]["rows"] if row["cluster"] < clusters}
    rows = [row for row in planted(lima) if row.contract["id"] in known]

    def similarity(ranked):
        picked = NearDuplicates()
        return lambda index: picked.find_or_add(
            index, "\n".join(ranked[index].pair), ranked[index].answer
        )

    choice = choose(rows, len(expected), None, similarity, seed=42)
    assert [row.contract["id"] for row in choice.picked] == expected
    verdicts = {row.verdict.name for row in rows if row.verdict}
    assert {"selected", "too_similar"} <= verdicts <= {"selected", "too_similar", "over_budget"}


def test_room_that_a_source_cannot_fill_goes_to_the_best_of_the_others() -> None:
    sources = ["a", "a", "b", "a", "b", "b"]
    too_similar = {2, 4}  # of source b only 5 is left

    def similar(index):
        return None if index not in too_similar else "like"

    picked, skipped = pick(sources, {"a": 1, "b": 3}, similar)
    assert picked == [0, 1, 3, 5]
    assert set(skipped) == too_similar


def test_states_are_compared_with_all_picked_and_computed_ahead() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(300, 8)).astype(np.float32)
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    asked: list[range] = []

    def embed(block: range) -> np.ndarray:
        asked.append(block)
        return states[block.start : block.stop]

    similar = SimilarStates(len(states), embed, threshold=0.8)
    picked: list[int] = []
    for index in range(len(states)):
        cosines = states[picked] @ states[index] if picked else np.zeros(1)
        found = similar(index)
        if cosines.max() > 0.8:
            assert found is not None
            assert found.number == picked[int(cosines.argmax())]
            assert found.similarity == pytest.approx(float(cosines.max()), abs=1e-6)
        else:
            assert found is None
            picked.append(index)
    assert 10 < len(picked) < 290
    assert asked == [range(start, start + EMBED_ROWS) for start in range(0, 300, EMBED_ROWS)]
