"""The published scores of a prediction, in percent, and the table that compares two models.

ROUGE-1/2/L is computed on words, BLEU-4 on characters. Every row is rounded to 4 places before the
mean is taken, as in the published evaluation, so the figures compare with published tables digit by
digit. What differs: a blank prediction or label scores 0 instead of ending the run, and blank
predictions are counted.
Sources: ROUGE from rouge_chinese (F1 on jieba words), BLEU from nltk (`sentence_bleu`, method3
smoothing: Chen and Cherry 2014, https://aclanthology.org/W14-3346).
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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
    """Means over all rows in percent, the number of rows, and how many predictions were blank."""

    rouge_1: float
    rouge_2: float
    rouge_l: float
    bleu_4: float
    samples: int
    empty: int

    def by_published_name(self, prefix: str = "predict") -> dict[str, float]:
        """Return `{prefix}_bleu-4` and so on, the keys of `predict_results.json`.

        >>> scores = CorpusScores(31.12, 7.11, 24.97, 8.1, samples=1070, empty=2)
        >>> sorted(scores.by_published_name("base"))[:3]
        ['base_bleu-4', 'base_empty', 'base_rouge-1']
        """
        named = PairScores(*self[:4]).by_published_name()
        named |= {"samples": self.samples, "empty": self.empty}
        return {f"{prefix}_{name}": value for name, value in named.items()}


def mean_scores(rows: Sequence[PairScores], *, empty: int) -> CorpusScores:
    """Return the means over rows, `empty` of which had a blank prediction; one row at least."""
    if not rows:
        raise ValueError(
            "No rows were scored, so there is no mean. Add at least one prediction and its "
            "label; check that the test file is not empty and --max_predict_samples is not 0."
        )
    means = PairScores(*(math.fsum(column) / len(rows) for column in zip(*rows, strict=True)))
    return CorpusScores(**means._asdict(), samples=len(rows), empty=empty)


class ScoreLine(NamedTuple):
    """One score of two models, as text, and its change."""

    heading: str
    base: str
    tuned: str
    change: str
    gain: float  # above 0 if tuned is better; always 0 for the number of rows


def compare_scores(base: CorpusScores, tuned: CorpusScores) -> list[ScoreLine]:
    """Return one line per score; a change is the difference of the two numbers as printed."""
    lines = []
    for heading, field, places, sign in (
        ("BLEU-4", "bleu_4", 2, 1),
        ("ROUGE-1", "rouge_1", 2, 1),
        ("ROUGE-2", "rouge_2", 2, 1),
        ("ROUGE-L", "rouge_l", 2, 1),
        ("empty answers", "empty", 0, -1),
        ("rows", "samples", 0, 0),
    ):
        old, new = base._asdict()[field], tuned._asdict()[field]
        change = round(new, places) - round(old, places)
        shown = f"{change:+.{places}f}" if change or places else ""
        before, after = f"{old:.{places}f}", f"{new:.{places}f}"
        lines.append(ScoreLine(heading, before, after, shown, gain=sign * change))
    return lines


def format_scores_table(base: CorpusScores | None, tuned: CorpusScores) -> str:
    """Return the scores as an ASCII table without a trailing newline; base None: one column.

    >>> base = CorpusScores(20.0, 4.0, 15.5, 2.25, samples=1070, empty=3)
    >>> print(format_scores_table(base, CorpusScores(31.12, 7.11, 24.97, 8.1, 1070, 0)))
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
    if base and base.samples != tuned.samples:
        lines.append("Base and tuned were scored on different numbers of rows: compare with care.")
    return "\n".join(lines)


def score_pair(prediction: str, label: str) -> PairScores:
    """Score one prediction; a blank prediction or a blank label scores 0 on everything.

    >>> score_pair("今天天气很好", "今天天气不错")
    PairScores(rouge_1=40.0, rouge_2=0.0, rouge_l=40.0, bleu_4=50.8133)
    >>> score_pair("", "今天天气不错")
    PairScores(rouge_1=0.0, rouge_2=0.0, rouge_l=0.0, bleu_4=0.0)
    """
    if is_blank(prediction) or is_blank(label):
        return NO_MATCH
    from rouge_chinese import Rouge

    # Never blank here: jieba keeps every character, so rouge_chinese finds at least one word.
    rouge = Rouge().get_scores(_words(prediction), _words(label))[0]
    fractions = [rouge[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")]
    fractions.append(_bleu_4(prediction, label))
    return PairScores(*(round(100 * fraction, ROUND_PLACES) for fraction in fractions))


def is_blank(text: str) -> bool:
    r"""Return whether a text holds nothing but white space.

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
    """Return the text's jieba words joined by blanks, the form rouge_chinese reads."""
    return " ".join(_word_cutter()(text))


@functools.cache
def _word_cutter() -> Callable[[str], Iterable[str]]:
    """Load jieba's own dictionary once, about a second, and return its word splitter.

    A splitter of our own, filled by hand, spares three things of jieba's shared one: its log lines,
    a cache file in the temporary folder (which may be read-only, or somebody else's), and words
    that other code in this process added to it, which would change the scores.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in its source, and pkg_resources
        import jieba
    splitter: Any = jieba.Tokenizer()
    splitter.FREQ, splitter.total = splitter.gen_pfdict(splitter.get_dict_file())
    splitter.initialized = True
    cut: Callable[[str], Iterable[str]] = splitter.cut
    return cut
