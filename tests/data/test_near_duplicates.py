"""MinHash: how often it finds a pair of a known similarity, and texts of every kind."""

from random import Random

import numpy as np

from ptuning.data.near_duplicates import NearDuplicates, bands_of


def test_pairs_share_a_band_as_often_as_their_jaccard_similarity_says() -> None:
    """Of sets of 3-grams with Jaccard j, 16 bands of 8 hashes share one with 1 - (1 - j^8)^16."""
    draws = Random(20261128)
    for shared, expected in ((0.5, 0.061), (0.7, 0.613), (0.82, 0.973)):
        hits = 0
        for _ in range(400):
            # Words of three letters, each one 3-gram; blanks between would make more of them.
            size = 200
            common = round(2 * size * shared / (1 + shared))
            letters = [chr(0x4E00 + draws.randrange(20000)) for _ in range(3 * (2 * size - common))]
            words = ["".join(letters[n : n + 3]) for n in range(0, len(letters), 3)]
            first, second = words[:size], words[size - common :]
            hits += bool((_keys(first) == _keys(second)).any())
        assert abs(hits / 400 - expected) < 0.08, shared


def _keys(grams: list[str]) -> np.ndarray:
    """Return the keys of a text with these 3-grams, and some at their borders."""
    return bands_of("\x00".join(grams))


def test_short_and_odd_texts() -> None:
    known = NearDuplicates()
    for number, text in enumerate(["", "a", "ab", "\ud800", "😀😀😀", "!!!"]):
        assert known.find_or_add(number, text, text) is None, text
        assert known.find(text, text) == (number, 1.0), text
