"""Flat rows, chunked loss and other short cuts for a frozen base are right when every weight is trained."""

import copy

import pytest
import torch
from torch.nn import functional

from tests.conftest import EOP, GMASK, PAD, SOP

ROWS = [
    [7, 8, 9, GMASK, SOP, 11, 12, EOP],
    [21, 5, GMASK, SOP, 30, EOP],
    [9, GMASK, SOP, 40, 41, 42, 43, 44, 45],
]


def batch(rows=ROWS):
    """Right-padded ids, mask and labels, as the collator makes them."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.where(mask.bool(), ids, -100)
    for index, row in enumerate(rows):
        labels[index, : row.index(SOP)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: value.grad for name, value in model.named_parameters()}


def plain_gradients(model):
    """Row by row, no padding, eager attention, all logits, torch's own cross-entropy."""
    model = copy.deepcopy(model)
    model.config._attn_implementation = "eager"
    total, count = torch.zeros(()), 0
    for row in ROWS:
        logits = model(torch.tensor([row])).logits[0]
        start = row.index(SOP)
        targets = torch.tensor(row[start:])
        total = total + functional.cross_entropy(logits[start - 1 : -1], targets, reduction="sum")
        count += len(targets)
    (total / count).backward()
    return (total / count).item(), {name: value.grad for name, value in model.named_parameters()}


def left_padded(inputs):
    """The same rows with their padding on the left."""
    turned = {}
    for name, value in inputs.items():
        fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}[name]
        turned[name] = torch.full_like(value, fill)
        for index, row in enumerate(ROWS):
            turned[name][index, -len(row) :] = value[index, : len(row)]
    return turned


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, build_small):
    return build_small(tie_word_embeddings=request.param).requires_grad_(True).train()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_gets_the_gradient_of_separate_rows(model, side, checkpointing):
    wanted_loss, wanted = plain_gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = batch() if side == "right" else left_padded(batch())
    loss, found = gradients(model, **inputs)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert {name for name, value in wanted.items() if value is None} == set()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 2e-5 * value.norm() + 1e-7, name


def test_under_bfloat16_autocast_it_is_finite_and_near(model):
    _, wanted = plain_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(model, **batch())
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert found[name].isfinite().all(), name
        if value.norm() > 1e-3:
            # 8 bits of mantissa through three layers: a few per cent of each gradient.
            assert (found[name] - value).norm() <= 0.15 * value.norm(), name
