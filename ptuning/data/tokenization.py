"""Steps 4 and 5 of 5: examples to token ids, `prompt [gMASK] <sop> answer <eop>`, then to batches.

The published recipe truncates every prompt at its end and puts <eop> after every answer. The
corrected one puts it only after complete answers, and drops the oldest rounds first, so that the
question and `答：` survive.
Shapes: B rows, S tokens of the longest row or pad_to_length, T tokens of all rows, N with a target.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptuning.data.prompts import (
    SHORTEST,
    Example,
    Recipe,
    RowFormat,
    TextRow,
    build_rounds,
    to_example,
)
from ptuning.data.tokenizer import ChatGLMTokenizer

IGNORED_LABEL = -100  # what PyTorch's cross entropy leaves out

Ids = Sequence[int] | Tensor


class TokenizedExample(NamedTuple):
    """One training row: its ids, the index of `<sop>` in them, and what was truncated."""

    input_ids: list[int]
    context_length: int
    prompt_cut: bool
    answer_cut: bool


def to_training_batch(
    tokenizer: ChatGLMTokenizer,
    examples: Sequence[Example],
    *,
    max_source_length: int,
    max_target_length: int,
    recipe: Recipe = "corrected",
) -> list[TokenizedExample]:
    """Encode examples for training, at most max_source_length + max_target_length tokens each.

    `[gMASK]` counts towards the prompt, `<sop>` and `<eop>` towards the answer.
    """
    texts = [text for example in examples for text in (example.prompt, example.response)]
    encoded = tokenizer.encode_batch(texts)
    rows = []
    for example, prompt_ids, answer_ids in zip(examples, encoded[::2], encoded[1::2], strict=True):
        prompt = _fit_prompt(tokenizer, example, prompt_ids, max_source_length - 1, recipe)
        answer = answer_ids[: max_target_length - 2]
        answer_cut = len(answer) < len(answer_ids)
        ids = tokenizer.build_inputs_with_special_tokens(prompt, answer)
        if answer_cut and recipe == "corrected":
            ids.pop()  # <eop> would teach the model to stop in the middle of a sentence
        prompt_cut = len(prompt) < len(prompt_ids)
        rows.append(TokenizedExample(ids, len(prompt) + 1, prompt_cut, answer_cut))
    return rows


def to_whole_rows(
    tokenizer: ChatGLMTokenizer, rows: Sequence[TextRow], max_tokens: int
) -> list[TokenizedExample]:
    """Encode rows, `prompt [gMASK] <sop> answer <eop>`, at most max_tokens tokens each.

    The answer is cut to what fits; a prompt that leaves no room for one is cut as in training.
    """
    encoded = to_training_batch(
        tokenizer,
        [to_example(row, RowFormat()) for row in rows],
        max_source_length=max_tokens - SHORTEST,
        max_target_length=max_tokens,
    )
    return [
        row._replace(
            input_ids=row.input_ids[:max_tokens],
            answer_cut=row.answer_cut or len(row.input_ids) > max_tokens,
        )
        for row in encoded
    ]


def to_generation_batch(
    tokenizer: ChatGLMTokenizer,
    examples: Sequence[Example],
    *,
    max_source_length: int,
    recipe: Recipe = "corrected",
) -> tuple[list[list[int]], list[bool]]:
    """Return the ids of each prompt, `[gMASK] <sop>` included, and whether it was truncated."""
    prompts, cuts = [], []
    encoded = tokenizer.encode_batch([example.prompt for example in examples])
    for example, prompt_ids in zip(examples, encoded, strict=True):
        prompt = _fit_prompt(tokenizer, example, prompt_ids, max_source_length - 2, recipe)
        prompts.append(tokenizer.build_inputs_with_special_tokens(prompt))
        cuts.append(len(prompt) < len(prompt_ids))
    return prompts, cuts


def _fit_prompt(
    tokenizer: ChatGLMTokenizer,
    example: Example,
    prompt_ids: list[int],
    budget: int,
    recipe: Recipe,
) -> list[int]:
    """Return the prompt in at most budget ids."""
    if len(prompt_ids) <= budget:
        return prompt_ids
    if recipe == "published" or not example.has_rounds:
        return prompt_ids[:budget]
    num_turns = len(example.history)
    for start in range(1, num_turns + 1):
        ids = _encode_rounds(tokenizer, example, example.query, start)
        if len(ids) <= budget:
            return ids
    # Without any history the question is still too long: find the longest start of it that fits.
    shortest, longest = 0, len(example.query)  # in characters; the number of ids grows with them
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if len(_encode_rounds(tokenizer, example, example.query[:middle], num_turns)) <= budget:
            shortest = middle
        else:
            longest = middle - 1
    ids = _encode_rounds(tokenizer, example, example.query[:shortest], num_turns)
    return ids[-budget:]  # a budget below the bare `[Round 0]` form still keeps `答：`


def _encode_rounds(
    tokenizer: ChatGLMTokenizer, example: Example, query: str, start: int
) -> list[int]:
    """Encode the prompt without the turns before `start`; the system text moves to what is left."""
    history = example.history[start:]
    if example.system.strip() and history:
        (question, answer), *rest = history
        history = ((f"{example.system}\n{question}", answer), *rest)
    elif example.system.strip():
        query = f"{example.system}\n{query}"
    prompt = example.source_prefix + build_rounds(query, history)
    return tokenizer.encode_batch([prompt], num_threads=1)[0]


# Batches


def form_batches(sizes: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, largest first, of at most batch_tokens in all or a single index.

    >>> list(form_batches([2, 9, 3, 2], batch_tokens=5))
    [[1], [2, 0], [3]]
    """
    batch: list[int] = []
    room = batch_tokens
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if batch and sizes[index] > room:
            yield batch
            batch, room = [], batch_tokens
        batch.append(index)
        room -= sizes[index]
    if batch:
        yield batch


