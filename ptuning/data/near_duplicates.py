"""Rows that are nearly the same, found by MinHash and confirmed by ROUGE-L.

A text's signature is the least hash of its character 3-grams under each of 128 hash functions; two
texts agree in a hash with the probability of their Jaccard similarity. Texts that agree in one of
16 bands of 8 hashes are compared word by word. A pair at Jaccard 0.82 has no band in common with
probability 0.03, at 0.9 with 1e-4, at 0.5 with 0.94.
Source: Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900; bands as in Leskovec, Rajaraman,
Ullman, Mining of Massive Datasets, chapter 3, http://www.mmds.org
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ptuning.data.raw_file import number_of
from ptuning.data.similarity import rouge_l

logger = logging.getLogger(__name__)

NUM_BANDS, BAND_HASHES = 16, 8
GRAM = 3  # characters
ROUGE_THRESHOLD = 0.7
SHARED_BY = 5  # prompts that may have a line in common; one of more says nothing of any of them
MOST_COMPARED = 50  # rows that a row is compared with, those with the most bands in common
BUCKET_ROWS = 200  # that share a band and are remembered for it
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
    France" and "the capital of Spain" have most of their words in common. num_limited counts rows
    that had more candidates than were compared, as where all prompts share a long instruction.
    """

    def __init__(self, threshold: float = ROUGE_THRESHOLD) -> None:
        self.num_limited = 0
        self._threshold = threshold
        self._rows: dict[int, tuple[str, str]] = {}
        self._bands: tuple[defaultdict[int, list[int]], ...] = tuple(
            defaultdict(list) for _ in range(NUM_BANDS)
        )

    def find(self, text: str, answer: str) -> Nearest | None:
        """Return a row that is nearly the same, None if there is none among those compared.

        Similarity is the ROUGE-L of the texts or of the answers, whichever is lower.
        """
        return self._find(text, answer, bands_of(text).tolist())

    def add(self, number: int, text: str, answer: str) -> None:
        """Add a row."""
        self._add(number, text, answer, bands_of(text).tolist())

    def find_or_add(self, number: int, text: str, answer: str) -> Nearest | None:
        """Return a row that is nearly the same; if there is none, add this one."""
        keys = bands_of(text).tolist()
        found = self._find(text, answer, keys)
        if found is None:
            self._add(number, text, answer, keys)
        return found

    def say_limited(self) -> None:
        """Log how many rows had too many candidates."""
        if self.num_limited:
            rows = number_of(self.num_limited, "row")
            logger.warning("%s shared too much text with others to be compared with all", rows)

    def _find(self, text: str, answer: str, keys: list[int]) -> Nearest | None:
        shared = Counter(
            number
            for band, key in zip(self._bands, keys, strict=True)
            for number in band.get(key, ())
        )
        self.num_limited += len(shared) > MOST_COMPARED
        likeliest = sorted(shared, key=lambda number: (-shared[number], number))
        for number in likeliest[:MOST_COMPARED]:
            other, other_answer = self._rows[number]
            similarity = rouge_l(other_answer, answer)
            if similarity >= self._threshold:
                similarity = min(similarity, rouge_l(other, text))
            if similarity >= self._threshold:
                return Nearest(number, similarity)
        return None

    def _add(self, number: int, text: str, answer: str, keys: list[int]) -> None:
        self._rows[number] = text, answer
        for band, key in zip(self._bands, keys, strict=True):
            if len(band[key]) < BUCKET_ROWS:
                band[key].append(number)


def own_texts(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return the texts of rows (prompt, answer), less the lines that many prompts have.

    Otherwise rows with one long instruction and one label would be nearly the same.
    """
    prompts = [prompt.splitlines() for prompt, _ in rows]
    counts = Counter(line for lines in prompts for line in set(lines))
    own = [[line for line in lines if counts[line] <= SHARED_BY] or lines for lines in prompts]
    return ["\n".join([*lines, answer]) for lines, (_, answer) in zip(own, rows, strict=True)]


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
