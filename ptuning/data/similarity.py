"""ROUGE-L between texts, in Chinese as in English, against a growing pool.

F1 = 2PR / (P + R) over the longest common subsequence of the words. Each word is mapped to one
character, so that rapidfuzz (C++, bit-parallel) compares strings.
"""

import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

from ptuning.data.segmentation import words_of

SURROGATES = range(0xD800, 0xE000)  # code points that are no characters


class Pool:
    """Texts that a new one is compared with."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self.texts: list[str] = []
        self._encoded: list[str] = []
        self._lengths = array("q")  # in words
        self._exact: dict[str, int] = {}
        self._characters: dict[str, str] = {}  # of each word seen
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Add a text."""
        encoded = self._encode(text)
        self._exact.setdefault(text, len(self.texts))
        self.texts.append(text)
        self._encoded.append(encoded)
        self._lengths.append(len(encoded))

    def scores(self, text: str) -> np.ndarray:
        """Return the F1 of a text with each text of the pool, (size,) float64.

        Texts without words score 0, but an equal text always scores 1.
        """
        if not self.texts:
            return np.zeros(0)
        encoded = self._encode(text)
        (common,) = cdist(
            [encoded], self._encoded, scorer=LCSseq.similarity, dtype=np.int32, workers=1
        )
        precision = common / np.maximum(np.frombuffer(self._lengths, dtype=np.int64), 1)
        recall = common / max(len(encoded), 1)
        scores: np.ndarray = 2 * precision * recall / np.where(common, precision + recall, 1.0)
        if text in self._exact:
            scores[self._exact[text]] = 1.0
        return scores

    def _encode(self, text: str) -> str:
        characters = self._characters
        for word in (words := words_of(text)):
            if word not in characters:
                index = len(characters)
                skipped = len(SURROGATES) if index >= SURROGATES.start else 0
                characters[word] = chr(index + skipped)
        return "".join(characters[word] for word in words)


def rouge_l(first: str, second: str) -> float:
    """Return the F1 of two texts; equal ones score 1 even without words.

    >>> round(rouge_l("the cat sat", "the cat ran fast"), 3)
    0.571
    """
    if first == second:
        return 1.0
    words, others = _words(first), _words(second)
    common = LCSseq.similarity(words, others)
    return 2 * common / (len(words) + len(others)) if common else 0.0


@lru_cache(maxsize=2**13)  # a text is often compared again; interned, 500 words take 4 KB
def _words(text: str) -> tuple[str, ...]:
    return tuple(map(sys.intern, words_of(text)))
