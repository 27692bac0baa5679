"""Batches: exact small tensors."""

import pytest
import torch

from ptuning.data.collation import pad_left, pad_right

ROWS = [
    {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]},
    {"input_ids": torch.tensor([5]), "labels": torch.tensor([5])},
]


def test_training_rows_are_padded_on_the_right_to_the_longest() -> None:
    batch = pad_right(ROWS, pad_id=3)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9], [5, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    grids = ("input_ids", "attention_mask", "labels")
    assert {tuple(batch[name].shape) for name in grids} == {(2, 3)}


def test_a_batch_says_where_its_tokens_and_targets_are() -> None:
    labels = [[-100, 8, 9, -100, 6], [-100, -100], [-100, 4]]
    rows = [{"input_ids": list(range(10, 10 + len(row))), "labels": row} for row in labels]
    batch = pad_right(rows, pad_id=3)
    assert batch["tokens"].tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11]
    packed = batch["input_ids"].flatten()[batch["tokens"]]
    assert packed.tolist() == [10, 11, 12, 13, 14, 10, 11, 10, 11]
    assert batch["needed"].tolist() == [0, 1, 3, 7]
    assert batch["targets"].tolist() == [8, 9, 6, 4]


def test_prompts_are_padded_on_the_left_to_the_longest() -> None:
    batch = pad_left([[7, 8, 9], torch.tensor([5], dtype=torch.int32)], pad_id=3)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [3, 3, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("length", [3, 5])
def test_a_batch_can_be_made_longer(length: int) -> None:
    right = pad_right(ROWS, pad_id=3, pad_to_length=length)
    assert right["labels"].shape == (2, length)
    assert right["labels"][0, 3:].tolist() == [-100] * (length - 3)
    left = pad_left([[7, 8, 9]], pad_id=3, pad_to_length=length)
    assert left["input_ids"].tolist() == [[3] * (length - 3) + [7, 8, 9]]


def test_a_pad_id_inside_the_text_stays_visible() -> None:
    batch = pad_left([[3, 3, 5]], pad_id=3)
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 3 tokens and pad_to_length is 2"):
        pad_right(ROWS, pad_id=3, pad_to_length=2)
    with pytest.raises(ValueError, match="the batch has no rows"):
        pad_left([], pad_id=3)
    with pytest.raises(ValueError, match="row 0 of the batch has 2 input_ids and 1 labels"):
        pad_right([{"input_ids": [1, 2], "labels": [1]}], pad_id=3)
