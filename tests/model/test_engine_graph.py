"""Recorded decoding steps give the tokens of plain ones; a recording that fails or errs is not used.

CUDA's own recording is tested on a card (tests/gpu/test_engine_graph.py). Here what was recorded is
computed again into the same tensor, which is all that a replay may do: it reads its inputs where
they lay when it was recorded, and no others.
"""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ptuning  # noqa: F401  (registers the model)
from ptuning.model import engine_graph
from ptuning.model.engine import Engine, GreedyEngine
from ptuning.model.engine_graph import GraphedSteps, filled_rows
from ptuning.model.engine_row import Request
from ptuning.model.shared_prefix import SharedPrefix, mix_prefixes

NEVER = frozenset({1023})


class Recorder:
    """Records as CUDA does, without CUDA; counts."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1
        output = torch.full_like(work(), float("nan"))  # recording computes nothing

        def replay():
            self.replayed += 1
            output.copy_(work())

        return replay, output


@pytest.fixture(scope="module")
def model(golden):
    folder = golden / "chatglm-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.add_prefix(8).load_state_dict(load_file(folder / "prefix.safetensors"))
    return model.eval()


@pytest.fixture
def recorder():
    return Recorder()


def graphed(engine, recorder):
    engine.graphed = GraphedSteps(engine.model.transformer, lambda: recorder)
    return engine


@pytest.mark.parametrize("max_rows", [1, 3, 5, 64])
@pytest.mark.parametrize("case", ["generate_prefix", "generate_plain"])
def test_tokens_are_the_published_ones(model, golden, case, max_rows, recorder, monkeypatch):
    monkeypatch.setattr(model.config, "eos_token_id", 1023)
    numbers = json.loads((golden / "chatglm-tiny" / "cases.json").read_text())["cases"][case]
    engine = GreedyEngine(
        model,
        numbers["prompts"] * 3,
        max_rows=max_rows,
        max_new_tokens=24,
        use_prefix=case == "generate_prefix",
    )
    answers = dict(graphed(engine, recorder).run())
    assert [answers[i] for i in range(12)] == numbers["greedy_new_tokens_one_by_one"] * 3
    assert recorder.recorded
    assert recorder.replayed > 10 * recorder.recorded, "most steps were replayed"
    engine.release()
    assert (engine.graphed.num_graphs, engine.slots.num_bytes) == (0, 0)


def requests(model, count):
    """Prompts and limits of many sizes, for the base, a prefix, a weighted one and a blend."""
    torch.manual_seed(3)
    with torch.no_grad():
        own = SharedPrefix(model.transformer.prefix_for(True))
    other = SharedPrefix([torch.randn(2, 1, 2, 5, 16) * 0.5 for _ in own.key_values])
    mixtures = ([], [(own, 1.0)], [(other, 0.5)], [(own, 0.7), (other, 0.3)])
    ends = [model.config.gmask_token_id, model.config.bos_token_id]
    return [
        Request(
            torch.randint(10, 900, (5 + 7 * index % 40,)).tolist() + ends,
            6 + 11 * index % 60,
            mix_prefixes(mixtures[index % 4]),
            end_ids=NEVER,
        )
        for index in range(count)
    ]


def answers_of(engine, asked):
    """Answer; every third request is sent a few steps later."""
    rows = [engine.add(request) for request in asked if asked.index(request) % 3]
    for _ in range(7):
        engine.step()
    rows += [engine.add(request) for request in asked if not asked.index(request) % 3]
    while not engine.is_idle:
        engine.step()
    return [row.answer for row in rows]


@pytest.mark.parametrize("max_rows", [1, 5, 12])
def test_rows_of_all_kinds_that_join_and_leave_answer_as_in_plain_steps(model, max_rows, recorder):
    asked = requests(model, 6 + max_rows)
    plain = answers_of(Engine(model, max_rows=max_rows, patience=0), asked)
    engine = graphed(Engine(model, max_rows=max_rows, patience=0), recorder)
    assert answers_of(engine, asked) == plain
    assert recorder.replayed


def test_slots_that_move_in_memory_end_what_was_recorded(model, recorder, monkeypatch):
    """A replay writes to the addresses it was recorded with."""
    monkeypatch.setattr("ptuning.model.engine_slots.SMALL_BYTES", 0)
    monkeypatch.setattr(engine_graph, "COLUMNS_STEP", 512)  # so that no other reason is left
    ends = [model.config.gmask_token_id, model.config.bos_token_id]
    engine = graphed(Engine(model, max_rows=1), recorder)
    row = engine.add(Request([7, 8, 9, *ends], 200, end_ids=NEVER))
    generations = []
    while not engine.is_idle:
        engine.step()
        generations.append(engine.slots.generation)
    moves = sum(before != after for before, after in pairwise(generations[1:-1]))
    assert moves >= 2
    assert recorder.recorded >= moves
    plain = Engine(model, max_rows=1)
    expected = plain.add(Request([7, 8, 9, *ends], 200, end_ids=NEVER))
    while not plain.is_idle:
        plain.step()
    assert row.answer == expected.answer


def answer(engine, request):
    row = engine.add(request)
    while not engine.is_idle:
        engine.step()
    return row.answer


def test_the_next_request_finds_the_steps_of_the_last(model, recorder):
    request = requests(model, 2)[1]
    engine = graphed(Engine(model, max_rows=1), recorder)
    first = answer(engine, request)
    recorded, replayed = recorder.recorded, recorder.replayed
    assert recorded
    assert answer(engine, request) == first
    assert recorder.recorded == recorded, "nothing is recorded twice"
    assert recorder.replayed - replayed == len(first) - 1, "no step is taken plainly"
    engine.release()
    assert answer(engine, request) == first
    assert recorder.recorded == 2 * recorded


def test_large_slots_are_given_back_when_idle_and_their_steps_with_them(
    model, recorder, monkeypatch
):
    monkeypatch.setattr("ptuning.model.engine_slots.SMALL_BYTES", 0)
    engine = graphed(Engine(model, max_rows=1), recorder)
    answer(engine, requests(model, 2)[1])
    assert recorder.replayed
    assert (engine.graphed.num_graphs, engine.slots.num_bytes) == (0, 0)


def test_a_model_that_was_moved_is_recorded_anew(golden, recorder):
    folder = golden / "chatglm-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = graphed(Engine(model, max_rows=1), recorder)
    request = requests_of_base(model)
    plain = answer(engine, request)
    recorded = recorder.recorded
    assert recorded
    layer_norm = model.transformer.final_layernorm
    layer_norm.weight.data = layer_norm.weight.data.clone()
    assert answer(engine, request) == plain
    assert recorder.recorded == 2 * recorded


def requests_of_base(model):
    ends = [model.config.gmask_token_id, model.config.bos_token_id]
    return Request([7, 8, 9, *ends], 40, end_ids=NEVER)


def test_a_mixture_of_prefixes_is_recorded_only_once_it_has_lasted(model, recorder, monkeypatch):
    asked = requests(model, 2)
    for shared in (False, True):
        engine = graphed(Engine(model, max_rows=2, patience=0), recorder)
        rows = [
            engine.add(
                replace(asked[1], shares=asked[int(shared or one)].shares, max_new_tokens=15)
            )
            for one in (False, True)
        ]
        while not engine.is_idle:
            engine.step()
        assert [len(row.answer) for row in rows] == [15, 15]
        assert bool(recorder.recorded) is shared


def test_a_model_that_overflows_is_no_reason_to_give_up(golden, recorder):
    folder = golden / "chatglm-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.transformer.layers[1].mlp.dense_h_to_4h.bias.data.fill_(float("inf"))
    engine = graphed(Engine(model, max_rows=1), recorder)
    assert len(answer(engine, requests_of_base(model))) == 40
    assert (engine.graphed.why_not, recorder.recorded) == ("", 0)


def fails(work):
    raise RuntimeError("CUDA error: operation not permitted when\nstream is capturing")


def reads_other_memory(work):
    output = work()
    return lambda: output.mul_(1.5), output


def is_empty(work):
    return lambda: None, torch.full_like(work(), float("nan"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (fails, "not permitted when stream"),
        (reads_other_memory, "by 0.5 of itself"),
        (is_empty, "nan"),
    ],
)
def test_a_recording_that_fails_or_errs_is_told_once_and_left(model, record, reason, caplog):
    asked = requests(model, 9)
    plain = answers_of(Engine(model, max_rows=4), asked)
    engine = graphed(Engine(model, max_rows=4), record)
    assert answers_of(engine, asked) == plain
    assert reason in engine.graphed.why_not
    assert [reason in message for message in caplog.messages] == [True]
    assert engine.graphed.num_graphs == 0


def test_few_graphs_are_held(model, recorder, monkeypatch):
    monkeypatch.setattr(engine_graph, "MOST_GRAPHS", 2)
    monkeypatch.setattr(engine_graph, "COLUMNS_STEP", 16)
    engine = graphed(Engine(model, max_rows=1), recorder)
    engine.add(requests(model, 6)[5])
    most = 0
    while not engine.is_idle:
        engine.step()
        most = max(most, engine.graphed.num_graphs)
    assert recorder.recorded > most == 2


def test_counts_are_filled_up_little():
    for count in range(1, 200):
        filled = filled_rows(count)
        assert count <= filled < count + 8
        assert filled == filled_rows(filled)
        assert filled < 2 * count


def test_a_cpu_takes_plain_steps(model):
    assert Engine(model, max_rows=1).graphed is None
