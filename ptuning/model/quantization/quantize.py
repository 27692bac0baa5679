"""Turn a ChatGLM into its quantised form: on the fly from float weights, or emptied for published
int8/int4 tensors.

Only the four linears of each layer are touched, as published; embedding, output head, norms and
prefix are not.
"""

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ptuning.model.checkpoint.layout import LAYER_LINEARS, TIED_SCALE
from ptuning.model.quantization.backends import AUTO, check_backend_name
from ptuning.model.quantization.embedding import QuantizedEmbedding
from ptuning.model.quantization.layers import QuantizedLinear
from ptuning.model.quantization.reference import check_bits


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


def quantize_model_(model: PreTrainedModel, bits: int, backend: str = AUTO) -> PreTrainedModel:
    """Quantise the layer linears where they are, and record it in the config; return model."""
    for name in _names_to_convert(model, bits, backend):
        linear = cast(nn.Linear, model.get_submodule(name))
        if linear.weight.is_meta:
            raise ValueError(
                f"{name}.weight holds no values (it is on the meta device); "
                "load the weights, then quantise."
            )
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
    model: PreTrainedModel, bits: int = 8, backend: str = AUTO
) -> PreTrainedModel:
    """Quantise the word embedding in place, and a tied output head with it; return model.

    A head of its own is quantised by itself, since it would otherwise be the largest
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
    tied = head.weight is embedding.weight
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
