"""Choosing tokens: transformers' own processors are the reference."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ptuning.engine.request import Sampling
from ptuning.engine.sampling import choose_tokens


def row(seed=0, tokens=(), **options):
    return SimpleNamespace(
        request=SimpleNamespace(sampling=Sampling(**options), num_logprobs=None),
        random=random.Random(seed),
        tokens=lambda: tokens,
    )


def reference(logits, tokens, *, temperature, top_k, top_p, repetition_penalty):
    steps = LogitsProcessorList()
    steps.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    return steps(torch.tensor([tokens]), logits[None].clone()).softmax(dim=-1)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
        {"temperature": 0.7, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.0},
        {"temperature": 1.5, "top_k": 4, "top_p": 1.0, "repetition_penalty": 1.0},
        {"temperature": 1.2, "top_k": 6, "top_p": 0.7, "repetition_penalty": 2.0},
    ],
)
def test_draws_have_the_distribution_of_transformers(options):
    torch.manual_seed(3)
    logits = torch.randn(12) * 2
    tokens = [int(logits.argmax()), 2, 5]
    expected = reference(logits, tokens, **options)
    drawing = row(tokens=tokens, **options)
    count = 4000
    drawn = Counter(
        token
        for _ in range(count // 50)
        for token in choose_tokens(logits.repeat(50, 1), [drawing] * 50)
    )
    for token, probability in enumerate(expected.tolist()):
        # five standard deviations of a share counted in 4,000 draws; nought is never drawn
        margin = 5 * (probability * (1 - probability) / count) ** 0.5
        assert abs(drawn[token] / count - probability) <= margin


def test_greedy_rows_next_to_drawing_ones_take_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, 4.9], [2.0, 1.9, 0.0]])
    rows = [row(), row(temperature=5.0), row(tokens=[0], repetition_penalty=1.5)]
    chosen = choose_tokens(logits, rows)
    assert chosen[0] == 1
    assert chosen[2] == 1  # 2.0 / 1.5 falls below 1.9


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1.0, 1.1, -2.0]])
    assert choose_tokens(logits, [row(temperature=1e-300)]) == [1]


def test_a_row_draws_one_number_for_each_token():
    drawing = row(seed=4, temperature=1.0)
    choose_tokens(torch.zeros(1, 5), [drawing])
    other = random.Random(4)
    other.random()
    assert drawing.random.random() == other.random()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_values_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
