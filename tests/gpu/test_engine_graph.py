"""Decoding with CUDA graphs gives the tokens of eager steps, on a GPU."""

from typing import Any

import pytest
import torch

from ptuning.engine import graph as engine_graph
from ptuning.engine.engine import Engine
from ptuning.engine.prefixes import SharedPrefix, mix_prefixes
from ptuning.engine.request import Request, Row
from ptuning.engine.step import run_step, step_numbers
from ptuning.model.adapter import adapter_parameters, add_adapter
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.model.quantization.layers import quantize_embeddings_, quantize_model_

pytestmark = pytest.mark.gpu
NEVER: frozenset[int] = frozenset({1})


@pytest.fixture
def device() -> torch.device:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


def build(device: torch.device, bits: int = 0) -> ChatGLMForConditionalGeneration:
    """A model whose answers vary: with a tied head, random weights repeat one token for ever."""
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=1024,
        hidden_size=512,
        num_layers=4,
        num_attention_heads=4,
        inner_hidden_size=2048,
        bos_token_id=1020,
        eos_token_id=1021,
        mask_token_id=1022,
        gmask_token_id=1023,
        tie_word_embeddings=False,
    )
    model = ChatGLMForConditionalGeneration(config).half().to(device).eval()
    if bits:
        quantize_model_(model, bits)
    model.add_prefix(16)
    return model


def answers(
    model: ChatGLMForConditionalGeneration, max_rows: int, use_graphs: bool
) -> tuple[list[list[int]], Engine]:
    engine = Engine(model, max_rows=max_rows, use_graphs=use_graphs)
    with torch.no_grad():
        prefix = SharedPrefix(model.transformer.prefix_for(True) or ())
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(11):
        prompt = torch.randint(10, 900, (4 + 5 * index % 40,), generator=generator).tolist()
        shares = mix_prefixes([(prefix, 1.0)] if index < 8 else [])
        rows.append(
            engine.add(Request([*prompt, 1023, 1020], 40 + 9 * index % 50, shares, end_ids=NEVER))
        )
    while not engine.is_idle:
        engine.step()
    return [row.answer for row in rows], engine


def assert_same(model: ChatGLMForConditionalGeneration, max_rows: int) -> Engine:
    found, engine = answers(model, max_rows, use_graphs=True)
    plain, _ = answers(model, max_rows, use_graphs=False)
    assert engine.graphed is not None
    assert engine.graphed.disabled_reason == ""
    assert len(engine.graphed.graphs) > 0, "steps were captured"
    assert sum(len(set(answer)) for answer in plain) > 100, "answers vary"
    # Padding a batch may reorder a sum, which can flip a near-tie between random logits.
    same = sum(a == b for a, b in zip(found, plain, strict=True))
    assert same >= len(plain) - 1
    return engine


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("max_rows", [1, 4, 11])
def test_tokens_are_those_of_eager_steps(device: torch.device, bits: int, max_rows: int) -> None:
    assert_same(build(device, bits), max_rows)


def test_tokens_are_the_same_with_quantised_embeddings(device: torch.device) -> None:
    model = build(device, 4)
    quantize_embeddings_(model)
    assert_same(model, 4)


def test_tokens_are_the_same_with_an_adapter(device: torch.device) -> None:
    pytest.importorskip("peft")
    model = build(device)
    model.remove_prefix()
    add_adapter(model, rank=4, alpha=8, dropout=0.0)
    torch.manual_seed(2)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.02)
    model.add_prefix(16)
    assert_same(model.eval(), 4)


def test_the_numbers_of_a_step_are_copied_without_synchronising(device: torch.device) -> None:
    row = Row(Request([5, 1023, 1020], 4), frozenset())
    row.add_token(7, None)
    numbers = step_numbers([row], 2, device)
    assert numbers.is_pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        copied = numbers.to(device, non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copied.tolist() == numbers.tolist()


def test_captures_leave_the_allocators_cache(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise AssertionError("a capture emptied the allocator's cache")

    model = build(device)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    assert_same(model, 4)


@pytest.mark.parametrize("max_graphs", [1, 2, 3])
def test_few_graphs_are_held(
    device: torch.device, max_graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are evicted from a memory pool that the others go on using."""
    captures = []
    captured = engine_graph.CudaCapture._captured

    def counts(*args: Any) -> Any:
        captures.append(args)
        return captured(*args)

    monkeypatch.setattr(engine_graph.CudaCapture, "_captured", counts)
    monkeypatch.setattr(engine_graph, "MAX_GRAPHS", max_graphs)
    monkeypatch.setattr(engine_graph, "COLUMNS_STEP", 16)
    engine = assert_same(build(device), 4)
    assert engine.graphed is not None
    assert len(engine.graphed.graphs) <= max_graphs < len(captures)


def test_a_capture_out_of_memory_is_retried(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = []

    def fails_once(*args: Any, **how: Any) -> torch.Tensor:
        states = run_step(*args, **how)
        if torch.cuda.is_current_stream_capturing() and not failures:
            failures.append("out of memory")
            raise torch.OutOfMemoryError(*failures)
        return states

    monkeypatch.setattr(engine_graph, "run_step", fails_once)
    assert_same(build(device), 4)
    assert failures


def test_a_step_that_cannot_be_captured_falls_back_to_eager_steps(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(device)
    plain, _ = answers(model, 4, use_graphs=False)

    def waits(*args: Any, **how: Any) -> torch.Tensor:
        states = run_step(*args, **how)
        states.sum().item()  # synchronises, which is not permitted during a capture
        return states

    monkeypatch.setattr(engine_graph, "run_step", waits)
    stream = torch.cuda.current_stream(device)
    found, engine = answers(model, 4, use_graphs=True)
    assert found == plain
    assert engine.graphed is not None
    assert "captur" in engine.graphed.disabled_reason
    assert torch.cuda.current_stream(device) == stream
