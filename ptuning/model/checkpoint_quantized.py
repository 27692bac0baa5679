"""What a quantised checkpoint needs of a model; float weights quantised as they are read.

A model is built empty in the form its configuration names, so that the stored tensors fit; that is
true of a slim release and of a float checkpoint loaded with quantization_bit alike. The layers and
their back ends are imported when one is. Letters: V vocabulary, E hidden size.
"""

import threading
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptuning.model.checkpoint_layout import SCALE_SUFFIX, TIED_SCALE, packed_shape
from ptuning.model.checkpoint_tensors import CheckpointReader, SharedResult, StoredTensor
from ptuning.model.quantization.reference import quantize_in_blocks


def prepare_for_config_(model: PreTrainedModel) -> None:
    """Give a new model the empty quantised layers its configuration calls for, if any.

    With embedding_quantization_bit the (V, E) embedding and the head are packed as well, and tying
    them means their scales too.
    """
    config = model.config
    if not (config.quantization_bit or config.embedding_quantization_bit):
        return
    from ptuning.model.quantization.conversion import prepare_quantized_
    from ptuning.model.quantization.embedding import QuantizedEmbedding
    from ptuning.model.quantization.linear import QuantizedLinear

    if config.quantization_bit:
        prepare_quantized_(model, config.quantization_bit)
    if config.embedding_quantization_bit:
        bits = config.embedding_quantization_bit
        table = cast(nn.Embedding, model.get_input_embeddings())
        device, dtype = table.weight.device, table.weight.dtype
        size = (table.num_embeddings, table.embedding_dim)
        model.set_input_embeddings(QuantizedEmbedding(*size, bits=bits, device=device, dtype=dtype))
        head = cast(nn.Linear, model.get_output_embeddings())
        model.set_output_embeddings(QuantizedLinear.empty_like(head, bits))
        model._tied_weights_keys = {**model._tied_weights_keys, **TIED_SCALE}


def set_backend_(model: PreTrainedModel, backend: str) -> None:
    """Let every quantised layer of the model run on this back end; ValueError if unknown."""
    from ptuning.model.quantization.linear import QuantizedLinear
    from ptuning.model.quantization.selection import check_backend_name

    check_backend_name(backend)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.backend = backend


def quantized_when_read(
    reader: CheckpointReader,
    name: str,
    bits: int,
    *,
    device: torch.device | None,
    turn: threading.Lock,
) -> dict[str, StoredTensor]:
    """Return the packed weight and its scales in place of a float weight, neither computed yet.

    Each weight is moved to device (None is the CPU) and quantised there; turn is shared by all of
    them, so that one float weight is in memory at a time however many threads read.
    """

    def compute() -> tuple[Tensor, Tensor]:
        with turn:
            try:
                return quantize_in_blocks(reader.read(name).to(device), bits)
            except ValueError as error:
                raise ValueError(f"{reader.headers[name].file}: {name}: {error}") from error

    shape = reader.headers[name].shape
    pair = SharedResult(compute)
    weight = StoredTensor(torch.int8, packed_shape(shape, bits), lambda: pair.take(0))
    scale = StoredTensor(torch.float16, shape[:1], lambda: pair.take(1))
    return {name: weight, name + SCALE_SUFFIX: scale}
