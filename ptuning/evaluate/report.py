"""One self-contained HTML page about an evaluation: scores, loss curve, settings, rows compared.

The page opens from a file on any machine. Every word of data in it is escaped, and its content
policy lets no script run but its own, so an answer that contains markup is only ever shown.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ptuning.atomic_file import write_atomically
from ptuning.evaluate.loss_history import LossHistory, read_log_history, smooth
from ptuning.evaluate.loss_svg import loss_svg
from ptuning.evaluate.metrics import CorpusScores, is_blank
from ptuning.evaluate.report_style import SCRIPT, STYLE
from ptuning.evaluate.retention import Retention, RetentionRow
from ptuning.evaluate.table import COUNTS, MEASURES
from ptuning.output import signed

DEFAULT_MAX_ROWS = 200
TEXT_BUDGET_BYTES = 360_000  # of all texts; with 200 rows' markup the page stays under 500 kB
TEXT_LIMITS = (100_000, 4000, 2000, 1000, 600, 400, 300, 200, 150, 100)  # characters of one text
RETENTION_MAX_ROWS = 60  # a file of one's own may hold more; the most changed are shown
RETENTION_TEXT_LIMIT = 400  # characters of one text
# What was tuned -> the method, and what it makes; Chinese words as in README_zh.md.
METHODS = {"ptuning": "P-Tuning v2", "lora": "LoRA", "full": "全量微调 full fine-tuning"}
TUNED_LABELS = {
    "ptuning": "前缀 prefix",
    "lora": "LoRA 适配器 adapter",
    "full": "微调后的模型 tuned model",
}
COUNT_LABELS = {"empty answers": "空回答", "rows": "条数"}


@dataclass(frozen=True)
class ReportRow:
    """One row of the data with the answers to it."""

    index: int  # row in the data file, from 0
    prompt: str
    label: str
    tuned: str
    tuned_bleu: float  # BLEU-4 in percent
    base: str | None = None  # None: the base was not run
    base_bleu: float | None = None  # None: the base was not run

    @property
    def gain(self) -> float:
        """BLEU-4 of the tuned answer over that of the base, or over 0 without a base."""
        return self.tuned_bleu - (self.base_bleu or 0.0)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the row."""
        return (self.prompt, self.label, self.tuned, self.base or "")


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows."""

    title: str
    made_at: str  # date and time, as it shall be read
    model: str  # name or path of the base model
    prefix: str  # name or path of the tuned prefix, adapter or model
    tuned: CorpusScores
    rows: Sequence[ReportRow]
    tuning: str = "ptuning"  # or "lora", "full"
    step: int | None = None  # optimiser step of what was tuned; None: not known
    base: CorpusScores | None = None  # None: the base was not run
    retention: Retention | None = None  # None: forgetting was not measured
    settings: Mapping[str, object] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()  # of trainer_state.json
    max_rows: int = DEFAULT_MAX_ROWS


def write_report(path: Path, report: ReportData) -> None:
    """Write the page; half a surrogate pair in a text becomes a character reference."""
    write_atomically(path, render_report(report).encode("utf-8", "xmlcharrefreplace"))


def render_report(report: ReportData) -> str:
    """Return the page as text."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join(
        (
            '<!doctype html>\n<html lang="zh">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.title)}</title>",
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f'<h1>{escape(report.title)}</h1>\n<p class="quiet">{escape(report.made_at)}</p>',
            _scores_section(report.base, report.tuned),
            retention_section(report.retention),
            _curve_section(read_log_history(report.log_history)),
            _facts_section(report),
            _rows_section(report),
            "</main>\n</body>\n</html>\n",
        )
    )


def choose_rows(rows: Sequence[ReportRow], max_rows: int) -> list[ReportRow]:
    """Return the rows to show, best tuned BLEU-4 first.

    Too many are thinned evenly over that order, so that the best, the worst and everything between
    are shown in their true proportions.

    >>> rows = [ReportRow(i, "", "", "", tuned_bleu=float(i)) for i in range(9)]
    >>> [row.index for row in choose_rows(rows, 3)]
    [8, 4, 0]
    """
    if max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}; use 1 or more.")
    ranked = sorted(rows, key=lambda row: (-row.tuned_bleu, row.index))
    if len(ranked) <= max_rows:
        return ranked
    if max_rows == 1:
        return ranked[:1]
    last = len(ranked) - 1
    return [ranked[round(place * last / (max_rows - 1))] for place in range(max_rows)]


def fitting_text_limit(rows: Sequence[ReportRow]) -> int:
    """Return how many characters of a text to show so that the page keeps its size."""
    texts = [text for row in rows for text in row.texts]
    for limit in TEXT_LIMITS:
        size = sum(len(escape(text[:limit]).encode("utf-8", "replace")) for text in texts)
        if size <= TEXT_BUDGET_BYTES:
            return limit
    return TEXT_LIMITS[-1]


