"""ROUGE-L equals the published package's in English, and a plain table LCS in both languages."""

import json
from itertools import product
from pathlib import Path

import pytest

from ptuning.data.segmentation import words_of
from ptuning.data.similarity import Pool
from ptuning.instruct.templates import TEMPLATES, read_seeds, shipped_seeds


def plain_f1(a: list[str], b: list[str]) -> float:
    """ROUGE-L by the textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in product(range(len(a)), range(len(b))):
        same = a[i] == b[j]
        table[i + 1][j + 1] = table[i][j] + 1 if same else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    if not common:
        return 0.0
    precision, recall = common / len(b), common / len(a)
    return 2 * precision * recall / (precision + recall)


def test_all_pairs_of_our_seeds_equal_a_plain_table() -> None:
    seeds = [task for name in ("zh", "en") for task in read_seeds([shipped_seeds(TEMPLATES[name])])]
    texts = [text for task in seeds for text in (task.instruction, task.output)]
    pool = Pool(texts)
    for text in texts:
        expected = [plain_f1(words_of(text), words_of(other)) for other in texts]
        assert pool.scores(text).tolist() == pytest.approx(expected, abs=1e-12)


def test_english_pairs_equal_rouge_score(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "similarity.json").read_text(encoding="utf-8"))[
        "english"
    ]
    lines = (
        (shared / "data" / "alpaca" / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    )
    texts = [json.loads(line)["instruction"] for line in lines]
    pool = Pool(texts)
    rows = [pool.scores(text) for text in texts]
    assert len(golden["pairs"]) == 2000
    for first, second, expected in golden["pairs"]:
        assert rows[first][second] == pytest.approx(expected, abs=1e-12)


def test_chinese_pairs_equal_an_independent_table(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "similarity.json").read_text(encoding="utf-8"))[
        "chinese"
    ]
    assert len(golden["pairs"]) == 60
    for pair in golden["pairs"]:
        assert words_of(pair["a"]) == pair["tokens_a"]
        assert words_of(pair["b"]) == pair["tokens_b"]
        assert Pool([pair["b"]]).scores(pair["a"])[0] == pytest.approx(pair["f1"], abs=1e-12)
        assert (Pool([pair["b"]]).scores(pair["a"])[0] > 0.7) == pair["above_0_7"]


def test_a_chinese_text_equals_itself_and_a_text_without_words_too() -> None:
    pool = Pool(["给新开的花店起名", "？？？", "Привет"])
    assert pool.scores("给新开的花店起名").tolist() == [1.0, 0.0, 0.0]
    assert pool.scores("？？？").tolist() == [0.0, 1.0, 0.0]
    assert pool.scores("Привет").tolist() == [0.0, 0.0, 1.0]
    assert pool.scores("！").tolist() == [0.0, 0.0, 0.0]
    assert Pool().scores("任何话").tolist() == []


def test_a_pool_grows_past_every_plane_of_characters() -> None:
    """Each word is one character of a string, and surrogates are none."""
    words = [f"w{number}" for number in range(60_000)]
    pool = Pool([" ".join(words)])
    assert pool.scores(" ".join(words[::2]))[0] == pytest.approx(2 / 3)
    pool.add("w59999 w54999 w55400")
    assert pool.scores("w59999 w55400")[1] == pytest.approx(0.8)
