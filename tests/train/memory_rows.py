"""Rows of given lengths, with no tokens in them."""

from collections.abc import Sequence

import numpy as np

from ptuning.data.dataset import GenerationDataset, GenerationRow, TokenArrays, TokenDataset
from ptuning.train.rows import Rows

NO_ROWS = Rows(None, None, None)


def training_rows(lengths: Sequence[int], *, num_answer_tokens: int) -> TokenDataset:
    """Return rows to train or validate on, each with that many answer tokens."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.zeros(offsets[-1], dtype=np.int32)
    return TokenDataset(TokenArrays(ids, offsets, np.array(lengths) - num_answer_tokens))


def prompts(count: int, length: int) -> GenerationDataset:
    """Return rows to answer."""
    return GenerationDataset([GenerationRow([0] * length, "", "", 1)] * count)
