"""The report page: everything in it, nothing of it active, and small."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ptuning.scoring.metrics import CorpusScores, PairScores
from ptuning.scoring.report import ReportData, ReportRow, choose_rows, render_report, write_report
from ptuning.scoring.retention import Retention, RetentionRow

HOSTILE = "</bdi><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\"'"
BASE = CorpusScores(PairScores(20.0, 4.0, 15.5, 2.25), samples=300, scored=300, empty=3)
TUNED = CorpusScores(PairScores(31.12, 7.11, 14.97, 8.1), samples=300, scored=300, empty=0)
VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """Collects tags and visible words, and checks that what opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def rows(self) -> list[dict[str, str | None]]:
        return [found for found in self.attributes("details") if found.get("class") == "row"]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def row(index: int, **changes: object) -> ReportRow:
    plain = ReportRow(
        index, f"输入{index}", "标签", "微调答", float(index % 97), "基座答", float(index % 7)
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def unscored(index: int, **changes: object) -> ReportRow:
    return row(index, label="", tuned_bleu=None, base_bleu=None, **changes)


def report(**changes: object) -> ReportData:
    plain = ReportData(
        run="adgen-pt-128/checkpoint-3000",
        made_at="2025-01-02 12:00",
        model="THUDM/chatglm-6b",
        tuned_path="output/checkpoint-3000",
        step=3000,
        tuned=TUNED,
        base=BASE,
        rows=[row(index) for index in range(300)],
        settings={"learning_rate": 0.02},
        log_history=[{"step": 10, "loss": 5.5}, {"step": 20, "loss": 4.5}],
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_the_page_holds_scores_settings_and_curve() -> None:
    page = Page(render_report(report()))
    assert page.open == []
    words = " ".join(page.words)
    for wanted in ("8.10", "+5.85", "-0.53", "learning_rate", "0.02", "3000", "checkpoint-3000"):
        assert wanted in words
    assert len(page.attributes("svg")) == 1
    assert page.attributes("html")[0]["lang"] == "zh"


def test_the_title_names_the_run_and_its_base() -> None:
    text = render_report(report())
    assert "<title>adgen-pt-128/checkpoint-3000 · THUDM/chatglm-6b</title>" in text
    assert "<h1>adgen-pt-128/checkpoint-3000 <small>THUDM/chatglm-6b</small></h1>" in text


def test_all_rows_but_the_first_are_collapsed() -> None:
    page = Page(render_report(report()))
    assert ["open" in found for found in page.rows()] == [True] * 3 + [False] * 197


@pytest.mark.parametrize(
    ("tuning", "label"),
    [
        ("ptuning", "前缀 prefix"),
        ("lora", "LoRA 适配器 adapter"),
        ("full", "微调后的模型 tuned model"),
    ],
)
def test_what_was_tuned_has_its_own_name(tuning: str, label: str) -> None:
    text = render_report(report(tuning=tuning))
    assert f"<tr><th>{label}</th><td>output/checkpoint-3000</td></tr>" in text
    assert ("前缀" in text) == (tuning == "ptuning")


def test_settings_are_written_as_on_a_command_line_and_not_as_in_python() -> None:
    settings = {"history_column": None, "source_prefix": "", "do_sample": False, "top_p": 0.7}
    text = render_report(report(settings=settings))
    cells = re.findall("<tr><th>([a-z_]+)</th><td>([^<]*)</td></tr>", text)
    assert dict(cells) == {
        "history_column": "未设 unset",
        "source_prefix": "未设 unset",
        "do_sample": "false",
        "top_p": "0.7",
    }


def test_the_terms_are_those_of_the_chinese_readme() -> None:
    text = render_report(report(retention=Retention("x", [RetentionRow("", "", "", 1, 0, 0, 0)])))
    assert "基座模型" in text
    assert "基座 base" not in text
    assert "词元" not in text


def test_a_worse_score_is_marked_worse_and_fewer_empty_answers_better() -> None:
    text = render_report(report(rows=[]))
    assert '<td class="down">-0.53</td>' in text
    assert '<td class="up">-3</td>' in text


def test_hostile_text_is_shown_and_never_markup() -> None:
    hostile = report(
        run=HOSTILE,
        model=HOSTILE,
        settings={HOSTILE: HOSTILE},
        rows=[ReportRow(0, HOSTILE, HOSTILE, HOSTILE, 1.0, HOSTILE, 1.0)],
    )
    page = Page(render_report(hostile))
    assert page.open == []
    assert len(page.attributes("script")) == 1
    assert page.attributes("img") == []
    assert (
        sum(HOSTILE in words for words in page.words) == 10
    )  # window title, run, model twice, 2 settings, 4


def test_only_the_script_of_the_page_may_run_and_nothing_is_fetched() -> None:
    text = render_report(report())
    script = re.findall("<script>(.*?)</script>", text, flags=re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Page(text)
    assert f"script-src 'sha256-{digest}'" in str(page.attributes("meta")[1]["content"])
    assert "http://" not in text
    assert "https://" not in text
    assert all("src" not in attributes for _, attributes in page.tags)


def test_too_many_rows_are_thinned_and_it_says_so() -> None:
    text = render_report(report(max_rows=50))
    assert "50 of 300 rows" in text
    assert text.count('<details class="row"') == 50
    assert "All 300 rows" in render_report(report(max_rows=300))


def test_thinned_rows_hold_the_best_and_the_worst_in_order() -> None:
    rows = [row(index) for index in range(300)]
    chosen = choose_rows(rows, 40)
    bleus = [chosen_row.tuned_bleu for chosen_row in chosen]
    assert bleus == sorted(bleus, reverse=True)
    assert (bleus[0], bleus[-1]) == (96.0, 0.0)
    assert len({chosen_row.index for chosen_row in chosen}) == 40


def test_links_lead_to_the_best_middle_and_worst_row() -> None:
    rows = [row(index, tuned_bleu=float(index)) for index in range(5)]
    page = Page(render_report(report(rows=rows)))
    assert [link["href"] for link in page.attributes("a")] == ["#row4", "#row2", "#row0"]
    assert [card["id"] for card in page.rows()] == [f"row{index}" for index in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("unit", ["好" * 5000, "<" * 5000, "ab " * 5000])
def test_two_hundred_long_rows_stay_under_500_kilobytes(tmp_path: Path, unit: str) -> None:
    rows = [ReportRow(index, unit, unit, unit, 50.0, unit, 25.0) for index in range(200)]
    path = tmp_path / "report.html"
    write_report(path, report(rows=rows))
    assert path.stat().st_size < 500_000
    assert "Long texts are cut after" in path.read_text(encoding="utf-8")


def test_a_run_without_base_log_or_rows_has_a_page() -> None:
    text = render_report(report(base=None, step=None, rows=[], settings={}, log_history=[]))
    assert Page(text).open == []
    assert "基座模型 base<" not in text
    assert "<svg" not in text
    assert "<script" not in text


def test_rows_without_base_answers_show_the_tuned_ones() -> None:
    rows = [row(0, base=None, base_bleu=None, tuned=" ")]
    text = render_report(report(base=None, rows=rows))
    assert "空 empty" in text
    assert "data-base" not in text


def test_a_log_of_nan_only_is_told() -> None:
    text = render_report(report(log_history=[{"step": 10, "loss": float("nan")}]))
    assert "no finite loss logged" in text


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(path, report(rows=[row(0, tuned="坏\ud83d字")]))
    assert "坏&#55357;字" in path.read_text(encoding="utf-8")


def cards(text: str) -> list[str]:
    return re.findall('<details class="row".*?</details>', text, flags=re.DOTALL)


def test_rows_that_are_not_scored_say_why_and_come_last() -> None:
    no_prompt = replace(unscored(1, prompt=""), label="标签", tuned=None, base=None)
    rows = [unscored(0), no_prompt, row(2), row(3)]
    text = render_report(report(rows=rows))
    page = Page(text)
    assert [card["id"] for card in page.rows()] == ["row3", "row2", "row0", "row1"]
    assert [link["href"] for link in page.attributes("a")] == ["#row3", "#row2", "#row2"]
    *_, without_label, without_prompt = cards(text)
    assert "no answer to compare with: not scored" in without_label
    assert "no prompt: not answered" in without_prompt
    assert "空 empty" not in without_prompt.partition("label")[2]  # nobody was asked
    for card in (without_label, without_prompt):
        assert "BLEU-4" not in card
        assert "data-tuned" not in card
        assert "data-gain" not in card
    assert "All 4 rows, best tuned first" in text
    assert "2 rows are not scored and come last" in text
    assert "not scored" not in render_report(report(rows=[row(0)]))


def test_a_page_without_any_label_has_no_scores_no_order_and_no_script() -> None:
    scores = TUNED._replace(means=None, scored=0)
    rows = [unscored(index) for index in range(300)]
    text = render_report(report(base=scores, tuned=scores, rows=rows))
    page = Page(text)
    assert page.open == []
    assert "No row has an answer to compare with" in text
    assert "BLEU" not in text.partition("<body>")[2]
    assert "ROUGE" not in text
    assert "200 of 300 rows" in text
    assert page.attributes("select") == []
    assert page.attributes("script") == []
    assert [card["id"] for card in page.rows()][:2] == ["row0", "row2"]


def test_a_report_of_which_few_rows_are_scored_shows_them_all() -> None:
    rows = [row(index) if index % 100 == 7 else unscored(index) for index in range(1000)]
    chosen = [kept.index for kept in choose_rows(rows, 200)]
    assert sorted(chosen[:10]) == list(range(7, 1000, 100))
    assert len(chosen) == 200
    assert chosen[10:] == sorted(chosen[10:])


def test_rows_that_are_not_scored_keep_a_quarter_of_a_thinned_report() -> None:
    rows = [unscored(index) if index % 2 else row(index) for index in range(1000)]
    chosen = choose_rows(rows, 200)
    scored = [kept.tuned_bleu for kept in chosen if kept.tuned_bleu is not None]
    assert (len(chosen), len(scored)) == (200, 150)
    assert (scored[0], scored[-1]) == (96.0, 0.0)
    assert [kept.index for kept in choose_rows(rows, 1)] == [96]
