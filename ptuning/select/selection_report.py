"""What a selection did, as JSON for programs and as a page for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptuning.data.segmentation import count_words
from ptuning.output import render_page
from ptuning.select.selection import FIT, SELECTED, VERDICTS, Choice, PoolRow
from ptuning.storage import write_atomically, write_json

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
NUM_SHOWN = 5  # rows of each verdict on the page
SHOWN_LENGTH = 400  # characters of a text


def write_reports(
    path: Path,
    pool: Sequence[PoolRow],
    choice: Choice,
    settings: Mapping[str, Any],
    num_emptied: int,
) -> dict[str, Any]:
    """Write `path`, JSON, and the page next to it; return what the JSON holds."""
    fit = [row for row in pool if row.verdict.name in FIT]
    sets = {"fit": fit, SELECTED: choice.picked, "random": choice.random, "longest": choice.longest}
    by_source = {
        name: Counter(row.contract["source"] for row in rows)
        for name, rows in {"in": pool, **sets}.items()
    }
    counts = Counter(row.verdict.name for row in pool)
    scores = {name: [row.score or 0.0 for row in rows] for name, rows in sets.items()}
    lengths = {name: [count_words(row.answer) for row in rows] for name, rows in sets.items()}
    report = {
        "in": len(pool),
        "out": len(choice.picked),
        "emptied_inputs": num_emptied,
        "verdicts": {name: counts[name] for name in VERDICTS if counts[name]},
        "sources": {
            source: {"quota": choice.rooms.get(source)}
            | {name: found[source] for name, found in by_source.items()}
            for source in by_source["in"]
        },
        "scores": {name: quantiles(values) for name, values in scores.items()},
        "lengths": {name: quantiles(values) for name, values in lengths.items()},
        "settings": dict(settings),
    }
    write_json(path, report)
    page = _render(report, pool)
    write_atomically(path.with_suffix(".html"), page.encode("utf-8", "xmlcharrefreplace"))
    return report


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the quantiles of values and their mean, to 4 digits; {} without values.

    >>> quantiles([1, 2, 3])["median"]
    2.0
    """
    if not values:
        return {}
    found = {name: np.quantile(values, share) for name, share in QUANTILES.items()}
    return {name: round(float(x), 4) for name, x in (found | {"mean": np.mean(values)}).items()}


def _render(report: Mapping[str, Any], pool: Sequence[PoolRow]) -> str:
    shown: dict[str, list[PoolRow]] = {name: [] for name in report["verdicts"]}
    for row in sorted(pool, key=lambda row: -(row.score or 0.0)):
        if len(shown[row.verdict.name]) < NUM_SHOWN:
            shown[row.verdict.name].append(row)
    template = Path(__file__).parent / "templates" / "selection.html.j2"
    return render_page(template, report=report, meanings=VERDICTS, shown=shown, limit=SHOWN_LENGTH)
