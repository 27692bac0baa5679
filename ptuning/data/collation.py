"""Step 5 of 5: token sequences to one padded batch.

Training rows are padded on the right, prompts on the left, so that generation continues the text.
A batch is as long as its longest row.
Shapes: B rows, S tokens of the longest, T tokens of all rows, N of them with a target.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ptuning.data.tokenization import IGNORED_LABEL

TokenRow = Sequence[int] | Tensor


def pad_right(
    batch: Sequence[Mapping[str, TokenRow]],
    *,
    pad_id: int,
    pad_to_length: int | None = None,
) -> dict[str, Tensor]:
    """Return input_ids, attention_mask (1 for tokens) and labels (-100 for padding), each (B, S).

    S is pad_to_length, or the longest row where that is None. Three more entries, so that the model
    need not compute them on a GPU and wait: tokens (T,), the cells of the flattened grid that hold
    tokens; needed (N,), which of those have a label after them; targets (N,), those labels. Leave
    these three out where rows or labels are changed afterwards.

    >>> rows = [{"input_ids": [7, 8], "labels": [-100, 8]}, {"input_ids": [9], "labels": [9]}]
    >>> pad_right(rows, pad_id=3)["input_ids"].tolist()
    [[7, 8], [9, 3]]
    """
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in batch]
    labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in batch]
    length = _batch_length(ids, pad_to_length)
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


def pad_left(
    prompts: Sequence[TokenRow], *, pad_id: int, pad_to_length: int | None = None
) -> dict[str, Tensor]:
    """Return input_ids and attention_mask (1 for tokens) of prompts to continue, each (B, S).

    >>> pad_left([[7, 8], [9]], pad_id=3)["input_ids"].tolist()
    [[7, 8], [3, 9]]
    """
    ids = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
    length = _batch_length(ids, pad_to_length)
    input_ids = torch.full((len(ids), length), pad_id, dtype=torch.long)  # (B, S)
    attention_mask = torch.zeros_like(input_ids)
    for index, row_ids in enumerate(ids):
        start = length - len(row_ids)
        input_ids[index, start:] = row_ids
        attention_mask[index, start:] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _batch_length(rows: Sequence[Tensor], fixed: int | None) -> int:
    """Return S for a batch."""
    if not rows:
        raise ValueError("the batch has no rows; give at least one.")
    longest = max(len(row) for row in rows)
    if fixed is not None and longest > fixed:
        raise ValueError(
            f"a row has {longest} tokens and pad_to_length is {fixed}; raise it to {longest}, "
            "or cut the rows with --max_source_length and --max_target_length."
        )
    return longest if fixed is None else fixed
