"""The published scores of a prediction, in percent, and the table that compares two models.

ROUGE-1/2/L is computed on words, BLEU-4 on characters. As published, every row is rounded to 4
places before the mean is taken, so the figures match published tables digit by digit. Unlike there,
a blank prediction scores 0 instead of ending the run, and a row without a label is skipped.
Sources: ROUGE from rouge_chinese (F1 on jieba words), BLEU from nltk (`sentence_bleu`, method3
smoothing: Chen and Cherry 2014, https://aclanthology.org/W14-3346).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ptuning.data.segmentation import word_cutter

ROUND_PLACES = 4  # of one row, in percent; the published rounding


class PairScores(NamedTuple):
    """Scores of one prediction against one label, in percent, rounded to 4 places."""

    rouge_1: float
    rouge_2: float
    rouge_l: float
    bleu_4: float

    def by_published_name(self) -> dict[str, float]:
        """Return the scores under the names of the published result files.

        >>> PairScores(3.0, 2.0, 1.0, 4.0).by_published_name()
        {'rouge-1': 3.0, 'rouge-2': 2.0, 'rouge-l': 1.0, 'bleu-4': 4.0}
        """
        return {field.replace("_", "-"): value for field, value in self._asdict().items()}


NO_MATCH = PairScores(0.0, 0.0, 0.0, 0.0)


class CorpusScores(NamedTuple):
    """Means in percent over the scored rows, and row counts."""

    means: PairScores | None  # None: no row was scored
    samples: int  # rows answered
    scored: int  # rows with a label
    empty: int  # blank answers

    def by_published_name(self, prefix: str = "predict") -> dict[str, float | None]:
        """Return `{prefix}_bleu-4` and so on, the keys of `predict_results.json`.

        >>> scores = CorpusScores(None, samples=1070, scored=0, empty=2)
        >>> list(scores.by_published_name("base").items())[3:6]
        [('base_bleu-4', None), ('base_samples', 1070), ('base_scored', 0)]
        """
        named: dict[str, float | None] = dict.fromkeys(NO_MATCH.by_published_name())
        if self.means is not None:
            named |= self.means.by_published_name()
        named |= {"samples": self.samples, "scored": self.scored, "empty": self.empty}
        return {f"{prefix}_{name}": value for name, value in named.items()}


def mean_scores(
    predictions: Sequence[str | None], scores: Sequence[PairScores | None]
) -> CorpusScores:
    """Return the means over the rows that have scores; predictions are as `score_pair` takes them.

    >>> mean_scores(["裤子", "", None], [PairScores(5.0, 0.0, 4.0, 1.0), None, None])[1:]
    (2, 1, 1)
    """
    answers = [text for text in predictions if text is not None]
    rows = [row for row in scores if row is not None]
    means = None
    if rows:
        means = PairScores(*(math.fsum(column) / len(rows) for column in zip(*rows, strict=True)))
    return CorpusScores(means, len(answers), len(rows), sum(map(is_blank, answers)))


class ScoreLine(NamedTuple):
    """One score of two models and its change, as text."""

    heading: str
    base: str
    tuned: str
    change: str
    gain: float  # above 0 if tuned is better; 0 for a row count


def compare_scores(base: CorpusScores, tuned: CorpusScores) -> list[ScoreLine]:
    """Return one line per score; a change is the difference of the numbers as printed.

    Without any label there are only the lines that count rows.
    """
    figures: list[tuple[str, float, float, int, int]] = []  # heading, base, tuned, places, sign
    if base.means is not None and tuned.means is not None:
        figures = [
            ("BLEU-4", base.means.bleu_4, tuned.means.bleu_4, 2, 1),
            ("ROUGE-1", base.means.rouge_1, tuned.means.rouge_1, 2, 1),
            ("ROUGE-2", base.means.rouge_2, tuned.means.rouge_2, 2, 1),
            ("ROUGE-L", base.means.rouge_l, tuned.means.rouge_l, 2, 1),
        ]
    figures.append(("empty answers", base.empty, tuned.empty, 0, -1))
    all_scored = base.samples == base.scored and tuned.samples == tuned.scored
    figures.append(("rows" if all_scored else "rows answered", base.samples, tuned.samples, 0, 0))
    if not all_scored:
        figures.append(("rows scored", base.scored, tuned.scored, 0, 0))
    lines = []
    for heading, old, new, places, sign in figures:
        change = round(new, places) - round(old, places)
        shown = f"{change:+.{places}f}" if change or places else ""
        before, after = f"{old:.{places}f}", f"{new:.{places}f}"
        lines.append(ScoreLine(heading, before, after, shown, gain=sign * change))
    return lines


def format_scores_table(base: CorpusScores | None, tuned: CorpusScores) -> str:
    """Return the scores as an ASCII table without a trailing newline; base None: one column.

    >>> base = CorpusScores(PairScores(20.0, 4.0, 15.5, 2.25), 1070, scored=1070, empty=3)
    >>> tuned = CorpusScores(PairScores(31.12, 7.11, 24.97, 8.1), 1070, scored=1070, empty=0)
    >>> print(format_scores_table(base, tuned))
                       base     tuned    change
    BLEU-4             2.25      8.10     +5.85
    ROUGE-1           20.00     31.12    +11.12
    ROUGE-2            4.00      7.11     +3.11
    ROUGE-L           15.50     24.97     +9.47
    empty answers         3         0        -3
    rows               1070      1070
    """
    rows = [("", "base", "tuned", "change")]
    rows += [line[:4] for line in compare_scores(base or tuned, tuned)]
    if base is None:
        rows = [(heading, number, "", "") for heading, _, number, _ in rows]
    lines = [
        f"{heading:<13}{''.join(f'{cell:>10}' for cell in cells)}".rstrip()
        for heading, *cells in rows
    ]
    if base and base.scored != tuned.scored:
        lines.append("Base and tuned were scored on different numbers of rows: compare with care.")
    return "\n".join(lines)


def score_pair(prediction: str | None, label: str) -> PairScores | None:
    """Score one prediction; a blank one scores 0.

    None if there is nothing to compare: prediction is None (not asked for) or the label is blank.

    >>> score_pair("今天天气很好", "今天天气不错")
    PairScores(rouge_1=40.0, rouge_2=0.0, rouge_l=40.0, bleu_4=50.8133)
    >>> score_pair("", "今天天气不错")
    PairScores(rouge_1=0.0, rouge_2=0.0, rouge_l=0.0, bleu_4=0.0)
    """
    if prediction is None or is_blank(label):
        return None
    if is_blank(prediction):
        return NO_MATCH
    from rouge_chinese import Rouge

    # jieba keeps every character, so rouge_chinese finds at least one word.
    rouge = Rouge().get_scores(_words(prediction), _words(label))[0]
    fractions = [rouge[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")]
    fractions.append(_bleu_4(prediction, label))
    return PairScores(*(round(100 * fraction, ROUND_PLACES) for fraction in fractions))


def is_blank(text: str) -> bool:
    r"""Return whether a text is empty or white space.

    >>> is_blank(" \n"), is_blank("。")
    (True, False)
    """
    return not text.strip()


def _bleu_4(prediction: str, label: str) -> float:
    """Return BLEU-4 on characters as a fraction."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method3
    return float(sentence_bleu([list(label)], list(prediction), smoothing_function=smoothing))


def _words(text: str) -> str:
    """Return the text's jieba words separated by spaces, as rouge_chinese expects."""
    return " ".join(word_cutter()(text))
