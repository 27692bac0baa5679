"""Turn a ChatGLM into its quantised form: on the fly from float weights, or emptied for published
int8/int4 tensors.

Only the four linears of each layer are touched, as published; embedding, output head, norms and
prefix are not.
"""

from typing import cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ptuning.model.quantization.embedding import QuantizedEmbedding
from ptuning.model.quantization.linear import QuantizedLinear
from ptuning.model.quantization.reference import check_bits
from ptuning.model.quantization.selection import AUTO, check_backend_name

LAYER_LINEARS = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
# A tied head shares the scale too; transformers must know, or it refuses to save the model.
TIED_SCALE = {"lm_head.weight_scale": "transformer.word_embeddings.weight_scale"}


def layer_linear_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the linears to quantise, in layer order; ValueError if any is missing."""
    found = [
        name
        for name, module in model.named_modules()
        if name.endswith(LAYER_LINEARS) and isinstance(module, nn.Linear)
    ]
    wanted = len(LAYER_LINEARS) * model.config.num_hidden_layers
    if len(found) != wanted:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} float layer linears where {wanted} are "
            f"needed (quantization_bit in its config: {model.config.quantization_bit}); "
            "quantise a float ChatGLM, once."
        )
    return found


def _names_to_convert(model: PreTrainedModel, bits: int, backend: str) -> list[str]:
    """Refuse wrong bits and unknown back ends before any work, then return the names."""
    check_bits(bits)
    check_backend_name(backend)
    return layer_linear_names(model)


def _float_module(model: PreTrainedModel, name: str, device: torch.device | None) -> nn.Module:
    """Return the named module on device (None: where it is); ValueError when it holds no values."""
    module = model.get_submodule(name)
    if module.weight.is_meta:
        raise ValueError(
            f"{name}.weight holds no values (it is on the meta device); "
            "load the weights, then quantise."
        )
    return module if device is None else module.to(device)


def quantize_model_(
    model: PreTrainedModel,
    bits: int,
    backend: str = AUTO,
    device: torch.device | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Quantise the layer linears in place, one by one, and record it in the config; return model.

    Each linear is moved to device (None: it stays where it is), quantised there and left there, so
    the device holds one float weight at most. What is not quantised stays put: call `.to(device)`
    afterwards.
    """
    names = _names_to_convert(model, bits, backend)
    for name in tqdm(names, desc=f"quantising to int{bits}", disable=not progress):
        linear = cast(nn.Linear, _float_module(model, name, device))
        model.set_submodule(name, QuantizedLinear.from_linear(linear, bits, backend))
    model.config.quantization_bit = bits
    return model


def prepare_quantized_(model: PreTrainedModel, bits: int, backend: str = AUTO) -> PreTrainedModel:
    """Replace the layer linears by empty quantised ones, ready for published tensors; return model.

    Works on a model built under `torch.device("meta")`, where nothing is allocated. Embedding,
    head, norms and prefix stay as they are.
    """
    for name in _names_to_convert(model, bits, backend):
        linear = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, QuantizedLinear.empty_like(linear, bits, backend))
    model.config.quantization_bit = bits
    return model


def quantize_embeddings_(
    model: PreTrainedModel,
    bits: int = 8,
    backend: str = AUTO,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Quantise the word embedding in place, and tie an equal output head to it; return model.

    A head with values of its own is quantised by itself, since it would otherwise be the largest
    float weight left.
    """
    check_bits(bits)
    check_backend_name(backend)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"the embedding is a {type(embedding).__name__} and the head a {type(head).__name__}; "
            "quantise float ones (nn.Embedding, nn.Linear), once."
        )
    if embedding.weight.is_meta or head.weight.is_meta:
        raise ValueError(
            "the embedding holds no values (it is on the meta device); load the weights first."
        )
    tied = head.weight is embedding.weight or torch.equal(head.weight, embedding.weight)
    if device is not None:
        embedding, head = embedding.to(device), head.to(device)
    table = QuantizedEmbedding.from_embedding(embedding, bits)
    model.set_input_embeddings(table)
    if tied:
        model.set_output_embeddings(table.tied_head(backend))
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **TIED_SCALE}
    else:
        model.set_output_embeddings(QuantizedLinear.from_linear(head, bits, backend))
    model.config.tie_word_embeddings = tied
    model.config.embedding_quantization_bit = bits
    return model
