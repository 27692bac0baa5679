"""Forgetting in figures, in predict_results.json and on the report page."""

import dataclasses

import pytest

from ptuning.scoring.report import RETENTION_MAX_ROWS, render_report
from ptuning.scoring.retention import Retention, RetentionRow
from tests.scoring.test_report import HOSTILE, Page, report

SAME = RetentionRow("你好", "你好！", "你好！", 4, base_loss=0.4, tuned_loss=0.8, divergence=0.2)
LOST = RetentionRow("1+1", "等于二", "裤子", 1, base_loss=0.1, tuned_loss=5.1, divergence=4.8)
BOTH = Retention("general_prompts.json", [SAME, LOST])


def test_figures_are_means_over_tokens():
    assert BOTH.by_name() == {
        "retention_prompts": 2,
        "retention_base_loss": pytest.approx(0.5 / 5),
        "retention_tuned_loss": pytest.approx(5.9 / 5),
        "retention_loss_change": pytest.approx(5.4 / 5),
        "retention_divergence": pytest.approx(1.0),
        "retention_same_answers": 1,
    }
    assert (SAME.change, LOST.change) == (pytest.approx(0.1), pytest.approx(5.0))


def test_forgetting_is_told_with_a_remedy_where_much_was_forgotten():
    first, advice = BOTH.line().splitlines()
    assert "1 of 2 general prompts answered as before tuning" in first
    assert "from 0.100 to 1.180 (+1.080)" in first
    assert "--preset gentle" in advice
    assert "docs/forgetting.md" in advice
    kept = Retention("prompts.json", [SAME])
    assert len(kept.line().splitlines()) == 1


def test_no_change_has_no_sign():
    same = dataclasses.replace(SAME, tuned_loss=SAME.base_loss - 1e-6)
    assert "(0.000)" in Retention("prompts.json", [same]).line()


def test_the_page_has_the_figures_and_both_answers_most_changed_first():
    text = render_report(report(retention=BOTH))
    page = Page(text)
    assert page.open == []
    assert '<td class="down">+1.080</td>' in text
    cards = text[text.index("遗忘") : text.index("逐条对比")]
    assert cards.index("等于二") < cards.index("你好！")
    assert "裤子" in cards
    assert cards.count("相同 identical</span>") == 1


def test_hostile_answers_are_shown_and_never_markup():
    row = RetentionRow(HOSTILE, HOSTILE, HOSTILE, 1, 0.0, 0.0, 0.0)
    page = Page(render_report(report(retention=Retention(HOSTILE, [row]), rows=[])))
    assert page.open == []
    assert page.attributes("script") == []
    assert page.attributes("img") == []
    assert sum(HOSTILE in words for words in page.words) == 4  # source, prompt, two answers


def test_many_rows_are_cut_to_the_most_changed():
    rows = [
        RetentionRow(f"[{index}]", "a", "b", 1, 0.0, float(index), 0.0)
        for index in range(RETENTION_MAX_ROWS + 5)
    ]
    text = render_report(report(retention=Retention("x", rows), rows=[]))
    assert text.count("<article") == RETENTION_MAX_ROWS
    assert "[4]" not in text
    assert "[5]" in text


def test_nothing_is_said_where_nothing_was_measured():
    assert "Forgetting" not in render_report(report())
