"""General rows beside a task's: the form of --mix, the share, the draw, and the rows themselves."""

from pathlib import Path

import pytest

from ptuning.data.conversion import ContractRow
from ptuning.data.mixing import (
    MixSource,
    largest_total,
    mix_files,
    parse_mix,
    parse_shares,
    share_out,
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("general.jsonl:0.2", MixSource(Path("general.jsonl"), 0.2)),
        (r"C:\data\g.jsonl:.5", MixSource(Path(r"C:\data\g.jsonl"), 0.5)),
        (
            r"C:\g.csv:0.25:instruction, output",
            MixSource(Path(r"C:\g.csv"), 0.25, ("instruction", "output")),
        ),
        ("a:b.json:0.1:问,答,history", MixSource(Path("a:b.json"), 0.1, ("问", "答", "history"))),
    ],
)
def test_the_form_is_read_from_the_right(text, wanted):
    assert parse_mix(text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("general.jsonl", "FILE:RATIO"),
        (":0.2", "FILE:RATIO"),
        ("general.jsonl:", "FILE:RATIO"),
        (r"C:\g.jsonl", "FILE:RATIO"),
        ("g.jsonl:0.2:prompt", "PROMPT,RESPONSE"),
        ("g.jsonl:0.2:a,b,c,d", "PROMPT,RESPONSE"),
        ("g.jsonl:0.2:a,,b", "PROMPT,RESPONSE"),
        ("g.jsonl:0", "between 0 and 1"),
        ("g.jsonl:1", "between 0 and 1"),
        ("g.jsonl:20", "between 0 and 1"),
        ("g.jsonl:-0.2", "between 0 and 1"),
        ("g.jsonl:nan", "between 0 and 1"),
    ],
)
def test_another_form_is_told(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        parse_mix(text)
    assert text in str(caught.value)


# Shares of one new file


def rows_of(name: str, count: int) -> list[ContractRow]:
    return [
        ContractRow(id=f"{name}:{n}", prompt=name, response="", history=[], source="", meta={})
        for n in range(1, count + 1)
    ]


def test_a_mixture_has_its_shares_and_repeats_no_row_while_there_are_enough() -> None:
    files = [rows_of("a", 100), rows_of("b", 50)]
    rows = mix_files(files, [70, 30], seed=42)
    assert len({row["id"] for row in rows}) == 100
    assert [row["prompt"] for row in rows].count("a") == 70
    assert {row["prompt"] for row in rows[:20]} == {"a", "b"}  # shuffled
    assert rows == mix_files(files, [70, 30], seed=42)
    assert rows != mix_files(files, [70, 30], seed=43)


def test_a_file_that_is_too_small_is_taken_whole_as_often_as_it_fits() -> None:
    rows = mix_files([rows_of("a", 9), rows_of("b", 3)], [8, 8], seed=1)
    ids = [row["id"] for row in rows]
    assert sorted(ids.count(f"b:{n}") for n in (1, 2, 3)) == [2, 3, 3]
    assert max(ids.count(f"a:{n}") for n in range(1, 10)) == 1
    assert len({id(row) for row in rows}) == 16  # none is shared: ids are numbered afterwards


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (100, [0.29, 0.71], [29, 71]),
        (10, [1 / 3, 1 / 3, 1 / 3], [4, 3, 3]),
        (1, [0.9, 0.1], [1, 0]),
    ],
)
def test_shares_become_rows_that_sum_to_the_total(total, shares, counts) -> None:
    assert share_out(total, shares) == counts


@pytest.mark.parametrize("sizes", [(700, 1000), (1, 1), (10, 10), (57, 999), (29, 71)])
@pytest.mark.parametrize("shares", [(0.7, 0.3), (0.29, 0.71), (0.57, 0.43)])
def test_the_largest_total_repeats_no_row_and_the_next_one_does(sizes, shares) -> None:
    total = largest_total(sizes, shares)

    def fits(total: int) -> bool:
        return all(n <= size for n, size in zip(share_out(total, shares), sizes, strict=True))

    assert total >= 1
    assert fits(total)
    assert not fits(total + 1)


def test_the_names_of_a_mixture_may_hold_commas_and_colons() -> None:
    sources = parse_shares(r"C:\a,b.jsonl:0.25, D:\c.csv:0.75")
    assert [(str(source.path), source.share) for source in sources] == [
        (r"C:\a,b.jsonl", 0.25),
        (r"D:\c.csv", 0.75),
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a.jsonl:0.7,b.jsonl:0.2", "shares are 0.7 [+] 0.2 = 0.9; make them sum to 1"),
        ("a.jsonl,b.jsonl", "give FILE:SHARE,FILE:SHARE"),
        ("a.jsonl:0.5,b.jsonl", "give FILE:SHARE,FILE:SHARE"),
        ("a.jsonl:half,b.jsonl:half", "give FILE:SHARE,FILE:SHARE"),
        ("", "give FILE:SHARE,FILE:SHARE"),
        ("a.jsonl:1", "whose ratio is 1; use a share"),
        ("a.jsonl:-0.5,b.jsonl:1.5", "whose ratio is -0.5; use a share"),
    ],
)
def test_other_forms_of_a_mixture_are_refused(given: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_shares(given)
