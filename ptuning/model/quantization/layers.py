"""Quantised layers under the published names, and the conversion of a model's layers to them.

The float weight is never kept: forward and backward dequantise the packed weight block by block, so
training a prefix through 28 layers stores only packed weights. Only the input receives a gradient.
Shapes: M rows of activations, num_out x num_in the weight of a linear, V vocabulary, E hidden size;
a packed row has num_in or E bytes, in int4 half as many.
"""

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ptuning.model.checkpoint.layout import TIED_SCALE
from ptuning.model.quantization.backends import AUTO, check_backend_name, pick_backend
from ptuning.model.quantization.reference import (
    QuantizedWeight,
    check_bits,
    dequantize_weight,
    packed_columns,
    quantize_in_blocks,
    quantize_weight,
)
from ptuning.storage import LAYER_LINEARS

# A custom operator is one node to a compiler; inside, device and dtype decide the back end.
_library = torch.library.Library("ptuning", "DEF")
_library.define(
    "quantized_product(Tensor x, Tensor packed, Tensor scale, int bits, str backend, bool backward)"
    " -> Tensor"
)


def _multiply(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, backend: str, backward: bool
) -> Tensor:
    """Return x (M, num_in) times the transposed weight; backward, x (M, num_out) times the weight.

    The product has x's dtype.
    """
    if not x.shape[0]:
        return _multiply_shape(x, packed, scale, bits, backend, backward)
    chosen = pick_backend(backend, x.device, x.dtype, bits)
    multiply = chosen.matmul_transposed if backward else chosen.matmul
    with torch.autocast(x.device.type, enabled=False):
        return multiply(x.contiguous(), packed, scale, bits)


