"""Decoding with graphs gives the tokens of eager steps; a graph that fails or errs is not used.

CUDA's own capture is tested on a GPU (tests/gpu/test_engine_graph.py). Here a replay runs the
captured function again and overwrites the same tensor, which is all that a replay may do: it reads
its inputs at the addresses they had during the capture, and no others.
"""

import gc
import json
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptuning  # noqa: F401  (registers the model)
from ptuning.engine import graph as engine_graph
from ptuning.engine.engine import Engine, GreedyEngine
from ptuning.engine.graph import CudaCapture, GraphedSteps, padded_rows
from ptuning.engine.prefixes import SharedPrefix, mix_prefixes
from ptuning.engine.request import Request
from ptuning.engine.slots import Slots
from ptuning.engine.step import step_numbers

NEVER = frozenset({1023})


class Capture:
    """Captures as CUDA does, without CUDA; counts."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, work):
        self.captured += 1
        output = torch.full_like(work(), float("nan"))  # a capture computes nothing

        def replay():
            self.replayed += 1
            output.copy_(work())

        return replay, output


@pytest.fixture
def capture():
    return Capture()


def graphed(engine, capture):
    engine.graphed = GraphedSteps(engine.model.transformer)
    engine.graphed.new_capture = lambda _device: capture
    return engine


@pytest.mark.parametrize("max_rows", [1, 3, 5, 64])
@pytest.mark.parametrize("case", ["generate_prefix", "generate_plain"])
def test_tokens_are_the_published_ones(model, golden, case, max_rows, capture, monkeypatch):
    monkeypatch.setattr(model.config, "eos_token_id", 1023)
    numbers = json.loads((golden / "chatglm-tiny" / "cases.json").read_text())["cases"][case]
    times = 1 if max_rows == 1 else 3  # one row at a time never meets another
    engine = GreedyEngine(
        model,
        numbers["prompts"] * times,
        max_rows=max_rows,
        max_new_tokens=24,
        use_prefix=case == "generate_prefix",
    )
    answers = dict(graphed(engine, capture).run())
    wanted = numbers["greedy_new_tokens_one_by_one"] * times
    assert [answers[i] for i in range(len(wanted))] == wanted
    assert capture.captured
    assert capture.replayed > 10 * capture.captured, "most steps were replayed"
    engine.release()
    assert (len(engine.graphed.graphs), engine.slots.num_bytes) == (0, 0)


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


@pytest.mark.parametrize(
    "max_rows", [5, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 12))]
)
def test_rows_admitted_and_evicted_at_any_step_answer_as_in_eager_steps(model, max_rows, capture):
    asked = requests(model, 6 + max_rows)
    plain = answers_of(Engine(model, max_rows=max_rows, max_prefill_delay=0), asked)
    engine = graphed(Engine(model, max_rows=max_rows, max_prefill_delay=0), capture)
    assert answers_of(engine, asked) == plain
    assert capture.replayed


def test_slots_that_move_in_memory_invalidate_the_graphs(model, capture, monkeypatch):
    """A replay writes to the addresses of its capture."""
    monkeypatch.setattr("ptuning.engine.slots.SMALL_BYTES", 0)
    monkeypatch.setattr(engine_graph, "COLUMNS_STEP", 512)  # so that no other reason is left
    ends = [model.config.gmask_token_id, model.config.bos_token_id]
    engine = graphed(Engine(model, max_rows=1), capture)
    row = engine.add(Request([7, 8, 9, *ends], 200, end_ids=NEVER))
    generations = []
    while not engine.is_idle:
        engine.step()
        generations.append(engine.slots.generation)
    moves = sum(before != after for before, after in pairwise(generations[1:-1]))
    assert moves >= 2
    assert capture.captured >= moves
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


def test_the_next_request_reuses_the_graphs_of_the_last(model, capture):
    request = requests(model, 2)[1]
    engine = graphed(Engine(model, max_rows=1), capture)
    first = answer(engine, request)
    captured, replayed = capture.captured, capture.replayed
    assert captured
    assert answer(engine, request) == first
    assert capture.captured == captured, "nothing is captured twice"
    assert capture.replayed - replayed == len(first) - 1, "no step is eager"
    engine.release()
    assert answer(engine, request) == first
    assert capture.captured == 2 * captured


def test_large_slots_are_freed_when_idle_and_their_graphs_with_them(model, capture, monkeypatch):
    monkeypatch.setattr("ptuning.engine.slots.SMALL_BYTES", 0)
    engine = graphed(Engine(model, max_rows=1), capture)
    answer(engine, requests(model, 2)[1])
    assert capture.replayed
    assert (len(engine.graphed.graphs), engine.slots.num_bytes) == (0, 0)


def test_a_model_that_was_moved_is_captured_again(golden, capture):
    folder = golden / "chatglm-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = graphed(Engine(model, max_rows=1), capture)
    request = requests_of_base(model)
    plain = answer(engine, request)
    captured = capture.captured
    assert captured
    layer_norm = model.transformer.final_layernorm
    layer_norm.weight.data = layer_norm.weight.data.clone()
    assert answer(engine, request) == plain
    assert capture.captured == 2 * captured


def requests_of_base(model):
    ends = [model.config.gmask_token_id, model.config.bos_token_id]
    return Request([7, 8, 9, *ends], 40, end_ids=NEVER)


def test_a_mix_of_prefixes_is_captured_only_once_it_has_lasted(model, capture, monkeypatch):
    asked = requests(model, 2)
    for shared in (False, True):
        engine = graphed(Engine(model, max_rows=2, max_prefill_delay=0), capture)
        rows = [
            engine.add(
                replace(asked[1], prefixes=asked[int(shared or one)].prefixes, max_new_tokens=15)
            )
            for one in (False, True)
        ]
        while not engine.is_idle:
            engine.step()
        assert [len(row.answer) for row in rows] == [15, 15]
        assert bool(capture.captured) is shared


def test_a_model_that_overflows_is_no_reason_to_give_up(golden, capture):
    folder = golden / "chatglm-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.transformer.layers[1].mlp.dense_h_to_4h.bias.data.fill_(float("inf"))
    engine = graphed(Engine(model, max_rows=1), capture)
    assert len(answer(engine, requests_of_base(model))) == 40
    assert (engine.graphed.disabled_reason, capture.captured) == ("", 0)


@pytest.fixture(scope="module")
def eager(model):
    """Nine requests and their answers in eager steps."""
    asked = requests(model, 9)
    return asked, answers_of(Engine(model, max_rows=4), asked)


def fails(work):
    raise RuntimeError("CUDA error: operation not permitted when\nstream is capturing")


def reads_other_memory(work):
    output = work()
    return lambda: output.mul_(1.5), output


def is_empty(work):
    return lambda: None, torch.full_like(work(), float("nan"))


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (fails, "not permitted when stream"),
        (reads_other_memory, "by 50.00%"),
        (is_empty, "nan"),
    ],
)
def test_a_capture_that_fails_or_errs_disables_graphs_with_one_warning(
    model, capture, reason, eager, caplog
):
    asked, plain = eager
    engine = graphed(Engine(model, max_rows=4), capture)
    assert answers_of(engine, asked) == plain
    assert reason in engine.graphed.disabled_reason
    assert [reason in message for message in caplog.messages] == [True]
    assert len(engine.graphed.graphs) == 0


class Device:
    """Stands in for torch.cuda: tracks the current stream and logs captures and clean-up."""

    def __init__(self):
        self.streams = ["caller's"]
        self.calls = []
        self.end_error = None  # of capture_end

    def current_stream(self):
        return Stream(self, self.streams[-1])

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream.name)
        try:
            yield
        finally:
            self.streams.pop()

    def log(self, call):
        self.calls.append((call, self.streams[-1]))


@dataclass
class Stream:
    device: Device
    name: str

    def wait_stream(self, stream):
        self.device.calls.append((f"{self.name} waits", stream.name))


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self, device):
        self.device = device

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert (pool, capture_error_mode) == ((0, 1), "thread_local")
        self.device.log("begin")

    def capture_end(self):
        self.device.log("end")
        if self.device.end_error:
            raise self.device.end_error

    def replay(self):
        self.device.log("replay")


@pytest.fixture
def device(monkeypatch):
    device = Device()
    for name, stand_in in {
        "CUDAGraph": lambda: Graph(device),
        "current_stream": device.current_stream,
        "device": lambda _: nullcontext(),
        "empty_cache": lambda: device.log("empty_cache"),
        "graph_pool_handle": lambda: (0, 1),
        "stream": device.stream,
        "synchronize": lambda: device.log("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(gc, "collect", lambda: device.log("collect"))
    monkeypatch.setattr(engine_graph, "_capture_stream", lambda _: Stream(device, "capture"))
    return device


def capture_on(device, fails=None, error=None):
    """Capture a function whose calls of the numbers given fail; return what a capture returns."""

    def work():
        device.log("work")
        if [call for call, _ in device.calls].count("work") in (fails or ()):
            raise error
        return torch.ones(1)

    return CudaCapture(torch.device("cuda", 0))(work)


WARM_UP = [
    ("capture waits", "caller's"),
    ("work", "capture"),
    ("caller's waits", "capture"),
]
CAPTURE = [("begin", "capture"), ("work", "capture"), ("end", "capture")]


def test_a_capture_neither_synchronises_nor_empties_the_cache(device):
    replay, output = capture_on(device)
    replay()
    assert output == 1
    assert device.calls == [*WARM_UP, *CAPTURE, ("replay", "caller's")]


@pytest.mark.parametrize("end_error", [None, RuntimeError("capture invalidated")])
def test_an_error_in_a_capture_ends_it_and_leaves_the_callers_stream(device, end_error):
    device.end_error = end_error
    error = ValueError("not permitted")
    with pytest.raises(type(end_error or error)) as raised:
        capture_on(device, fails={2}, error=error)
    assert device.calls == [*WARM_UP, *CAPTURE]
    assert device.streams == ["caller's"]
    assert raised.value is (end_error or error)
    assert raised.value.__context__ is (error if end_error else None)


def test_an_error_in_the_warm_up_starts_no_capture(device):
    with pytest.raises(ValueError, match="not permitted"):
        capture_on(device, fails={1}, error=ValueError("not permitted"))
    assert device.calls == WARM_UP  # the caller waits for what ran before the error
    assert device.streams == ["caller's"]


def test_a_capture_out_of_memory_is_retried_once_with_an_empty_cache(device):
    retried = [*WARM_UP, *CAPTURE, ("empty_cache", "capture"), *CAPTURE]
    capture_on(device, fails={2}, error=torch.OutOfMemoryError())
    assert device.calls == retried
    device.calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        capture_on(device, fails={2, 3}, error=torch.OutOfMemoryError())
    assert device.calls == retried
    assert device.streams == ["caller's"]


def test_graphs_are_freed_with_their_engine_and_not_by_the_garbage_collector(model):
    steps = GraphedSteps(model.transformer)
    freed = weakref.ref(steps)
    del steps
    assert freed() is None


def test_the_least_recently_used_graph_is_evicted(model, capture, monkeypatch):
    monkeypatch.setattr(engine_graph, "MAX_GRAPHS", 2)
    monkeypatch.setattr(engine_graph, "COLUMNS_STEP", 16)
    engine = graphed(Engine(model, max_rows=1), capture)
    engine.slots = Slots(model, 1, 64)  # as large as the longest row, so that graphs stay valid
    ends = [model.config.gmask_token_id, model.config.bos_token_id]
    short, middle, long = (
        Request([*range(10, 10 + length), *ends], 6, end_ids=NEVER) for length in (4, 20, 36)
    )

    def counts(request):
        """Decode one token in prefill and five in steps of one shape: captures and replays."""
        captured, replayed = capture.captured, capture.replayed
        assert answer(engine, request) == answer(Engine(model, max_rows=1), request)
        assert len(engine.graphed.graphs) <= 2
        return capture.captured - captured, capture.replayed - replayed

    assert counts(short) == (1, 3)  # captured in its third step
    assert counts(middle) == (1, 3)
    assert counts(short) == (0, 5)  # so that the middle one is the least recently used
    assert counts(long) == (1, 3)
    assert counts(short) == counts(long) == (0, 5)
    assert counts(middle) == (1, 3), "evicted, and captured again once it has recurred"
    assert counts(long) == (0, 5)
    assert counts(short) == (1, 3)


def test_a_pool_is_never_captured_into_without_a_graph(model, monkeypatch):
    """PyTorch asserts that a pool it knows is in use; the first capture creates the pool."""
    monkeypatch.setattr(engine_graph, "MAX_GRAPHS", 1)
    monkeypatch.setattr(engine_graph, "COLUMNS_STEP", 16)
    held = []

    class Capturing(Capture):
        def __call__(self, work):
            held.append(len(engine.graphed.graphs))
            return super().__call__(work)

    engine = graphed(Engine(model, max_rows=1), Capturing())
    engine.slots = Slots(model, 1, 64)
    answer(engine, requests_of_base(model))
    assert held == [0, 1, 1]
    assert len(engine.graphed.graphs) == 1


def test_no_graph_is_evicted_with_128_rows_and_three_widths():
    row_counts = {padded_rows(count) for count in range(1, 129)}
    assert len(row_counts) == 19
    assert 3 * len(row_counts) <= engine_graph.MAX_GRAPHS


def test_the_numbers_of_a_step_are_padded_with_idle_rows(model):
    engine = Engine(model, max_rows=2)
    rows = [engine.add(request) for request in requests(model, 2)]
    engine.step()
    numbers = step_numbers(rows, 4, torch.device("cpu"))
    tokens, columns, first_positions, second_positions = numbers.tolist()
    assert tokens == [row.answer[-1] for row in rows] + [0, 0]
    assert columns == [row.length for row in rows] + [0, 0]
    assert first_positions == [row.first_position for row in rows] + [0, 0]
    assert second_positions == [2, 2, 0, 0], "<sop> has 1"
    assert numbers.is_contiguous(), "as an asynchronous copy requires"


def test_row_counts_are_padded_little():
    for count in range(1, 200):
        padded = padded_rows(count)
        assert count <= padded < count + 8
        assert padded == padded_rows(padded)
        assert padded < 2 * count


def test_a_cpu_takes_eager_steps(model):
    assert Engine(model, max_rows=1).graphed is None
