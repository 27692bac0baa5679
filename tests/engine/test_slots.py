"""Slots take what little may be needed at once, grow and shrink by steps when large, and keep their rows."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptuning  # noqa: F401  (registers the model)
from ptuning.engine import slots as engine_slots
from ptuning.engine.slots import Slots


@pytest.fixture(scope="module")
def model(golden):
    return AutoModelForCausalLM.from_pretrained(golden / "chatglm-tiny", dtype=torch.float32)


def sizes(slots):
    shapes = {tuple(stored.shape) for stored in (*slots.keys, *slots.values)}
    assert shapes == {(slots.num_slots, 2, slots.capacity, 16)}
    assert slots.num_bytes == 2 * len(slots.keys) * slots.num_slots * slots.capacity * 2 * 16 * 4
    return slots.num_slots, slots.capacity


def test_little_memory_is_taken_at_once_and_returned_at_the_end(model):
    slots = Slots(model)
    assert slots.num_bytes == 0
    slots.reserve(1, 9, max_rows=32, max_columns=300)
    assert sizes(slots) == (4, 304)
    slots.shrink(1, 9)
    assert sizes(slots) == (4, 304)
    slots.shrink(0, 0)
    assert slots.num_bytes == 0


def test_much_memory_grows_and_shrinks_by_steps(model, monkeypatch):
    monkeypatch.setattr(engine_slots, "SMALL_BYTES", 0)
    slots = Slots(model)
    seen = []
    for rows, columns in ((1, 9), (5, 64), (9, 65), (20, 97), (32, 1999)):
        slots.reserve(rows, columns, max_rows=32, max_columns=2000)
        seen.append(sizes(slots))
    assert seen == [(4, 64), (8, 64), (16, 96), (32, 144), (32, 2000)]
    for rows, columns, expected in (
        (9, 600, (32, 2000)),
        (8, 600, (16, 2000)),
        (8, 400, (16, 800)),
        (1, 20, (4, 64)),
        (1, 5, (4, 64)),
    ):
        slots.shrink(rows, columns)
        assert sizes(slots) == expected


def test_contents_survive_growth_and_shrinking(model, monkeypatch):
    monkeypatch.setattr(engine_slots, "SMALL_BYTES", 0)
    slots = Slots(model, 4, 64)
    held = [torch.randn(1, 2, 10, 16) for _ in range(2 * len(slots.keys))]
    for stored, part in zip((*slots.keys, *slots.values), held, strict=True):
        stored[2, :, :10] = part
    slots.reserve(20, 700, max_rows=32, max_columns=2000)
    slots.move(2, 0, 10)
    slots.shrink(1, 10)
    for stored, part in zip((*slots.keys, *slots.values), held, strict=True):
        assert torch.equal(stored[:1, :, :10], part)
