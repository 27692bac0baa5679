"""Quantised linears and embeddings alone, and in whole models: gradients, dtypes, published numbers."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.quantization import reference
from ptuning.model.quantization.layers import (
    QuantizedEmbedding,
    QuantizedLinear,
    layer_linear_names,
    prepare_quantized_,
    quantize_embeddings_,
    quantize_model_,
)
from ptuning.model.quantization.reference import dequantize_weight, quantize_weight
from ptuning.storage import LAYER_LINEARS

Model = ChatGLMForConditionalGeneration
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
    assert products == ["ptuning.quantized_product.default"] * 2


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


@pytest.fixture
def float_table() -> nn.Embedding:
    """An embedding of 20 rows, 8 wide."""
    torch.manual_seed(0)
    return nn.Embedding(20, 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_looking_up_gives_the_dequantised_rows(float_table: nn.Embedding, bits: int) -> None:
    table = QuantizedEmbedding.from_embedding(float_table, bits)
    ids = torch.tensor([[0, 19, 3], [3, 3, 7]])
    rows = table(ids)
    dense = dequantize_weight(*quantize_weight(float_table.weight, bits), bits, torch.float32)
    assert rows.shape == (2, 3, 8)
    assert torch.equal(rows, dense[ids])
    assert torch.equal(table(ids[0]), dense[ids[0]])


def test_the_table_is_quantised_in_pieces_with_the_same_result(
    float_table: nn.Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = QuantizedEmbedding.from_embedding(float_table)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 7 * 8 * 4)  # seven rows
    pieces = QuantizedEmbedding.from_embedding(float_table)
    assert torch.equal(pieces.weight, whole.weight)
    assert torch.equal(pieces.weight_scale, whole.weight_scale)


def test_lookups_follow_the_models_dtype_and_the_scale_does_not(float_table: nn.Embedding) -> None:
    table = QuantizedEmbedding.from_embedding(float_table)
    ids = torch.tensor([1, 2])
    exact = table(ids)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        table.to(dtype)
        assert table.weight_scale.dtype == torch.float16
        assert torch.equal(table(ids), exact.to(dtype))


def test_the_tied_head_multiplies_by_the_same_storage(float_table: nn.Embedding) -> None:
    table = QuantizedEmbedding.from_embedding(float_table)
    head = table.tied_head()
    assert head.weight is table.weight
    assert head.weight_scale is table.weight_scale
    x = torch.randn(3, 8)
    dense = dequantize_weight(table.weight, table.weight_scale, 8, torch.float32)
    torch.testing.assert_close(head(x), x @ dense.T, rtol=1e-5, atol=1e-5)
    model = nn.ModuleList([table, head]).to(torch.bfloat16)
    assert model[0].weight is model[1].weight
    assert model[1].weight_scale.dtype == torch.float16


def test_a_table_says_what_it_is(float_table: nn.Embedding) -> None:
    assert (
        repr(QuantizedEmbedding.from_embedding(float_table)) == "QuantizedEmbedding(20, 8, bits=8)"
    )


def assert_published_numbers(model: Model, tensors: dict[str, Tensor], bits: int) -> None:
    inputs = {
        "input_ids": tensors["forward_prefix.input_ids"],
        "position_ids": tensors["forward_prefix.position_ids"],
    }
    with torch.no_grad():
        logits = model(**inputs).logits
        loss = model(**inputs, labels=tensors["forward_prefix.labels"]).loss
    real = inputs["input_ids"] != model.config.pad_token_id
    expected = tensors[f"forward_int{bits}.logits"]
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        loss, tensors[f"forward_int{bits}.loss"].squeeze(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("bits", BITS)
def test_quantising_on_the_fly_meets_the_published_logits(
    tiny_with_prefix: Model, tensors: dict[str, Tensor], bits: int
) -> None:
    quantize_model_(tiny_with_prefix, bits)
    assert tiny_with_prefix.config.quantization_bit == bits
    assert_published_numbers(tiny_with_prefix, tensors, bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_stored_tensors_meet_the_published_logits(
    tiny_with_prefix: Model, tensors: dict[str, Tensor], golden: Path, bits: int
) -> None:
    prepare_quantized_(tiny_with_prefix, bits)
    stored = load_file(golden / "chatglm-tiny" / f"model-int{bits}.safetensors")
    result = tiny_with_prefix.load_state_dict(stored, strict=False)
    assert all("prefix_encoder" in name or name == "lm_head.weight" for name in result.missing_keys)
    assert all("inv_freq" in name for name in result.unexpected_keys)
    assert_published_numbers(tiny_with_prefix, tensors, bits)


@pytest.mark.parametrize("bits", BITS)
def test_both_ways_hold_the_same_bytes(tiny: Model, golden: Path, bits: int) -> None:
    quantize_model_(tiny, bits)
    stored = load_file(golden / "chatglm-tiny" / f"model-int{bits}.safetensors")
    state = tiny.state_dict()
    names = [name for name, tensor in stored.items() if tensor.dtype == torch.int8]
    assert len(names) == 28 * len(LAYER_LINEARS)
    for name in names:
        assert torch.equal(state[name], stored[name]), name
        assert torch.equal(state[name + "_scale"], stored[name + "_scale"]), name


def test_only_the_four_linears_of_each_layer_are_replaced(small: Model) -> None:
    before = dict(small.named_modules())
    names = layer_linear_names(small)
    assert len(names) == 3 * 4
    quantize_model_(small, 8)
    for name, module in small.named_modules():
        assert isinstance(module, QuantizedLinear) == (name in names)
        assert name in names or module is before[name]


@pytest.mark.parametrize("bits", BITS)
def test_a_prefix_trains_on_a_quantised_base_as_on_its_dequantised_twin(
    small: Model, training_batch: dict[str, Tensor], bits: int
) -> None:
    quantize_model_(small, bits)
    twin = copy.deepcopy(small)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, QuantizedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features)
            dense.weight.data, dense.bias = layer.dequantize(), layer.bias
            twin.set_submodule(name, dense)
    gradients = []
    for model in (small, twin):
        model.freeze_base()
        model(**training_batch).loss.backward()
        assert model.prefix_encoder is not None
        gradients.append(model.prefix_encoder.embedding.weight.grad)
        assert all(value.grad is None for _, value in model.base_parameters())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_trains_a_quantised_base_the_same(
    small: Model, training_batch: dict[str, Tensor]
) -> None:
    quantize_model_(small, 4)
    small.freeze_base()
    small.transformer.prefix_encoder.dropout = 0.0
    gradients = []
    for checkpointing in (False, True):
        small.zero_grad()
        if checkpointing:
            small.gradient_checkpointing_enable({"use_reentrant": False})
        small.train()
        small(**training_batch).loss.backward()
        gradients.append(small.prefix_encoder.embedding.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_an_empty_quantised_model_allocates_nothing_on_meta(
    build_small: Callable[..., Model],
) -> None:
    with torch.device("meta"):
        model = prepare_quantized_(build_small(), 4)
    layer = model.get_submodule("transformer.layers.0.attention.query_key_value")
    assert layer.weight.is_meta
    assert layer.weight.shape == (96, 16)
    assert layer.weight_scale.dtype == torch.float16
    with pytest.raises(ValueError, match="0 float layer linears where 12"):
        quantize_model_(model, 4)


def test_what_cannot_be_quantised_is_refused_before_any_work(small: Model) -> None:
    with pytest.raises(ValueError, match="quantization_bit is 5"):
        quantize_model_(small, 5)
    with pytest.raises(ValueError, match="'quick'; use auto"):
        quantize_model_(small, 8, backend="quick")
    quantize_model_(small, 8)
    with pytest.raises(ValueError, match=r"0 float layer linears where 12 are needed \(.*: 8\)"):
        quantize_model_(small, 4)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_embedding_and_head_are_quantised_and_stay_tied_or_untied(
    build_small: Callable[..., Model],
    left_padded: dict[str, Tensor],
    tmp_path: Path,
    tie: bool,
    equal: bool,
) -> None:
    model = build_small()
    if tie:
        model.lm_head.weight = model.transformer.word_embeddings.weight
    elif equal:
        model.lm_head.weight.data = model.transformer.word_embeddings.weight.detach().clone()
    twin = copy.deepcopy(model)
    quantize_embeddings_(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    assert (head.weight is table.weight) == tie
    twin.transformer.word_embeddings.weight.data = table(torch.arange(64))
    twin.lm_head.weight.data = head.dequantize()
    with torch.no_grad():
        expected = twin(**left_padded).logits
        torch.testing.assert_close(model(**left_padded).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight_scale" in stored) == (not tie)
    assert stored["transformer.word_embeddings.weight"].dtype == torch.int8
    with pytest.raises(ValueError, match="quantise float ones"):
        quantize_embeddings_(model)
