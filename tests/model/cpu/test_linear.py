"""The CPU's products of frozen weights: the numbers of torch's own, whatever runs them."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from ptuning.model.cpu import linear as linear_module
from ptuning.model.cpu.linear import CACHED_SHAPES, Linear, has_onednn, prepack_weights_

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this PyTorch was built without oneDNN")
PLENTY = 10**9
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def frozen() -> Linear:
    torch.manual_seed(0)
    return Linear(24, 40).requires_grad_(False)


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("is_prepacked", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 0, 24), (1, 24), (3, 24), (2, 5, 24), (300, 24)])
def test_output_and_gradient_are_those_of_torch(frozen, shape, is_prepacked, is_wide, monkeypatch):
    monkeypatch.setattr(linear_module, "has_avx512", lambda: is_wide)
    if is_prepacked:
        prepack_weights_(frozen, room_bytes=PLENTY)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 40)
    expected = functional.linear(x, frozen.weight, frozen.bias)
    (expected_gradient,) = torch.autograd.grad(expected, x, upstream)
    output = frozen(x)
    (gradient,) = torch.autograd.grad(output, x, upstream)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.fixture
def fast_products(monkeypatch) -> list[tuple]:
    """What oneDNN is given, call by call."""
    calls = []
    product = linear_module._onednn
    monkeypatch.setattr(
        linear_module, "_onednn", lambda *given: calls.append(given) or product(*given)
    )
    return calls


@needs_onednn
def test_a_frozen_weight_takes_onednn_for_more_than_one_row(frozen, fast_products):
    x = torch.randn(8, 24)
    frozen(x)
    assert len(fast_products) == 1
    frozen(x[:1])
    assert len(fast_products) == 1, "a single row is left to torch"


@needs_onednn
@pytest.mark.parametrize(
    ("is_wide", "num_rows", "calls"),
    [(True, 8, 2), (True, 300, 2), (False, 8, 1), (False, 300, 0)],
)
def test_without_avx512_many_rows_and_gradients_are_left_to_torch(
    frozen, fast_products, monkeypatch, is_wide, num_rows, calls
):
    monkeypatch.setattr(linear_module, "has_avx512", lambda: is_wide)
    for prepack in (False, True):
        if prepack:
            prepack_weights_(frozen, room_bytes=PLENTY)
        fast_products.clear()
        frozen(torch.randn(num_rows, 24, requires_grad=True)).sum().backward()
        assert len(fast_products) == calls


@needs_onednn
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_trained_weight_takes_onednn_only_where_nothing_asks_for_its_gradient(
    frozen, fast_products, name
):
    trained = getattr(frozen, name).requires_grad_(True)
    x, upstream = torch.randn(8, 24), torch.randn(8, 40)
    for no_gradient in (torch.no_grad, torch.inference_mode):
        with no_gradient():
            output = frozen(x)
        assert len(fast_products) == 1
        fast_products.clear()
    output_with_gradient = frozen(x)
    output_with_gradient.backward(upstream)
    assert not fast_products
    torch.testing.assert_close(output, output_with_gradient.detach())
    expected = upstream.T @ x if name == "weight" else upstream.sum(0)
    torch.testing.assert_close(trained.grad, expected)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_trained_weight_gets_its_gradient(frozen, name):
    getattr(frozen, name).requires_grad_(True)
    frozen(torch.randn(8, 24)).sum().backward()
    assert getattr(frozen, name).grad is not None


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_moved_or_copied_weight_drops_its_prepacked_copy(frozen, dtype):
    frozen.to(dtype)
    x = torch.randn(8, 24).to(dtype)
    if not prepack_weights_(frozen, room_bytes=PLENTY):
        pytest.skip("this processor has no bfloat16 products")
    assert frozen.prepacked_weight() is not None
    for made in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert made.prepacked_weight() is None
        torch.testing.assert_close(made(x), frozen(x))
    with torch.no_grad():
        frozen.weight.mul_(2)
    assert frozen.prepacked_weight() is None
    expected = functional.linear(x, frozen.weight, frozen.bias)
    torch.testing.assert_close(frozen(x), expected)
    prepack_weights_(frozen, room_bytes=PLENTY)
    kept = frozen.prepacked_weight()
    assert frozen.to("cpu").to(dtype).prepacked_weight() is kept, "it is there already"
    frozen.to(torch.float64)
    assert frozen.prepacked_weight() is None


@needs_onednn
def test_a_replaced_or_trained_weight_drops_its_prepacked_copy(frozen):
    x = torch.randn(8, 24)
    other = torch.randn_like(frozen.weight)

    def replaces():
        frozen.weight = nn.Parameter(other, requires_grad=False)

    def assigns():
        frozen.weight.data = other.clone()

    def trains():
        frozen.weight.requires_grad_(True)
        optimizer = torch.optim.AdamW([frozen.weight], lr=1.0, fused=True)
        frozen(x).sum().backward()
        optimizer.step()
        frozen.weight.requires_grad_(False)

    def shrinks():
        frozen.weight.data = frozen.weight.data[:7].contiguous()
        frozen.bias.data = frozen.bias.data[:7].contiguous()

    for change in (replaces, assigns, trains, shrinks):
        assert prepack_weights_(frozen, room_bytes=PLENTY)
        change()
        assert frozen.prepacked_weight() is None, change.__name__
        expected = functional.linear(x, frozen.weight, frozen.bias)
        torch.testing.assert_close(frozen(x), expected)


@needs_onednn
@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_a_tied_head_drops_its_prepacked_copy_with_the_embedding(cast):
    """The embedding is cast first, and the head's weight, the same parameter, with it."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(24, 8)
            self.head = Linear(8, 24, bias=False)
            self.head.weight = self.embedding.weight.requires_grad_(False)

    model = Tied()
    assert prepack_weights_(model, room_bytes=PLENTY)
    getattr(model, cast)()
    assert model.head.prepacked_weight() is None
    states = torch.randn(3, 8).to(model.head.weight.dtype)
    torch.testing.assert_close(model.head(states), functional.linear(states, model.head.weight))
    model.float()
    torch.testing.assert_close(
        model.head(states.float()), functional.linear(states.float(), model.head.weight)
    )


