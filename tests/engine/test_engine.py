"""The engine's tokens are those of row-by-row greedy search, in any batch, with and without prefix."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptuning  # noqa: F401  (registers the model)
from ptuning.engine.engine import Decoding, GreedyEngine, generate_answers
from ptuning.engine.slots import round_up


@pytest.fixture
def never_ends(model, monkeypatch):
    """The golden answers were made without an end: no token of theirs is 1023."""
    monkeypatch.setattr(model.config, "eos_token_id", 1023)


@pytest.mark.parametrize(
    "max_rows", [1, 3, 64, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (2, 5))]
)
@pytest.mark.parametrize("case", ["generate_prefix", "generate_plain"])
def test_tokens_are_the_published_ones_in_a_batch_of_any_size(
    model, golden, case, max_rows, never_ends
):
    numbers = json.loads((golden / "chatglm-tiny" / "cases.json").read_text())["cases"][case]
    times = 1 if max_rows == 1 else 3  # one row at a time never meets another
    engine = GreedyEngine(
        model,
        numbers["prompts"] * times,
        max_rows=max_rows,
        max_new_tokens=24,
        use_prefix=case == "generate_prefix",
    )
    answers = dict(engine.run())
    wanted = numbers["greedy_new_tokens_one_by_one"] * times
    assert [answers[i] for i in range(len(wanted))] == wanted


def random_prompts(model, count):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    ends = [model.config.gmask_token_id, model.config.bos_token_id]
    return [
        torch.randint(10, 900, (length,), generator=generator).tolist() + ends for length in lengths
    ]


def row_by_row(model, prompts, max_new_tokens, use_prefix):
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_prefix=use_prefix,
            eos_token_id=1023,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def most_varied_end(answers):
    """A token that some rows say early, others late or never."""
    lengths = {}
    for token in {token for answer in answers for token in answer}:
        found = {answer.index(token) if token in answer else -1 for answer in answers}
        lengths[token] = len(found)
    return max(lengths, key=lambda token: (lengths[token], token))


@pytest.mark.parametrize("use_prefix", [True, False])
def test_finished_rows_are_evicted_and_others_admitted(model, monkeypatch, use_prefix):
    prompts = random_prompts(model, 14)
    long = row_by_row(model, prompts, 12, use_prefix)
    end = most_varied_end(long)
    monkeypatch.setattr(model.config, "eos_token_id", end)
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in long]
    assert len({len(answer) for answer in expected}) > 2
    engine = GreedyEngine(model, prompts, max_rows=4, max_new_tokens=12, use_prefix=use_prefix)
    seen = list(engine.run())
    assert sorted(index for index, _ in seen) == list(range(14))
    assert [answer for _, answer in sorted(seen)] == expected


def test_the_prefix_is_held_once_for_all_rows(model):
    engine = GreedyEngine(model, random_prompts(model, 6), max_rows=6, max_new_tokens=3)
    rows = list(engine.waiting)
    engine.step()
    seen = engine.prefix_cache.lookup([row.request.prefixes for row in rows])
    (prefix,) = seen.stack.places
    assert prefix is rows[0].request.prefixes[0].prefix
    for stacked, held in zip(seen.stack.layers, prefix.key_values, strict=True):
        assert stacked is held, "a prefix that all rows see is not copied"
        assert stacked.shape == (2, 1, 2, 8, 16)  # (2, 1, H, P, D), no axis of rows
    capacity = round_up(max(len(row.prompt) for row in rows) + 3)
    assert engine.slots.keys[0].shape == (6, 2, capacity, 16)


def test_no_prompts_give_no_answers(model):
    assert list(GreedyEngine(model, [], max_rows=4, max_new_tokens=3).run()) == []


def test_half_precision_decodes(model, golden):
    half = AutoModelForCausalLM.from_pretrained(golden / "chatglm-tiny", dtype=torch.bfloat16)
    answers = dict(GreedyEngine(half, random_prompts(model, 3), max_rows=3, max_new_tokens=4).run())
    assert {len(answer) for answer in answers.values()} <= {0, 1, 2, 3, 4}
    assert len(answers) == 3


def test_sampling_and_beams_go_through_transformers(model):
    prompts = random_prompts(model, 5)

    for decoding in (
        Decoding(max_new_tokens=6, num_beams=2),
        Decoding(max_new_tokens=6, do_sample=True, top_p=0.7, temperature=0.95),
        Decoding(max_new_tokens=None, max_length=40),
    ):
        torch.manual_seed(0)
        answers = dict(generate_answers(model, prompts, batch_size=2, decoding=decoding))
        assert sorted(answers) == list(range(5))
    assert not model.training