def _facts_section(report: ReportData) -> str:
    label = TUNED_LABELS[report.tuning]
    facts: dict[str, object] = {"原模型 base model": report.model, label: report.prefix}
    if report.step is not None:
        facts["步数 step"] = report.step
    table = _facts_table(facts)
    if report.settings:
        table += (
            "<details><summary>全部设置 all settings</summary>"
            f"{_facts_table(report.settings)}</details>"
        )
    return f'<h2>设置 <small>Settings</small></h2>\n<div class="panel">{table}</div>'


def _facts_table(facts: Mapping[str, object]) -> str:
    lines = (
        f"<tr><th>{escape(str(name))}</th><td>{escape(_value_text(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f'<table class="facts"><tbody>{"".join(lines)}</tbody></table>'


def _value_text(value: object) -> str:
    """Return a setting as the READMEs write it.

    >>> _value_text(None), _value_text(False), _value_text(0.95)
    ('未设 unset', 'false', '0.95')
    """
    if value is None or value == "":
        return "未设 unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _scores_section(base: CorpusScores | None, tuned: CorpusScores) -> str:
    heads = ["微调 tuned"] if base is None else ["原模型 base", "微调 tuned", "变化 change"]
    lines = []
    for label, name in MEASURES:
        lines.append(_score_line(label, base and getattr(base, name), getattr(tuned, name), 2))
    for label, name in COUNTS:
        both = f"{COUNT_LABELS[label]} {label}"
        lines.append(_score_line(both, base and getattr(base, name), getattr(tuned, name), 0))
    cells = "".join(f"<th>{head}</th>" for head in heads)
    return (
        '<h2>评分 <small>Scores (%)</small></h2>\n<div class="panel"><table>'
        f"<thead><tr><th></th>{cells}</tr></thead>\n<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _score_line(label: str, base: float | None, tuned: float, places: int) -> str:
    cells = f'<td class="tuned">{tuned:.{places}f}</td>'
    if base is not None:
        change = round(tuned, places) - round(base, places)  # as a reader subtracts
        is_better = change > 0 if places else change < 0  # of counts, fewer empty ones are better
        colour = "" if change == 0 or "rows" in label else "up" if is_better else "down"
        shown = "" if change == 0 else f"{change:+.{places}f}"
        cells = f'<td>{base:.{places}f}</td>{cells}<td class="{colour}">{shown}</td>'
    return f"<tr><th>{label}</th>{cells}</tr>\n"


def retention_section(retention: Retention | None) -> str:
    """Return the section; "" where forgetting was not measured."""
    if retention is None:
        return ""
    ranked = sorted(retention.rows, key=lambda row: -row.change)[:RETENTION_MAX_ROWS]
    cards = "\n".join(map(_retention_card, ranked))
    return (
        "<h2>遗忘 <small>Forgetting</small></h2>\n"
        '<p class="quiet">微调前后回答同一组通用问题；损失按原模型自己的回答计算，取每个 token '
        "的平均。 General prompts answered before and after tuning; the loss is that of the base's "
        f"own answers, per token. {escape(retention.source)}</p>\n"
        f'<div class="panel">{_retention_figures(retention)}</div>\n'
        "<details><summary>通用问题的回答，变化最大的在前 "
        f"Answers to the general prompts, most changed first</summary>\n{cards}\n</details>"
    )


def _retention_figures(retention: Retention) -> str:
    change = round(retention.change, 3)
    colour = "down" if change > 0 else "up" if change < 0 else ""
    return (
        "<table><thead><tr><th></th><th>原模型 base</th><th>微调 tuned</th>"
        "<th>变化 change</th></tr></thead>\n<tbody><tr>"
        "<th>原模型回答的损失 loss on the base's answers</th>"
        f"<td>{retention.base_loss:.3f}</td>"
        f'<td class="tuned">{retention.tuned_loss:.3f}</td>'
        f'<td class="{colour}">{signed(change, 3)}</td></tr>\n'
        "<tr><th>与原模型的散度 divergence from the base (KL, nats)</th><td>0</td>"
        f'<td class="tuned">{retention.divergence:.3f}</td><td></td></tr>\n'
        "<tr><th>相同的回答 identical answers</th>"
        f"<td>{len(retention.rows)}</td>"
        f'<td class="tuned">{retention.num_same}</td><td></td></tr></tbody></table>'
    )


def _retention_card(row: RetentionRow) -> str:
    colour = "down" if row.change > 0 else "up" if row.change < 0 else ""
    same = "<span>相同 identical</span>" if row.is_same else ""
    base_loss, tuned_loss = row.base_loss / row.num_tokens, row.tuned_loss / row.num_tokens
    answers = _text_block("原模型 base", row.base, RETENTION_TEXT_LIMIT)
    answers += _text_block("微调 tuned", row.tuned, RETENTION_TEXT_LIMIT, style="tuned")
    return (
        f'<article class="row"><header><b>{escape(row.prompt[:RETENTION_TEXT_LIMIT])}</b>{same}'
        f"<span>损失 loss {base_loss:.3f} → {tuned_loss:.3f}</span>"
        f'<span class="{colour}">{signed(row.change, 3)}</span></header>'
        f'<div class="texts">{answers}</div></article>'
    )


def _curve_section(history: LossHistory) -> str:
    if not (history.steps or history.non_finite_steps):
        return ""  # the run that trained this prefix left no log here
    legend = ""
    if history.train:
        raw = '<i class="raw"></i>训练损失 training loss, as logged'
        both = f"<span>{raw}</span><span><i></i>平滑 smoothed</span>"
        legend += both if smooth(history.train) else "<span><i></i>训练损失 training loss</span>"
    if history.validation:
        legend += '<span><i class="validation"></i>验证损失 validation loss</span>'
    remark = f'<p class="alarm">{escape(history.remark)}</p>' if history.remark else ""
    return (
        '<h2>损失 <small>Loss</small></h2>\n<div class="panel">'
        f'{loss_svg(history)}\n<div class="legend">{legend}</div>{remark}</div>'
    )


def _rows_section(report: ReportData) -> str:
    shown = choose_rows(report.rows, report.max_rows)
    if not shown:
        return ""
    limit = fitting_text_limit(shown)
    cards = "\n".join(_card(row, limit) for row in shown)
    return (
        "<h2>逐条对比 <small>Rows side by side</small></h2>\n"
        f'<p class="quiet">{_what_is_shown(len(shown), len(report.rows), shown, limit)}</p>\n'
        f'{_tools(shown, with_base=report.base is not None)}\n<div id="rows">\n{cards}\n</div>\n'
        f"<script>{SCRIPT}</script>"
    )


def _what_is_shown(count: int, total: int, shown: list[ReportRow], limit: int) -> str:
    if count == total:
        words = f"全部 {total} 条，按微调 BLEU-4 从高到低。 All {total:,} rows, best tuned first."
    else:
        words = (
            f"共 {total} 条，按微调 BLEU-4 排序后等距取 {count} 条，含最好与最差。 "
            f"{count:,} of {total:,} rows, taken evenly from best to worst tuned BLEU-4."
        )
    if any(len(text) > limit for row in shown for text in row.texts):
        words += f" 长文本只显示前 {limit} 字。 Long texts are cut after {limit} characters."
    return words


def _tools(shown: list[ReportRow], *, with_base: bool) -> str:
    """Return links to the best, middle and worst row, and the choice of order the script shows."""
    places = {"best": ("最好", 0), "middle": ("中间", len(shown) // 2), "worst": ("最差", -1)}
    links = " ".join(
        f'<a href="#row{shown[place].index}">{chinese} {english}</a>'
        for english, (chinese, place) in places.items()
    )
    orders = {"tuned -1": "微调 BLEU-4 tuned, best first", "tuned 1": "tuned, worst first"}
    if with_base:
        orders |= {
            "gain -1": "提升 gain over base, largest first",
            "gain 1": "gain over base, smallest first",
            "base -1": "原模型 BLEU-4 base, best first",
        }
    orders["index 1"] = "原顺序 order of the file"
    options = "".join(f'<option value="{value}">{name}</option>' for value, name in orders.items())
    return (
        f'<div class="tools"><span>{links}</span><label hidden>排序 order '
        f'<select id="order">{options}</select></label></div>'
    )


def _card(row: ReportRow, limit: int) -> str:
    numbers = f"<span>微调 tuned {row.tuned_bleu:.2f}</span>"
    data = f'data-index="{row.index}" data-tuned="{row.tuned_bleu:g}"'
    answers = _text_block("微调 tuned", row.tuned, limit, style="tuned")
    if row.base is not None and row.base_bleu is not None:
        numbers = f"<span>原模型 base {row.base_bleu:.2f}</span>{numbers}"
        colour = "up" if row.gain > 0 else "down" if row.gain < 0 else ""
        numbers += f'<span class="{colour}">{row.gain:+.2f}</span>'
        data += f' data-base="{row.base_bleu:g}" data-gain="{row.gain:g}"'
        answers = _text_block("原模型 base", row.base, limit) + answers
    question = _text_block("输入 prompt", row.prompt, limit)
    question += _text_block("参考 label", row.label, limit)
    return (
        f'<article class="row" id="row{row.index}" {data}>'
        f"<header><b>第 {row.index + 1} 条 row</b><span>BLEU-4</span>{numbers}</header>"
        f'<div class="texts">{question}</div><div class="texts">{answers}</div></article>'
    )


def _text_block(name: str, text: str, limit: int, *, style: str = "") -> str:
    """Return a text of at most limit characters under its name, which is trusted."""
    shown = escape(text[:limit]) + ("…" if len(text) > limit else "")
    if is_blank(text):
        shown = '<em class="quiet">空 empty</em>'
    return f'<div class="{style}"><span>{name}</span><bdi>{shown}</bdi></div>'
