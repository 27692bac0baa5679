"""Scores against the published code's own numbers, and the rows that code crashed on."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.data.segmentation import word_cutter
from ptuning.scoring import metrics
from ptuning.scoring.metrics import (
    NO_MATCH,
    CorpusScores,
    PairScores,
    format_scores_table,
    mean_scores,
    score_pair,
)

TUNED = CorpusScores(PairScores(31.12, 7.11, 24.97, 8.104), samples=1070, scored=1070, empty=0)
PUBLISHED_NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def score_corpus(predictions: list[str | None], labels: list[str]) -> CorpusScores:
    rows = [score_pair(*pair) for pair in zip(predictions, labels, strict=True)]
    return mean_scores(predictions, rows)


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "metrics.json").read_text(encoding="utf-8"))
    return content


def test_every_pair_scores_as_published_to_four_places(published: dict[str, Any]) -> None:
    for pair in published["pairs"]:
        scores = score_pair(pair["predict"], pair["label"])
        assert scores is not None
        assert scores.by_published_name() == {name: pair[name] for name in PUBLISHED_NAMES}


def test_means_are_the_published_ones(published: dict[str, Any]) -> None:
    pairs = published["pairs"]
    scores = score_corpus([p["predict"] for p in pairs], [p["label"] for p in pairs])
    by_name = scores.by_published_name("predict")
    for name in PUBLISHED_NAMES:
        assert by_name[f"predict_{name}"] == pytest.approx(published["mean"][name], abs=1e-9)
    assert (scores.samples, scores.scored, scores.empty) == (len(pairs), len(pairs), 0)


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u3000", "\u2028", "\x1c\x85"])
def test_a_blank_prediction_scores_zero_and_is_counted(blank: str) -> None:
    assert score_pair(blank, "裤子") == NO_MATCH
    scores = score_corpus([blank, "裤子"], ["裤子", "裤子"])
    assert (scores.samples, scores.scored, scores.empty) == (2, 2, 1)
    assert scores.means is not None
    assert scores.means.rouge_1 == pytest.approx(50.0, abs=1e-4)


@pytest.mark.parametrize("blank", ["", " ", "\u3000"])
def test_a_row_without_a_label_is_answered_and_not_scored(blank: str) -> None:
    assert score_pair("裤子", blank) is None
    scores = score_corpus(["裤子", "裤子", ""], ["裤子", blank, blank])
    assert scores == CorpusScores(score_pair("裤子", "裤子"), samples=3, scored=1, empty=1)


def test_a_row_that_was_not_answered_is_neither_scored_nor_empty() -> None:
    assert score_pair(None, "裤子") is None
    scores = score_corpus(["裤子", None], ["裤子", "裤子"])
    assert scores == CorpusScores(score_pair("裤子", "裤子"), samples=1, scored=1, empty=0)


@pytest.mark.parametrize("predictions", [["裤子", ""], []])
def test_without_any_label_there_is_no_mean_rather_than_zero(predictions: list[str | None]) -> None:
    scores = score_corpus(predictions, [""] * len(predictions))
    num_empty = predictions.count("")
    assert scores == CorpusScores(None, samples=len(predictions), scored=0, empty=num_empty)
    named = scores.by_published_name("predict")
    assert {named[f"predict_{name}"] for name in PUBLISHED_NAMES} == {None}
    assert (named["predict_samples"], named["predict_scored"]) == (len(predictions), 0)


@pytest.mark.parametrize(
    "marks", [".", "。", "......", "……", "？！", "。 。", "”", "\n。", "。\n\n？"]
)
def test_a_prediction_of_punctuation_only_is_scored(marks: str) -> None:
    assert score_pair(marks, "裤子很好看") == NO_MATCH
    assert score_pair(marks, marks).rouge_1 == pytest.approx(100.0, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.text("。.?！… ”\n\u3000\ud800a1好裤子，", max_size=12), st.text("。? 好裤\n", max_size=8))
def test_no_pair_of_texts_crashes_or_leaves_the_scale(prediction: str, label: str) -> None:
    scores = score_pair(prediction, label)
    assert (scores is None) == (not label.strip())
    assert all(0.0 <= score <= 100.0 for score in scores or ())


def test_the_dictionary_loads_silently_without_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_folder() -> str:
        raise FileNotFoundError("no usable temporary directory")

    logging.getLogger("jieba").setLevel(logging.DEBUG)
    word_cutter.cache_clear()
    with monkeypatch.context() as patch:  # pytest itself needs the folder back right after
        patch.setattr(tempfile, "gettempdir", no_folder)
        words = metrics._words("我来到北京清华大学")
    assert words == "我 来到 北京 清华大学"
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_words_added_to_the_shared_jieba_change_no_score() -> None:
    import jieba

    before = metrics._words("白纱裙好看")
    jieba.add_word("白纱裙好看", freq=10**9)
    try:
        assert "".join(jieba.cut("白纱裙好看")) == next(
            iter(jieba.cut("白纱裙好看"))
        )  # it did take
        assert metrics._words("白纱裙好看") == before
    finally:
        jieba.del_word("白纱裙好看")


def test_result_names_are_the_published_ones() -> None:
    scores = CorpusScores(PairScores(1.0, 2.0, 3.0, 4.0), samples=7, scored=5, empty=6)
    names = scores.by_published_name("predict")
    assert names == {
        "predict_rouge-1": 1.0,
        "predict_rouge-2": 2.0,
        "predict_rouge-l": 3.0,
        "predict_bleu-4": 4.0,
        "predict_samples": 7,
        "predict_scored": 5,
        "predict_empty": 6,
    }


def test_every_line_ends_in_the_same_column() -> None:
    base = CorpusScores(NO_MATCH, samples=1070, scored=1070, empty=1070)
    lines = format_scores_table(base, TUNED).splitlines()
    assert {len(line) for line in lines[:-1]} == {43}  # 13 + 3 * 10
    assert lines[-1].split() == ["rows", "1070", "1070"]


def test_without_a_base_there_is_one_column() -> None:
    lines = format_scores_table(None, TUNED).splitlines()
    assert [line.split()[-1] for line in lines] == [
        "tuned", "8.10", "31.12", "7.11", "24.97", "0", "1070",
    ]  # fmt: skip
    assert {len(line) for line in lines} == {23}


def test_the_change_is_what_a_reader_subtracts() -> None:
    base = TUNED._replace(means=PairScores(31.12, 7.11, 24.97, 8.096))
    bleu_line = format_scores_table(base, TUNED).splitlines()[1]
    assert bleu_line.split() == ["BLEU-4", "8.10", "8.10", "+0.00"]


def test_different_numbers_of_rows_are_pointed_out() -> None:
    base = TUNED._replace(scored=100)
    assert "different numbers of rows" in format_scores_table(base, TUNED)
    assert "different" not in format_scores_table(TUNED, TUNED)


def test_the_table_says_how_many_of_the_answered_rows_were_scored() -> None:
    some = TUNED._replace(scored=70)
    lines = format_scores_table(some, some).splitlines()
    assert lines[-2:] == [
        "rows answered      1070      1070",
        "rows scored          70        70",
    ]
    assert format_scores_table(None, TUNED).splitlines()[-1] == "rows               1070"


def test_the_table_of_rows_without_labels_has_no_scores() -> None:
    none = TUNED._replace(means=None, scored=0)
    headings = [line[:13].strip() for line in format_scores_table(None, none).splitlines()]
    assert headings == ["", "empty answers", "rows answered", "rows scored"]