def pad_right(
    batch: Sequence[Mapping[str, Ids]], *, pad_id: int, pad_to_length: int | None = None
) -> dict[str, Tensor]:
    """Return input_ids, attention_mask (1 for tokens) and labels (-100 for padding), each (B, S).

    Three index tensors are returned as well; computing them in the model would stall a GPU: tokens
    (T,), the cells of the flattened grid that hold tokens; needed (N,), those tokens that have a
    label after them; targets (N,), these labels. Drop the three if you change rows or labels.

    >>> rows = [{"input_ids": [7, 8], "labels": [-100, 8]}, {"input_ids": [9], "labels": [9]}]
    >>> pad_right(rows, pad_id=3)["input_ids"].tolist()
    [[7, 8], [9, 3]]
    """
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in batch]
    labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in batch]
    length = pad_to_length or max(map(len, ids))
    size = (len(ids), length)
    padded = {
        "input_ids": torch.full(size, pad_id, dtype=torch.long),  # (B, S)
        "attention_mask": torch.zeros(size, dtype=torch.long),
        "labels": torch.full(size, IGNORED_LABEL, dtype=torch.long),
    }
    tokens, needed, targets, num_tokens = [], [], [], 0
    for index, (row_ids, row_labels) in enumerate(zip(ids, labels, strict=True)):
        if len(row_ids) != len(row_labels):
            raise ValueError(
                f"row {index} of the batch has {len(row_ids)} input_ids and {len(row_labels)} "
                "labels; there must be one label for each token."
            )
        padded["input_ids"][index, : len(row_ids)] = row_ids
        padded["attention_mask"][index, : len(row_ids)] = 1
        padded["labels"][index, : len(row_ids)] = row_labels
        has_target = row_labels[1:] != IGNORED_LABEL
        tokens.append(torch.arange(index * length, index * length + len(row_ids)))
        needed.append(has_target.nonzero().squeeze(1) + num_tokens)
        targets.append(row_labels[1:][has_target])
        num_tokens += len(row_ids)
    indices = {"tokens": tokens, "needed": needed, "targets": targets}
    return padded | {name: torch.cat(parts) for name, parts in indices.items()}
