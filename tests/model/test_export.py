"""The whole model as one graph: torch.export, torch.compile(fullgraph=True), static caches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.cache_utils import DynamicCache, StaticCache

from ptuning.model.chatglm import ChatGLMForConditionalGeneration

Model = ChatGLMForConditionalGeneration


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Model) -> Any:
    """Every rule of the compiler, without its code generation: what breaks a graph breaks here."""
    return torch.compile(model, backend="eager", fullgraph=True)


def same_where_real(found: Tensor, wanted: Tensor, batch: dict[str, Tensor]) -> None:
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_model_has_the_same_logits(
    small: Model, left_padded: dict[str, Tensor], strict: bool
) -> None:
    given = {**left_padded, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(small, (), kwargs=given, strict=strict)
        same_where_real(program.module()(**given).logits, small(**given).logits, left_padded)


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("export", "eval"),
        ("compile", "train"),
        pytest.param("export", "train", marks=pytest.mark.slow),
        pytest.param("compile", "eval", marks=pytest.mark.slow),
    ],
)
def test_the_loss_of_one_graph_is_the_same(
    small: Model, training_batch: dict[str, Tensor], how: str, mode: str
) -> None:
    getattr(small, mode)()
    small.prefix_encoder.dropout, small.label_smoothing = 0.0, 0.1
    given = {**training_batch, "use_cache": False}
    wanted = small(**given)
    graph = (
        torch.export.export(small, (), kwargs=given, strict=False).module()
        if how == "export"
        else compiled(small)
    )
    torch.testing.assert_close(graph(**given).loss, wanted.loss, atol=1e-5, rtol=1e-5)
    by_count = compiled(small)(**given, num_items_in_batch=7).loss
    torch.testing.assert_close(
        by_count, small(**given, num_items_in_batch=7).loss, atol=1e-5, rtol=1e-5
    )


def test_one_graph_gives_the_same_gradient(small: Model, training_batch: dict[str, Tensor]) -> None:
    small.train().freeze_base()
    small.prefix_encoder.dropout = 0.0
    table = small.prefix_encoder.embedding.weight
    (wanted,) = torch.autograd.grad(small(**training_batch).loss, table)
    (found,) = torch.autograd.grad(compiled(small)(**training_batch).loss, table)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_made_in_the_graph_continues_and_moves_its_rows(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    output = compiled(small)(**left_padded)
    same_where_real(output.logits, small(**left_padded).logits, left_padded)
    order = torch.tensor([2, 0, 3, 1])
    output.past_key_values.reorder_cache(order)
    ids = torch.nn.functional.pad(left_padded["input_ids"][order], (0, 1), value=30)
    mask = torch.nn.functional.pad(left_padded["attention_mask"][order], (0, 1), value=1)
    found = small(ids[:, -1:], attention_mask=mask, past_key_values=output.past_key_values).logits
    wanted = small(ids, attention_mask=mask).logits[:, -1:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_ones_own_is_filled_in_the_graph_and_continued_outside(
    small: Model, left_padded: dict[str, Tensor], kind: str
) -> None:
    cache = DynamicCache() if kind == "dynamic" else StaticCache(small.config, max_cache_len=20)
    torch.compile(small, backend="eager")(**left_padded, past_key_values=cache)
    ids = torch.nn.functional.pad(left_padded["input_ids"], (0, 1), value=30)
    mask = torch.nn.functional.pad(left_padded["attention_mask"], (0, 1), value=1)
    found = small(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
    wanted = small(ids, attention_mask=mask).logits[:, -1:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_generate_with_a_compiled_forward_has_no_graph_breaks(
    small: Model, left_padded: dict[str, Tensor], options: dict[str, Any]
) -> None:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    wanted = small.generate(**left_padded, **settings)
    torch._dynamo.utils.counters.clear()
    small.forward = torch.compile(small.forward, backend="eager")
    assert small.generate(**left_padded, **settings).equal(wanted)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_generate_compiles_a_static_cache_by_itself(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    """On a GPU it does so unasked; here it is told to do so on every device."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = small.generate(**left_padded, **settings)
    how = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=False)
    how._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    found = small.generate(
        **left_padded, **settings, cache_implementation="static", compile_config=how
    )
    assert found.equal(wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@torch.no_grad()
def test_a_warning_does_not_break_the_graph(small: Model, left_padded: dict[str, Tensor]) -> None:
    assert compiled(small)(**left_padded, output_attentions=True).attentions is None


@torch.no_grad()
def test_an_exported_model_takes_rows_of_other_lengths(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    length = torch.export.Dim("length", min=4, max=64)
    given = {**left_padded, "use_cache": False}
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    program = torch.export.export(small, (), kwargs=given, dynamic_shapes=shapes, strict=False)
    longer = {name: torch.cat((value[:, :1], value), 1) for name, value in left_padded.items()}
    found = program.module()(**longer, use_cache=False).logits
    same_where_real(found, small(**longer).logits, longer)


@pytest.mark.parametrize("device", ["meta"])
def test_tensors_without_values_pass(small: Model, device: str) -> None:
    """What counts operations, or plans memory, runs the model on the meta device."""
    ids = torch.ones(2, 8, dtype=torch.long, device=device)
    assert small.to(device)(ids, use_cache=False).logits.shape == (2, 8, 64)
