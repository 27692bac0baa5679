"""The frozen linear: its gradient, what it saves for the way back, and what survives moves and copies."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ptuning.model.quantization.layers import QuantizedLinear

BITS = [4, 8]


@pytest.fixture(params=BITS)
def layer(request: pytest.FixtureRequest, make_linear: Callable[..., nn.Linear]) -> QuantizedLinear:
    """A quantised linear from 16 to 24 with a bias."""
    return QuantizedLinear.from_linear(make_linear(16, 24), request.param)


def dense(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return functional.linear(x, layer.dequantize(), layer.bias)


def test_it_computes_what_the_dequantised_linear_does_forward_and_back(
    layer: QuantizedLinear,
) -> None:
    x = torch.randn(2, 3, 16, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    result, expected = layer(x), dense(layer, twin)
    assert result.shape == (2, 3, 24)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(result)
    result.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-6)
    assert [parameter.grad for parameter in layer.parameters()] == [None, None, None]


def test_the_gradient_is_the_finite_difference(layer: QuantizedLinear) -> None:
    """The map is linear, so a difference over a step of 1 is exact but for float32's rounding."""
    x = torch.randn(1, 16, requires_grad=True)
    direction = torch.randn(24)
    (layer(x) @ direction).sum().backward()
    steps = torch.eye(16)
    with torch.no_grad():
        differences = (layer(x + steps) - layer(x)) @ direction
    torch.testing.assert_close(x.grad[0], differences, rtol=1e-4, atol=1e-4)


def test_nothing_float_of_the_weight_is_saved_for_the_way_back(layer: QuantizedLinear) -> None:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(5, 16, requires_grad=True))
    assert [(tensor.dtype, tensor.shape) for tensor in saved] == [
        (torch.int8, layer.weight.shape),
        (torch.float16, layer.weight_scale.shape),
    ]
    assert {tensor.data_ptr() for tensor in saved} == {
        layer.weight.data_ptr(),
        layer.weight_scale.data_ptr(),
    }


def test_a_compiler_sees_one_operator_and_no_break(layer: QuantizedLinear) -> None:
    """The back end is chosen inside the operator, where nothing is traced."""
    nodes: list[str] = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    x = torch.randn(5, 16, requires_grad=True)
    result = compiled(x)
    result.sum().backward()
    twin = x.detach().clone().requires_grad_()
    expected = layer(twin)
    expected.sum().backward()
    assert torch.equal(result, expected)
    assert torch.equal(x.grad, twin.grad)
    products = [name for name in nodes if name.startswith("ptuning.")]
    assert products == [
        "ptuning.quantized_product.default",
        "ptuning.quantized_product_transposed.default",
    ]


def test_gradient_checkpointing_gives_the_same_gradient(layer: QuantizedLinear) -> None:
    x = torch.randn(4, 16, requires_grad=True)
    layer(x).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    checkpoint(layer, twin, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, twin.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_inputs_dtype_whatever_the_bias_has(
    layer: QuantizedLinear, dtype: torch.dtype
) -> None:
    x = torch.randn(3, 16).to(dtype).requires_grad_()
    result = layer(x)
    assert result.dtype == dtype
    result.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_under_autocast_it_computes_in_autocasts_dtype_as_nn_linear_does(
    layer: QuantizedLinear,
) -> None:
    x = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
        assert result.dtype == nn.Linear(16, 24)(x).dtype == torch.bfloat16
    result.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_no_rows_give_no_rows_and_a_gradient(layer: QuantizedLinear) -> None:
    x = torch.randn(0, 16, requires_grad=True)
    result = layer(x)
    assert result.shape == (0, 24)
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 16)


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.float(),
        lambda module: module.to("cpu", torch.float64),
    ],
    ids=["bfloat16", "half", "float", "float64"],
)
def test_dtype_moves_change_the_bias_and_neither_codes_nor_scale(
    layer: QuantizedLinear, convert: Callable[[nn.Module], nn.Module]
) -> None:
    packed, scale = layer.weight.clone(), layer.weight_scale.clone()
    model = nn.Sequential(layer, nn.LayerNorm(24))
    convert(model)
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.dtype == torch.float16
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer.weight_scale, scale)
    assert layer.bias is not None
    assert layer.bias.dtype == model[1].weight.dtype
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_device_move_takes_everything_along(layer: QuantizedLinear) -> None:
    layer.to("meta")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.dtype == torch.float16


def test_copies_and_pickles_compute_the_same(layer: QuantizedLinear) -> None:
    x = torch.randn(3, 16)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    restored = torch.load(stored, weights_only=False)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(restored(x), layer(x))


def test_state_dict_has_the_published_names_and_dtypes(layer: QuantizedLinear) -> None:
    state = layer.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.int8,
        "weight_scale": torch.float16,
        "bias": torch.float32,
    }
    empty = QuantizedLinear(16, 24, bits=layer.bits)
    empty.load_state_dict(state)
    x = torch.randn(3, 16)
    assert torch.equal(empty(x), layer(x))


def test_it_says_what_it_is(layer: QuantizedLinear) -> None:
    assert repr(layer) == (
        f"QuantizedLinear(in_features=16, out_features=24, bias=True, bits={layer.bits}, backend=auto)"
    )


def test_wrong_inputs_are_named(layer: QuantizedLinear) -> None:
    with pytest.raises(ValueError, match="width 8; this layer takes 16"):
        layer(torch.randn(2, 8))
    with pytest.raises(ValueError, match="input is on meta and the int"):
        layer(torch.randn(2, 16, device="meta"))
    with pytest.raises(ValueError, match="activations are float64; use one of float32"):
        layer(torch.randn(2, 16, dtype=torch.float64))


def test_a_float_linear_and_its_quantised_form_share_no_storage(
    make_linear: Callable[..., nn.Linear],
) -> None:
    linear = make_linear(16, 24)
    layer = QuantizedLinear.from_linear(linear, 8)
    expected = layer(torch.ones(1, 16))
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(layer(torch.ones(1, 16)), expected)
