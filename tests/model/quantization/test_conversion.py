"""Whole models: the published int8 and int4 logits, from the stored tensors and on the fly."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import LAYER_LINEARS
from ptuning.model.quantization.embedding import QuantizedEmbedding
from ptuning.model.quantization.layers import QuantizedLinear
from ptuning.model.quantization.quantize import (
    layer_linear_names,
    prepare_quantized_,
    quantize_embeddings_,
    quantize_model_,
)

Model = ChatGLMForConditionalGeneration
BITS = [4, 8]


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


def test_what_cannot_be_quantised_is_refused_before_any_work(
    small: Model, build_small: Callable[..., Model]
) -> None:
    with pytest.raises(ValueError, match="quantization_bit is 5"):
        quantize_model_(small, 5)
    with pytest.raises(ValueError, match="'quick'; use auto"):
        quantize_model_(small, 8, backend="quick")
    with torch.device("meta"):
        model = build_small()
    with pytest.raises(ValueError, match="on the meta device"):
        quantize_model_(model, 8)
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
