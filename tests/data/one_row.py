"""One row at a time through the two batch functions of tokenisation."""

from typing import Any

from ptuning.data.prompts import Example
from ptuning.data.tokenization import (
    IGNORED_LABEL,
    TokenizedExample,
    to_generation_batch,
    to_training_batch,
)
from ptuning.data.tokenizer import ChatGLMTokenizer


def to_training_example(
    tokenizer: ChatGLMTokenizer, example: Example, **settings: Any
) -> TokenizedExample:
    return to_training_batch(tokenizer, [example], **settings)[0]


def to_generation_prompt(
    tokenizer: ChatGLMTokenizer, example: Example, **settings: Any
) -> list[int]:
    return to_generation_batch(tokenizer, [example], **settings)[0][0]


def labels_of(row: TokenizedExample) -> list[int]:
    """Return the labels that `TokenDataset` makes of a row."""
    return [IGNORED_LABEL] * row.context_length + row.input_ids[row.context_length :]
