"""Rows with different prefixes, weights and options in one batch each answer as if they were alone."""

import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ptuning  # noqa: F401  (registers the model)
from ptuning.engine.engine import Engine
from ptuning.engine.prefixes import SharedPrefix, mix_prefixes
from ptuning.engine.request import Request, Sampling
from ptuning.engine.slots import round_up
from ptuning.model.chatglm import ChatGLMModel

NEVER = frozenset({1023})


@pytest.fixture(params=["row by row", "on a grid"])
def reading(request, monkeypatch):
    """Both ways of reading prompts: that of a CPU, and that of every other device."""
    if request.param == "on a grid":
        monkeypatch.setattr(ChatGLMModel, "uses_varlen", lambda self: False)


@pytest.fixture(scope="module")
def model(golden):
    return AutoModelForCausalLM.from_pretrained(golden / "chatglm-tiny", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prefixes(model, golden):
    """The golden prefix, and random ones of other lengths; None is the base."""
    made = [None]
    tensors = load_file(golden / "chatglm-tiny" / "prefix.safetensors")
    for length in (8, 3, 5):
        torch.manual_seed(length)
        encoder = model.transformer.new_prefix_encoder(length, project=False)
        if length == 8:
            encoder.load_state_dict(tensors)
        with torch.no_grad():
            made.append(SharedPrefix(encoder(torch.float32)))
    return made


def random_prompts(model, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    ends = [model.config.gmask_token_id, model.config.bos_token_id]
    return [
        torch.randint(10, 900, (length,), generator=generator).tolist() + ends for length in lengths
    ]


def generate(model, prompt, prefix, max_new_tokens):
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_prefix=prefix is not None,
        prefix_key_values=None if prefix is None else prefix.key_values,
        eos_token_id=1023,
    )
    return output[0, len(prompt) :].tolist()


def shares_of(prefix, weight=1.0):
    return mix_prefixes([] if prefix is None else [(prefix, weight)])


def run(engine):
    while not engine.is_idle:
        engine.step()


@pytest.fixture(scope="module")
def alone(model, prefixes):
    """The prompts of the next test and what transformers' greedy search answers to each."""
    prompts = random_prompts(model, 20)
    return prompts, [generate(model, p, prefixes[i % 4], 5 + i % 7) for i, p in enumerate(prompts)]


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("max_rows", [pytest.param(1, marks=pytest.mark.slow), 3, 20])
def test_rows_with_four_prefixes_and_the_base_answer_as_alone(model, prefixes, alone, max_rows):
    prompts, expected = alone
    assert len({tuple(answer[:5]) for answer in expected}) > 10
    engine = Engine(model, max_rows=max_rows)
    rows = [
        engine.add(Request(prompt, 5 + i % 7, shares_of(prefixes[i % 4]), end_ids=NEVER))
        for i, prompt in enumerate(prompts)
    ]
    run(engine)
    assert [row.answer for row in rows] == expected
    assert {row.finish_reason for row in rows} == {"length"}


def test_rows_are_admitted_and_cancelled_at_any_time(model, prefixes):
    prompts = random_prompts(model, 20, seed=2)
    expected = [generate(model, p, prefixes[i % 4], 12) for i, p in enumerate(prompts)]
    rng = random.Random(0)
    engine = Engine(model, max_rows=5, max_prefill_delay=1)
    rows, cancelled = [], set()
    while len(rows) < len(prompts) or not engine.is_idle:
        if len(rows) < len(prompts) and rng.random() < 0.5:
            index = len(rows)
            shares = shares_of(prefixes[index % 4])
            rows.append(engine.add(Request(prompts[index], 12, shares, end_ids=NEVER)))
        if rows and rng.random() < 0.2:
            row = rng.choice(rows[-8:])
            if row.finish_reason is None:
                cancelled.add(row)
            engine.cancel(row)
        engine.step()
    assert 3 < len(cancelled) < 17
    for row, answer in zip(rows, expected, strict=True):
        if row in cancelled:
            assert row.finish_reason == "cancelled"
            assert row.answer == answer[: len(row.answer)]
        else:
            assert row.answer == answer
    assert engine.slots.num_bytes == 0


def test_memory_follows_the_rows(model):
    engine = Engine(model, max_rows=32)
    prompts = random_prompts(model, 32)
    rows = [engine.add(Request(p, 60, end_ids=NEVER)) for p in prompts]
    for _ in range(30):
        engine.step()
    full = engine.slots.num_bytes
    assert engine.slots.num_slots == 32
    assert engine.slots.capacity <= round_up(max(row.max_length for row in rows))
    for row in rows[2:]:
        engine.cancel(row)
    assert engine.slots.num_bytes <= full / 4
    run(engine)
    assert engine.slots.num_bytes == 0
    assert rows[0].answer == generate(model, rows[0].prompt, None, 60)


def logits_after_one_step(model, shares, prompt):
    """What the row's second token was chosen from: a prompt pass and a step have run."""
    engine = Engine(model, max_rows=2)
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    engine.add(Request(prompt, 2, shares, end_ids=NEVER))
    run(engine)
    hook.remove()
    return torch.stack(seen)


def test_weights_of_one_and_nought_are_the_plain_prefix_and_the_base(model, prefixes):
    first, second = prefixes[1], prefixes[2]
    prompt = random_prompts(model, 1)[0]
    plain = logits_after_one_step(model, shares_of(first), prompt)
    base = logits_after_one_step(model, (), prompt)
    assert not torch.allclose(plain, base)
    for weighted, expected in (
        ([(first, 1.0)], plain),
        ([(first, 0.0)], base),
        ([(first, 1.0), (second, 0.0)], plain),
        ([(second, 0.0), (first, 1.0)], plain),
    ):
        assert torch.equal(logits_after_one_step(model, mix_prefixes(weighted), prompt), expected)


@pytest.mark.usefixtures("reading")
def test_a_weight_of_two_is_the_prefix_twice(model, prefixes):
    """The definition: the weight counts how often each prefix key stands there."""
    prefix = prefixes[1]
    prompt = random_prompts(model, 1)[0]
    twice = SharedPrefix([torch.cat((layer, layer), dim=3) for layer in prefix.key_values])
    expected = logits_after_one_step(model, shares_of(twice), prompt)
    found = logits_after_one_step(model, shares_of(prefix, 2.0), prompt)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    half = logits_after_one_step(model, mix_prefixes([(prefix, 0.5), (prefix, 0.5)]), prompt)
    plain = logits_after_one_step(model, shares_of(prefix), prompt)
    torch.testing.assert_close(half, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("reading")
def test_blended_rows_answer_in_a_batch_as_alone(model, prefixes):
    mixtures = [
        mix_prefixes([(prefixes[1], 0.7), (prefixes[2], 0.3)]),
        mix_prefixes([(prefixes[2], 0.4), (prefixes[1], 0.6)]),
        shares_of(prefixes[1], 0.2),
        shares_of(prefixes[1]),
        shares_of(prefixes[3], 3.0),
        (),
    ]
    requests = [
        Request(prompt, 10, mixtures[i % 6], end_ids=NEVER)
        for i, prompt in enumerate(random_prompts(model, 12))
    ]

    def answers(engine, some):
        rows = [engine.add(request) for request in some]
        run(engine)
        return [row.answer for row in rows]

    together = answers(Engine(model, max_rows=12), requests)
    assert together == [answers(Engine(model, max_rows=1), [request])[0] for request in requests]
    assert len({tuple(answer) for answer in together}) > 8


def test_draws_depend_on_the_seed_and_not_on_the_batch(model, prefixes):
    prompt = random_prompts(model, 1)[0]

    def draw(seed, others):
        engine = Engine(model, max_rows=8)
        for other in random_prompts(model, others, seed=5):
            engine.add(Request(other, 9, sampling=Sampling(temperature=2.0), end_ids=NEVER))
        sampling = Sampling(temperature=1.0, top_p=0.9, top_k=200, seed=seed)
        row = engine.add(Request(prompt, 12, shares_of(prefixes[1]), sampling, NEVER))
        run(engine)
        return row.answer

    assert draw(7, 0) == draw(7, 5) == draw(7, 12)
    assert draw(7, 0) != draw(8, 0)


@pytest.mark.usefixtures("reading")
def test_log_probabilities_are_those_of_the_model(model, prefixes):
    prompt = random_prompts(model, 1)[0]
    engine = Engine(model, max_rows=4)
    silent = engine.add(Request(prompt, 4, end_ids=NEVER))
    row = engine.add(Request(prompt, 4, shares_of(prefixes[1]), end_ids=NEVER, num_logprobs=3))
    run(engine)
    assert silent.logprobs == []
    ids = torch.tensor([prompt + row.answer])
    with torch.no_grad():
        logits = model(ids, prefix_key_values=prefixes[1].key_values).logits[0, len(prompt) - 1 :]
    expected = logits.log_softmax(dim=-1)
    assert [found.token_id for found in row.logprobs] == row.answer
    for place, found in enumerate(row.logprobs):
        values, tokens = expected[place].topk(3)
        assert found.logprob == pytest.approx(float(expected[place, found.token_id]), abs=1e-4)
        assert [token for token, _ in found.top] == tokens.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_requests_that_cannot_be_decoded_are_refused():
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Request([1, 2], 0)
    with pytest.raises(ValueError, match="weight -1"):
        mix_prefixes([(None, -1.0)])
    with pytest.raises(ValueError, match="weight nan"):
        mix_prefixes([(None, float("nan"))])


@pytest.mark.usefixtures("reading")
def test_half_precision_decodes_every_mixture(golden):
    half = AutoModelForCausalLM.from_pretrained(
        golden / "chatglm-tiny", dtype=torch.bfloat16
    ).eval()
    made = []
    for length in (4, 6):
        torch.manual_seed(length)
        encoder = half.transformer.new_prefix_encoder(length, project=False)
        with torch.no_grad():
            made.append(SharedPrefix(encoder(torch.bfloat16)))
    engine = Engine(half, max_rows=8)
    mixtures = [(), shares_of(made[0]), shares_of(made[1], 0.5)]
    mixtures.append(mix_prefixes([(made[0], 0.3), (made[1], 0.7)]))
    rows = [
        engine.add(Request(prompt, 6, mixtures[i % 4], end_ids=NEVER, num_logprobs=1))
        for i, prompt in enumerate(random_prompts(half, 8))
    ]
    run(engine)
    assert all(len(row.answer) == 6 for row in rows)
    assert all(one.logprob <= 0 for row in rows for one in row.logprobs)  # no NaN
