"""A self-contained HTML page about an evaluation: scores, loss curve, settings, rows compared.

`report.html.j2` holds the markup, the style sheet and the script; the page loads nothing else. All
data is escaped, and the content security policy allows only the page's own script, so markup in an
answer is shown as text.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ptuning.output import render_page, signed
from ptuning.scoring.metrics import CorpusScores, compare_scores
from ptuning.scoring.pictures import LossHistory, Point, read_log_history, smooth
from ptuning.scoring.retention import Retention
from ptuning.storage import write_atomically

DEFAULT_MAX_ROWS = 200
TEXT_BUDGET_BYTES = 360_000  # of all texts; with 200 rows' markup the page stays under 500 kB
TEXT_LIMITS = (100_000, 4000, 2000, 1000, 600, 400, 300, 200, 150, 100)  # characters of one text
NUM_OPEN_ROWS = 3  # the others are collapsed
UNSCORED_SHARE = 4  # 1/4 of a thinned page is reserved for rows without scores
RETENTION_MAX_ROWS = 60  # the most changed ones, of a longer file
RETENTION_TEXT_LIMIT = 400  # characters of one text
# By tuning: the name of the method, and of what it trains. Chinese terms are those of README_zh.md.
METHODS = {"ptuning": "P-Tuning v2", "lora": "LoRA", "full": "全量微调 full fine-tuning"}
TUNED_LABELS = {
    "ptuning": "前缀 prefix",
    "lora": "LoRA 适配器 adapter",
    "full": "微调后的模型 tuned model",
}
# Of the loss curve in pixels: the whole picture, and the edges of the plot inside the scales.
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 696, 12, 248
MOST_POINTS = 600  # of one line; more are indistinguishable at this width
MOST_TICKS = 6


@dataclass(frozen=True)
class ReportRow:
    """One row of the data with the answers to it."""

    index: int  # row in the data file, from 0
    prompt: str
    label: str
    tuned: str | None  # None: the row has no prompt and was not answered
    tuned_bleu: float | None  # BLEU-4 in percent; None: there is nothing to compare
    base: str | None = None  # None: the same, or the base was not run
    base_bleu: float | None = None  # None: the same

    @property
    def gain(self) -> float | None:
        """BLEU-4 of the tuned answer minus that of the base; None without either."""
        if self.tuned_bleu is None or self.base_bleu is None:
            return None
        return self.tuned_bleu - self.base_bleu

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the row."""
        return (self.prompt, self.label, self.tuned or "", self.base or "")


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows."""

    run: str  # see `run_name`
    made_at: str  # date and time as text
    model: str  # name or path of the base model
    tuned_path: str  # of the prefix, adapter or model
    tuned: CorpusScores
    rows: Sequence[ReportRow]
    tuning: str = "ptuning"  # or "lora", "full"
    step: int | None = None  # optimizer step of what was tuned; None: not known
    base: CorpusScores | None = None  # None: the base was not run
    retention: Retention | None = None  # None: forgetting was not measured
    settings: Mapping[str, object] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()  # of trainer_state.json
    max_rows: int = DEFAULT_MAX_ROWS


def run_name(tuned_path: str) -> str:
    """Return the name of a run, and of its checkpoint where it is one.

    >>> run_name("output/adgen-pt-128"), run_name("output/adgen-pt-128/checkpoint-1000")
    ('adgen-pt-128', 'adgen-pt-128/checkpoint-1000')
    """
    path = Path(tuned_path).absolute()
    is_checkpoint = path.name.startswith("checkpoint-")
    return f"{path.parent.name}/{path.name}" if is_checkpoint else path.name


def write_report(path: Path, report: ReportData) -> None:
    """Write the page; a lone surrogate becomes a character reference."""
    write_atomically(path, render_report(report).encode("utf-8", "xmlcharrefreplace"))


def render_report(report: ReportData) -> str:
    """Return the page as text."""
    history = read_log_history(report.log_history)
    facts: dict[str, object] = {
        "基座模型 base model": report.model,
        TUNED_LABELS[report.tuning]: report.tuned_path,
    }
    if report.step is not None:
        facts["步数 step"] = report.step
    rows = choose_rows(report.rows, report.max_rows)
    limit = fitting_text_limit(rows)
    general_rows = report.retention.rows if report.retention else ()
    return render_page(
        Path(__file__).parent / "report.html.j2",
        sha256=_sha256,
        signed=signed,
        value_text=_value_text,
        report=report,
        scores=compare_scores(report.base or report.tuned, report.tuned),
        retention=report.retention,
        general_rows=sorted(general_rows, key=lambda row: -row.change)[:RETENTION_MAX_ROWS],
        general_limit=RETENTION_TEXT_LIMIT,
        history=history,
        plot=_plot(history) if history.steps else None,
        method=METHODS[report.tuning],
        num_open=NUM_OPEN_ROWS,
        facts=facts,
        rows=rows,
        num_shown_scored=sum(row.tuned_bleu is not None for row in rows),
        num_unscored=sum(row.tuned_bleu is None for row in report.rows),
        limit=limit,
        is_cut=any(len(text) > limit for row in rows for text in row.texts),
    )


def _sha256(text: str) -> str:
    """Return the digest of a script as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def choose_rows(rows: Sequence[ReportRow], max_rows: int) -> list[ReportRow]:
    """Return the rows to show, best tuned BLEU-4 first, then those without scores.

    Too many rows are thinned evenly in that order, scored and unscored ones separately, so that the
    best, the worst and the distribution of all rows are preserved.

    >>> rows = [ReportRow(i, "", "", "", tuned_bleu=float(i)) for i in range(9)]
    >>> [row.index for row in choose_rows(rows, 3)]
    [8, 4, 0]
    """
    ranked = sorted(
        rows, key=lambda row: (row.tuned_bleu is None, -(row.tuned_bleu or 0.0), row.index)
    )
    num_scored = sum(row.tuned_bleu is not None for row in rows)
    room = max(max_rows - num_scored, max_rows // UNSCORED_SHARE)
    unscored = _thin(ranked[num_scored:], room)
    return _thin(ranked[:num_scored], max_rows - len(unscored)) + unscored


def _thin(rows: Sequence[ReportRow], max_rows: int) -> list[ReportRow]:
    """Return at most max_rows evenly spaced rows, including the first and the last."""
    count, last = min(len(rows), max_rows), len(rows) - 1
    return [rows[round(place * last / max(1, count - 1))] for place in range(count)]


def fitting_text_limit(rows: Sequence[ReportRow]) -> int:
    """Return how many characters of a text to show so that the page keeps its size limit."""
    texts = [text for row in rows for text in row.texts]
    for limit in TEXT_LIMITS:
        size = sum(len(escape(text[:limit]).encode("utf-8", "replace")) for text in texts)
        if size <= TEXT_BUDGET_BYTES:
            return limit
    return TEXT_LIMITS[-1]


def _value_text(value: object) -> str:
    """Return a setting as written in the READMEs.

    >>> _value_text(None), _value_text(False), _value_text(0.95)
    ('未设 unset', 'false', '0.95')
    """
    if value is None or value == "":
        return "未设 unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plot(history: LossHistory) -> dict[str, Any]:
    """Return the loss curve in pixels for the template to draw; needs at least one finite loss.

    An inline SVG rather than matplotlib's: it follows dark mode and takes a few kilobytes.
    """
    losses = [point.value for point in (*history.train, *history.validation)]
    across, step_ticks = _axis(history.steps, LEFT, RIGHT, margin=0.0, integer=True)
    upward, loss_ticks = _axis(losses, BOTTOM, TOP, margin=0.08, integer=False)

    def place(points: Sequence[Point]) -> list[tuple[float, float]]:
        """Place every k-th point and the last one, about MOST_POINTS at most."""
        stride = max(1, math.ceil(len(points) / MOST_POINTS))
        kept = [*points[:-1:stride], *points[-1:]]
        return [(across(point.step), upward(point.value)) for point in kept]

    train, smoothed = place(history.train), place(smooth(history.train))
    validation = place(history.validation)
    return {
        "size": (WIDTH, HEIGHT),
        "frame": (LEFT, RIGHT, BOTTOM),
        "step_ticks": step_ticks,
        "loss_ticks": loss_ticks,
        "lines": {
            "train raw" if smoothed else "train": train,
            "train": smoothed or train,
            "validation": validation,
        },
        "dots": {"validation": validation, "train": train if len(train) == 1 else []},
        "best": place([history.best]) if history.best else [],
    }


def _axis(
    values: Sequence[float], start: float, end: float, *, margin: float, integer: bool
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Return a map from values to pixels between start and end, and ticks as (pixel, label).

    >>> place, ticks = _axis([0, 3000], 0, 600, margin=0.0, integer=True)
    >>> place(50), ticks[:2]
    (10.0, [(0.0, '0'), (100.0, '500')])
    """
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    # A single value is centred in a range around it.
    spread = margin * (high - low) if high > low else max(abs(high), 1.0) * 0.1
    low, high = low - spread, high + spread

    def place(value: float) -> float:
        return round(start + (value - low) / (high - low) * (end - start), 1)

    locator: Any = MaxNLocator(MOST_TICKS, steps=[1, 2, 5, 10], integer=integer)
    ticks = [tick for tick in locator.tick_values(low, high).tolist() if low <= tick <= high]
    return place, [(place(tick), f"{tick:g}") for tick in ticks]
