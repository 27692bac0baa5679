"""The plain-text table of scores that ends a run.

Headings and numbers are ASCII, one column each, so it lines up in every terminal and log file.
"""

from ptuning.evaluate.metrics import CorpusScores

MEASURES = (  # heading, field of CorpusScores
    ("BLEU-4", "bleu_4"),
    ("ROUGE-1", "rouge_1"),
    ("ROUGE-2", "rouge_2"),
    ("ROUGE-L", "rouge_l"),
)
COUNTS = (("empty answers", "empty"), ("rows", "samples"))


def format_scores_table(base: CorpusScores | None, tuned: CorpusScores) -> str:
    """Return the table as text without a last newline; without a base, one column of numbers.

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
    lines = [_line("", *(("base", "tuned", "change") if base else ("tuned",)))]
    for heading, field in MEASURES:
        lines.append(_measure_line(heading, base and getattr(base, field), getattr(tuned, field)))
    for heading, field in COUNTS:
        lines.append(_count_line(heading, base and getattr(base, field), getattr(tuned, field)))
    if base and base.samples != tuned.samples:
        lines.append("Base and tuned were scored on different numbers of rows: compare with care.")
    return "\n".join(lines)


def _measure_line(heading: str, base: float | None, tuned: float) -> str:
    if base is None:
        return _line(heading, f"{tuned:.2f}")
    # The change of the two numbers as printed, so that a reader's subtraction agrees.
    change = round(tuned, 2) - round(base, 2)
    return _line(heading, f"{base:.2f}", f"{tuned:.2f}", f"{change:+.2f}")


def _count_line(heading: str, base: int | None, tuned: int) -> str:
    if base is None:
        return _line(heading, str(tuned))
    return _line(heading, str(base), str(tuned), f"{tuned - base:+d}" if tuned != base else "")


def _line(heading: str, *cells: str) -> str:
    return (f"{heading:<13}" + "".join(f"{cell:>10}" for cell in cells)).rstrip()
