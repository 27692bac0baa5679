"""Rank checkpoints by the text they generate, with the validation loss of each.

The difference between the first two is given with its standard error, computed on the differences
row by row: both answered the same prompts, so that the prompts' own difficulty cancels out.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptuning.scoring.metrics import PairScores, mean_scores

FIELD_OF = {"rougeL": "rouge_l", "bleu": "bleu_4"}  # --metric: its field of PairScores
JUDGE = "judge"  # the other --metric


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint, or the untouched base, with its answers to the dev prompts in their order."""

    name: str
    texts: Sequence[str | None]  # None: the row has no prompt
    pairs: Sequence[PairScores | None]  # None: the row has nothing to compare
    grades: Sequence[float | None] = ()  # of a judge; None: it gave none
    validation_loss: float | None = None  # None: there was no validation at this step

    def row_scores(self, metric: str) -> list[float | None]:
        """Return the score of each row, None where there is none."""
        if metric == JUDGE:
            return list(self.grades)
        return [None if pair is None else getattr(pair, FIELD_OF[metric]) for pair in self.pairs]

    def score(self, metric: str) -> float:
        """Return the mean over the rows that have a score; NaN if there are none."""
        scores = [score for score in self.row_scores(metric) if score is not None]
        return statistics.fmean(scores) if scores else math.nan

    def figures(self) -> dict[str, Any]:
        """Return every figure by name, as JSON values."""
        means = mean_scores(self.texts, self.pairs).by_published_name("dev")
        figures = {"name": self.name, "validation_loss": self.validation_loss, **means}
        judged = len(self.grades) - list(self.grades).count(None)
        if judged:
            figures |= {"dev_judge": self.score(JUDGE), "dev_judged": judged}
        return figures


def rank(candidates: Sequence[Candidate], metric: str) -> list[Candidate]:
    """Return the candidates, the best score first; of equals, the earlier one."""
    return sorted(candidates, key=lambda candidate: -candidate.score(metric))


def lead(ranked: Sequence[Candidate], metric: str) -> dict[str, float | None]:
    """Return how far the first is ahead of the second, and the standard error of that.

    Only rows that have a score of both count. None without a second, or with fewer than two rows.
    """
    rows = zip(*(candidate.row_scores(metric) for candidate in ranked[:2]), strict=True)
    ahead = [row[0] - row[1] for row in rows if len(row) == 2 and None not in row]
    if len(ahead) < 2:
        return {"ahead_by": None, "standard_error": None}
    error = statistics.stdev(ahead) / math.sqrt(len(ahead))
    return {"ahead_by": statistics.fmean(ahead), "standard_error": error}


def format_ranking(ranked: Sequence[Candidate], base: Candidate | None, metric: str) -> str:
    """Return the ranking as a table, and how clearly the first is ahead."""
    metrics = [metric, *(other for other in FIELD_OF if other != metric)]
    losses = [row.validation_loss for row in ranked if row.validation_loss is not None]
    lines = [f"{'':<18}{''.join(f'{name:>9}' for name in metrics)}  validation loss"]
    for row in [*ranked, *([] if base is None else [base])]:
        scores = "".join(f"{row.score(name):>9.2f}" for name in metrics).replace("nan", "  -")
        loss = row.validation_loss
        marks = ["best answers"] if row is ranked[0] else []
        marks += ["lowest loss"] if len(losses) > 1 and loss == min(losses) else []
        shown = "-" if loss is None else f"{loss:.4f}"
        lines.append(f"{row.name:<18}{scores}{shown:>17}  {', '.join(marks)}".rstrip())
    ahead, error = lead(ranked, metric).values()
    if ahead is not None and error is not None:
        text = f"{ranked[0].name} is ahead by {ahead:.2f}, standard error {error:.2f}"
        if ahead == 0:
            text = f"{ranked[0].name} and {ranked[1].name} score the same; the earlier one is taken"
        is_clear = ahead > 2 * error
        lines.append(text if is_clear else f"{text}: more dev prompts would tell them apart better")
    return "\n".join(lines) + "\n"
