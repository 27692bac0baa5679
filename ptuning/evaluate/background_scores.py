"""Scores of rows as they finish, made in a thread of their own while the next rows are generated.

One thread is enough: a row takes milliseconds to score and far longer to generate, and torch's
kernels run beside it.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from ptuning.evaluate.metrics import PairScores, score_pair


class BackgroundScores:
    """Scores by row number. Left by an error or Ctrl-C, it drops what is not scored yet."""

    def __init__(self) -> None:
        """Start the thread with the first row."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scores")
        self._scores: dict[int, Future[PairScores]] = {}

    def __enter__(self) -> Self:
        """Return the scores themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the row being scored; after an error, for no other."""
        self._pool.shutdown(cancel_futures=kind is not None)

    def add(self, index: int, prediction: str, label: str) -> None:
        """Have row `index` scored; returns at once."""
        self._scores[index] = self._pool.submit(score_pair, prediction, label)

    def in_row_order(self) -> list[PairScores]:
        """Wait for every row added and return the scores in row order.

        What scoring a row raised is raised here.
        """
        return [self._scores[index].result() for index in sorted(self._scores)]
