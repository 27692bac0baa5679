"""Rows that are nearly the same, found by MinHash and confirmed by ROUGE-L.

A text's signature is the least hash of its character 3-grams under each of 128 hash functions; two
texts agree in a hash with the probability of their Jaccard similarity. Texts that agree in one of
16 bands of 8 hashes are compared word by word. A pair at Jaccard 0.82 has no band in common with
probability 0.03, at 0.9 with 1e-4, at 0.5 with 0.94.
Source: Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900; bands as in Leskovec, Rajaraman,
Ullman, Mining of Massive Datasets, chapter 3, http://www.mmds.org
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from ptuning.data.similarity import rouge_l

NUM_BANDS, BAND_HASHES = 16, 8
GRAM = 3  # characters
ROUGE_THRESHOLD = 0.7
CHUNK = 2**12  # 3-grams hashed at once, 128 times each: 4 MiB
_DRAWS = np.random.default_rng(0)  # of the hash functions, the same in every run
# Multiply-shift: h(x) = the upper half of (a x + b) mod 2**64, a odd
_FACTORS = _DRAWS.integers(2**63, size=(NUM_BANDS * BAND_HASHES, 1), dtype=np.uint64) * 2 + 1
_OFFSETS = _DRAWS.integers(2**63, size=(NUM_BANDS * BAND_HASHES, 1), dtype=np.uint64)
_MIX = _DRAWS.integers(2**63, size=BAND_HASHES, dtype=np.uint64) * 2 + 1


class Nearest(NamedTuple):
    """The text that another is nearly the same as, by its number, and their similarity."""

    number: int
    similarity: float


class NearDuplicates:
    """Rows added so far; numbers are given by the caller.

    Two rows are nearly the same if their whole texts are, and so are their answers: "the capital of
    France" and "the capital of Spain" have most of their words in common.
    """

    def __init__(self, threshold: float = ROUGE_THRESHOLD) -> None:
        self._threshold = threshold
        self._rows: dict[int, tuple[str, str]] = {}
        self._bands: tuple[defaultdict[int, list[int]], ...] = tuple(
            defaultdict(list) for _ in range(NUM_BANDS)
        )

    def find(self, text: str, answer: str, *, add_as: int | None = None) -> Nearest | None:
        """Return the first row that is nearly the same; if there is none, add this one as add_as.

        Similarity is the ROUGE-L of the texts or of the answers, whichever is lower.
        """
        keys = bands_of(text).tolist()
        found = zip(self._bands, keys, strict=True)
        for number in sorted({number for band, key in found for number in band.get(key, ())}):
            other, other_answer = self._rows[number]
            similarity = rouge_l(other, text)
            if similarity >= self._threshold:
                similarity = min(similarity, rouge_l(other_answer, answer))
            if similarity >= self._threshold:
                return Nearest(number, similarity)
        if add_as is not None:
            self._rows[add_as] = text, answer
            for band, key in zip(self._bands, keys, strict=True):
                band[key].append(add_as)
        return None


def bands_of(text: str) -> np.ndarray:
    """Return a key for each band of a text's signature, (NUM_BANDS,) uint64."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < GRAM:
        codes = np.concatenate([codes, np.zeros(GRAM - len(codes), np.uint64)])
    grams = np.unique(codes[:-2] << np.uint64(42) | codes[1:-1] << np.uint64(21) | codes[2:])
    least = np.full(NUM_BANDS * BAND_HASHES, 2**32, np.uint64)
    for start in range(0, len(grams), CHUNK):
        hashes = (_FACTORS * grams[start : start + CHUNK] + _OFFSETS) >> np.uint64(32)  # (128, n)
        least = np.minimum(least, hashes.min(axis=1))
    keys: np.ndarray = (least.reshape(NUM_BANDS, BAND_HASHES) * _MIX).sum(axis=1, dtype=np.uint64)
    return keys
