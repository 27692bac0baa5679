"""The plain-text table: aligned, and honest about what it compares."""

from ptuning.evaluate.metrics import CorpusScores
from ptuning.evaluate.table import format_scores_table

TUNED = CorpusScores(31.12, 7.11, 24.97, 8.104, samples=1070, empty=0)


def test_every_line_ends_in_the_same_column() -> None:
    base = CorpusScores(0.0, 0.0, 0.0, 0.0, samples=1070, empty=1070)
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
    base = CorpusScores(31.12, 7.11, 24.97, 8.096, samples=1070, empty=0)
    bleu_line = format_scores_table(base, TUNED).splitlines()[1]
    assert bleu_line.split() == ["BLEU-4", "8.10", "8.10", "+0.00"]


def test_different_numbers_of_rows_are_pointed_out() -> None:
    base = TUNED._replace(samples=100)
    assert "different numbers of rows" in format_scores_table(base, TUNED)
    assert "different" not in format_scores_table(TUNED, TUNED)
