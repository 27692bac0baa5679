"""General rows beside a task's: the form of --mix, the share, the draw, and the rows themselves."""

from pathlib import Path

import numpy as np
import pytest

from ptuning.data.cache import TokenArrays
from ptuning.data.dataset import TokenDataset
from ptuning.data.mixing import MixSource, mix_rows, parse_mix


def dataset(count: int, first_id: int) -> TokenDataset:
    """Rows of 3, 4, 5, ... tokens; every token of row i is first_id + i."""
    lengths = np.arange(count) + 3
    ids = np.repeat(first_id + np.arange(count), lengths).astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return TokenDataset(TokenArrays(ids, offsets, np.ones(count, dtype=np.int32)))


def names(rows: TokenDataset) -> list[int]:
    return [int(rows[index]["input_ids"][0]) for index in range(len(rows))]


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


@pytest.mark.parametrize(("share", "general"), [(0.2, 2), (0.5, 8), (0.75, 24), (0.01, 1)])
def test_the_ratio_is_the_share_of_all_rows(share, general):
    mixed = mix_rows(dataset(8, 100), dataset(5, 200), share=share, seed=1)
    assert len(mixed) == 8 + general
    assert names(mixed)[:8] == list(range(100, 108))
    taken = np.bincount(np.array(names(mixed)[8:]) - 200, minlength=5)
    assert taken.max() - taken.min() <= 1  # none again before all were taken


def test_rows_keep_their_tokens_labels_and_lengths():
    task, general = dataset(4, 100), dataset(3, 200)
    mixed = mix_rows(task, general, share=0.6, seed=3)
    assert len(mixed) == 10
    for index in range(len(mixed)):
        name = names(mixed)[index]
        source = task[name - 100] if name < 200 else general[name - 200]
        assert mixed[index]["input_ids"].equal(source["input_ids"])
        assert mixed[index]["labels"].equal(source["labels"])
    assert mixed.arrays.ids.dtype == np.int32
    assert mixed.lengths.sum() == len(mixed.arrays.ids)


def test_the_seed_decides_which_rows():
    task, general = dataset(8, 100), dataset(50, 200)
    draws = [names(mix_rows(task, general, share=0.5, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
