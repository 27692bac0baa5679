"""Which cards a question retrieves, best first, by BM25.

Retriever scores words, without those that every request has. PublishedRetriever scores whatever
lies between single spaces of the whole card, as the documents of Gorilla's published questions were
found (https://github.com/ShishirPatil/gorilla, gorilla/eval/eval-data/questions).
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ptuning.apicalls.cards import Card
from ptuning.data.segmentation import words_of

FIELDS = ("domain", "functionality", "api_name", "description")
_STOP = """
a about all am an and any api apis app application are as at be been being by call can could do does
for from function give had has have help how i if in into is it its let like ll looking m me model
models my need needs of on one or our out please provide re s should some suggest t tell that the
their them then there these they this those to us use used using ve want was we were what when where
which who why will with would you your
的 了 和 与 或 及 在 是 有 为 把 被 让 给 对 从 到 向 用 个 一个 一下 这 那 这个 那个 哪 哪个 哪些
什么 怎么 怎样 如何 吗 呢 吧 啊 我 我们 你 你们 您 他 她 它 他们 请 请问 帮 帮我 帮忙 想 想要 要
需要 希望 可以 能 能够 能否 能不能 可不可以 会 就 都 也 还 并 并且 以及 使用 利用 接口 调用 模型
函数
"""
STOP_WORDS = frozenset(_STOP.split())
# Longer words are cut: "classify" then finds "classification". The right card is among the best
# five for 277 of 904 questions of Gorilla's HuggingFace set, for 234 with whole words.
STEM = 6
K1, B, EPSILON = 1.5, 0.75, 0.25  # rank_bm25 0.2.2, class BM25Okapi


class Retriever:
    """BM25 over the words of four fields of each card."""

    def __init__(self, cards: Sequence[Card]) -> None:
        """Index the cards."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG for itself
        texts = ("\n".join(str(card.fields.get(name) or "") for name in FIELDS) for card in cards)
        self._num_cards = len(cards)
        self._index = bm25s.BM25(k1=K1, b=B)
        documents = [_key_words(text) or [""] for text in texts]  # it needs a word in each
        self._index.index(documents, show_progress=False)

    def ranked(self, question: str, k: int) -> list[int]:
        """Return the indices of the k best cards; of equal ones the first in the file comes first.

        A question without any word of the cards gets them in file order.
        """
        words = [word for word in _key_words(question) if word in self._index.vocab_dict]
        return _best(self._index.get_scores(words) if words else np.zeros(self._num_cards), k)


class PublishedRetriever:
    """BM25Okapi of rank_bm25 0.2.2 over str(card), cut at single spaces."""

    def __init__(self, cards: Sequence[Card]) -> None:
        """Count the words of every card."""
        counts = [Counter(str(dict(card.fields)).split(" ")) for card in cards]
        lengths = np.array([words.total() for words in counts], dtype=np.float64)
        self._length_terms = K1 * (1 - B + B * lengths / lengths.mean())  # (cards,)
        found: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for index, words in enumerate(counts):
            for word, count in words.items():
                found[word].append((index, count))
        self._found = {word: np.array(pairs).T for word, pairs in found.items()}
        idf = {
            word: math.log(len(cards) - len(pairs) + 0.5) - math.log(len(pairs) + 0.5)
            for word, pairs in found.items()
        }
        floor = EPSILON * sum(idf.values()) / len(idf)
        self._idf = {word: floor if value < 0 else value for word, value in idf.items()}

    def ranked(self, question: str, k: int) -> list[int]:
        """Return the indices of the k best cards; of equal ones the first in the file."""
        scores = np.zeros(len(self._length_terms))
        for word in question.split(" "):
            if word in self._idf:
                cards, counts = self._found[word]
                saturated = counts * (K1 + 1) / (counts + self._length_terms[cards])
                scores[cards] += self._idf[word] * saturated
        return _best(scores, k)


def _key_words(text: str) -> list[str]:
    """Return words without stop words, names with digits whole.

    >>> _key_words("Which API classifies images with resnet50?")
    ['classi', 'images', 'resnet50']
    """
    words = (word for word in words_of(text) if word not in STOP_WORDS)
    return [word[:STEM] if word.isalpha() else word for word in words]


def _best(scores: npt.NDArray[np.floating], k: int) -> list[int]:
    best: list[int] = np.argsort(-scores, kind="stable")[:k].tolist()
    return best