@torch.library.register_fake("ptuning::quantized_product")
def _multiply_shape(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, backend: str, backward: bool
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[1] * (8 // bits) if backward else packed.shape[0])


_library.impl("quantized_product", _multiply, "CompositeExplicitAutograd")


class QuantizedProduct(torch.autograd.Function):
    """Multiply by the packed weight; the backward pass needs it and its scale, nothing float."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bits: int, backend: str
    ) -> Tensor:
        """Return (M, num_out) in x's dtype."""
        ctx.save_for_backward(packed, scale)
        ctx.options = (bits, backend)
        product: Tensor = torch.ops.ptuning.quantized_product(
            x, packed, scale, bits, backend, False
        )
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient of x (M, num_in)."""
        product = torch.ops.ptuning.quantized_product(grad, *ctx.saved_tensors, *ctx.options, True)
        return product, None, None, None, None


class PackedModule(nn.Module):
    """Holds a frozen packed weight: `.to(dtype)` changes neither weight nor weight_scale."""

    weight: nn.Parameter  # int8
    weight_scale: nn.Parameter  # float16

    def __init__(
        self, num_rows: int, num_columns: int, bits: int, device: torch.device | None
    ) -> None:
        super().__init__()
        self.bits = bits
        shape = (num_rows, packed_columns(num_columns, bits))
        packed = torch.zeros(shape, dtype=torch.int8, device=device)
        self._set(QuantizedWeight(packed, packed.new_zeros(num_rows, dtype=torch.float16)))

    def _set(self, quantized: QuantizedWeight) -> None:
        self.weight, self.weight_scale = _frozen(quantized.packed), _frozen(quantized.scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (rows, columns) in dtype."""
        return dequantize_weight(self.weight, self.weight_scale, self.bits, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if tensor is not self.weight_scale or converted.dtype == tensor.dtype:
                return converted
            return tensor.to(converted.device)

        return super()._apply(convert, recurse)


class QuantizedLinear(PackedModule):
    """Replaces nn.Linear; `backend` is a back end's name or "auto".

    Published names: weight, weight_scale, bias.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        bias: bool = True,
        backend: str = AUTO,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros, for published tensors to be loaded into; dtype is the bias's."""
        super().__init__(out_features, in_features, bits, device)
        self.in_features, self.out_features, self.backend = in_features, out_features, backend
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else _frozen(zeros))

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, backend: str = AUTO) -> Self:
        """Quantise linear on its device and copy its bias."""
        layer = cls.empty_like(linear, bits, backend, device=torch.device("meta"))
        layer._set(quantize_weight(linear.weight, bits))
        if linear.bias is not None:
            layer.bias = _frozen(linear.bias.detach().clone())
        return layer

    @classmethod
    def empty_like(
        cls, linear: nn.Linear, bits: int, backend: str = AUTO, device: torch.device | None = None
    ) -> Self:
        """Make a layer of zeros like linear, on device; None is linear's device."""
        return cls(
            linear.in_features,
            linear.out_features,
            bits=bits,
            bias=linear.bias is not None,
            backend=backend,
            device=linear.weight.device if device is None else device,
            dtype=linear.weight.dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), in x's dtype or the active autocast's."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input has width {x.shape[-1]}; this layer takes {self.in_features}."
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)  # (M, in_features)
        product = QuantizedProduct.apply(
            rows, self.weight, self.weight_scale, self.bits, self.backend
        )  # (M, out_features)
        if self.bias is not None:
            product = product.add_(self.bias.to(product.dtype))
        return product if x.dim() == 2 else product.unflatten(0, x.shape[:-1])  # (..., out)

    def extra_repr(self) -> str:
        """Describe the layer as print(model) shows it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, backend={self.backend}"
        )


class QuantizedEmbedding(PackedModule):
    """Replaces nn.Embedding; the output has the dtype of the last `.to(dtype)`.

    ChatGLM-6B's table is 130,528 x 4,096: 1.07 GB in float16, half of that in int8. A lookup
    dequantises only the rows asked for.
    """

    dtype_anchor: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int = 8,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a table of zeros that looks up in dtype."""
        super().__init__(num_embeddings, embedding_dim, bits, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        # Empty: every .to(dtype) converts it, so it holds the model's dtype.
        anchor = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("dtype_anchor", anchor, persistent=False)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, bits: int = 8) -> Self:
        """Quantise embedding on its device, a few rows at a time."""
        table = embedding.weight.detach()  # (V, E)
        result = cls(*table.shape, bits=bits, device=torch.device("meta"))
        result._set(quantize_in_blocks(table, bits))
        result.dtype_anchor = table.new_empty(0)
        return result

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids of any shape (...) to (..., E)."""
        packed, scale = self.weight[ids.flatten()], self.weight_scale[ids.flatten()]
        rows = dequantize_weight(packed, scale, self.bits, self.dtype_anchor.dtype)  # (M, E)
        return rows.unflatten(0, ids.shape) if ids.dim() != 1 else rows  # (..., E)

    def tied_head(self, backend: str = AUTO) -> QuantizedLinear:
        """Return an output head (E to V, no bias) with this table's weight and scale."""
        head = QuantizedLinear(
            self.embedding_dim,
            self.num_embeddings,
            bits=self.bits,
            bias=False,
            backend=backend,
            device=torch.device("meta"),
        )
        head.weight, head.weight_scale = self.weight, self.weight_scale
        return head

    def extra_repr(self) -> str:
        """Describe the table as print(model) shows it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


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


def quantize_model_(model: PreTrainedModel, bits: int, backend: str = AUTO) -> PreTrainedModel:
    """Quantise the four linears of each layer in place, as published, and nothing else."""
    return _replace_linears_(model, bits, backend, QuantizedLinear.from_linear)


def prepare_quantized_(model: PreTrainedModel, bits: int, backend: str = AUTO) -> PreTrainedModel:
    """Replace the layer linears by quantised ones of zeros, ready for published tensors.

    Nothing is allocated for a model built under `torch.device("meta")`.
    """
    return _replace_linears_(model, bits, backend, QuantizedLinear.empty_like)


def _replace_linears_(
    model: PreTrainedModel,
    bits: int,
    backend: str,
    convert: Callable[[nn.Linear, int, str], QuantizedLinear],
) -> PreTrainedModel:
    check_bits(bits)
    check_backend_name(backend)
    for name in layer_linear_names(model):
        linear = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, convert(linear, bits, backend))
    model.config.quantization_bit = bits
    return model


def quantize_embeddings_(model: PreTrainedModel, backend: str = AUTO) -> PreTrainedModel:
    """Make word embedding and output head int8 in place; they stay tied, or stay untied."""
    check_backend_name(backend)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"the embedding is a {type(embedding).__name__} and the head a {type(head).__name__}; "
            "quantise float ones (nn.Embedding, nn.Linear), once."
        )
    tied = head.weight is embedding.weight
    table = QuantizedEmbedding.from_embedding(embedding)
    model.set_input_embeddings(table)
    if tied:
        model.set_output_embeddings(table.tied_head(backend))
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **TIED_SCALE}
    else:
        model.set_output_embeddings(QuantizedLinear.from_linear(head, table.bits, backend))
    model.config.tie_word_embeddings = tied
    model.config.embedding_quantization_bit = table.bits
    return model