@needs_onednn
def test_prepacking_counts_its_bytes_and_needs_room(frozen):
    size = 24 * 40 * 4
    assert prepack_weights_(frozen, room_bytes=size - 1) == 0
    assert frozen.prepacked_weight() is None
    assert prepack_weights_(frozen, room_bytes=size) == size
    frozen.weight.requires_grad_(True)
    assert prepack_weights_(frozen, room_bytes=size) == 0, "a trained weight changes at every step"


def test_autocast_is_left_to_torch(frozen):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(torch.randn(8, 24)).dtype == torch.bfloat16


def test_a_build_whose_products_fail_takes_torchs(monkeypatch):
    def refuses(*_):
        raise RuntimeError("not for this processor")

    monkeypatch.setattr(linear_module, "_onednn", refuses)
    assert not has_onednn.__wrapped__()


MANY_SHAPES = """
import psutil, torch
from ptuning.model.cpu.linear import Linear

memory = []
for width in (40, 48, 56):  # 250 shapes each
    frozen = Linear(24, width).requires_grad_(False)
    for rows in range(4, 254):
        frozen(torch.ones(rows, 24))
    memory.append(psutil.Process().memory_info().rss)
print(memory[2] - memory[1])
"""


@needs_onednn
def test_memory_stops_growing_with_the_number_of_shapes() -> None:
    unset = {name: value for name, value in os.environ.items() if name not in CACHED_SHAPES}
    done = subprocess.run(
        [sys.executable, "-c", MANY_SHAPES],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=unset,
    )
    assert int(done.stdout) < 40e6  # with 1,024 shapes kept: 92 to 100 MB


def test_the_output_can_be_changed_in_place(frozen):
    """peft's AdaLoRA adds its part to the output in place."""
    x = torch.randn(2, 5, 24, requires_grad=True)
    output = frozen(x)
    output += 1
    output.sum().backward()
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand_as(x))
