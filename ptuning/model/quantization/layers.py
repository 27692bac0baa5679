"""A frozen int8 or int4 linear layer under the published names `weight`, `weight_scale` and `bias`.

The float weight is never kept: the backward pass converts the packed one again, so training a
prefix through 28 layers holds the packed weights and nothing else. Only the input receives a
gradient.
Shapes: out_features x in_features is the weight; packed columns are in_features, or half of them in
int4.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ptuning.model.quantization.backends import AUTO, pick_backend
from ptuning.model.quantization.reference import (
    check_bits,
    dequantize_weight,
    packed_columns,
    quantize_weight,
)

# Operators of their own, so that the compiler takes a product as one node: which back end runs it
# is settled inside, by device and dtype.
_library = torch.library.Library("ptuning", "DEF")
_library.define(
    "quantized_product(Tensor x, Tensor packed, Tensor scale, int bits, str backend) -> Tensor"
)
_library.define(
    "quantized_product_transposed(Tensor grad, Tensor packed, Tensor scale, int bits, str backend)"
    " -> Tensor"
)


def _multiply(x: Tensor, packed: Tensor, scale: Tensor, bits: int, backend: str) -> Tensor:
    """Return x (M, num_in) times the transposed weight: (M, num_out), in x's dtype."""
    if not x.shape[0]:
        return _multiply_shape(x, packed, scale, bits, backend)
    chosen = pick_backend(backend, x.device, x.dtype, bits)
    with torch.autocast(x.device.type, enabled=False):
        return chosen.matmul(x.contiguous(), packed, scale, bits)


def _multiply_shape(x: Tensor, packed: Tensor, scale: Tensor, bits: int, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def _multiply_transposed(
    grad: Tensor, packed: Tensor, scale: Tensor, bits: int, backend: str
) -> Tensor:
    """Return grad (M, num_out) times the weight: (M, num_in), in grad's dtype."""
    if not grad.shape[0]:
        return _multiply_transposed_shape(grad, packed, scale, bits, backend)
    chosen = pick_backend(backend, grad.device, grad.dtype, bits)
    with torch.autocast(grad.device.type, enabled=False):
        return chosen.matmul_transposed(grad.contiguous(), packed, scale, bits)


def _multiply_transposed_shape(
    grad: Tensor, packed: Tensor, scale: Tensor, bits: int, backend: str
) -> Tensor:
    return grad.new_empty(grad.shape[0], packed.shape[1] * (8 // bits))


for _name, _run, _shape in (
    ("quantized_product", _multiply, _multiply_shape),
    ("quantized_product_transposed", _multiply_transposed, _multiply_transposed_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ptuning::{_name}", _shape)


class QuantizedProduct(torch.autograd.Function):
    """Multiply by the packed weight; saves that and its scale, no float, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bits: int, backend: str
    ) -> Tensor:
        """Return (M, out_features) in x's dtype."""
        ctx.save_for_backward(packed, scale)
        ctx.bits, ctx.backend = bits, backend
        product: Tensor = torch.ops.ptuning.quantized_product(x, packed, scale, bits, backend)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient of x (M, in_features); nothing else is trained."""
        packed, scale = ctx.saved_tensors
        back = torch.ops.ptuning.quantized_product_transposed
        return back(grad, packed, scale, ctx.bits, ctx.backend), None, None, None, None


def keep_dtype(
    module: nn.Module, name: str, convert: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return convert, except that the parameter called name is moved without changing its dtype."""

    def convert_others(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        if tensor is not getattr(module, name) or converted.dtype == tensor.dtype:
            return converted
        return tensor.to(converted.device)

    return convert_others


class QuantizedLinear(nn.Module):
    """Replaces nn.Linear; weight stays int8, weight_scale float16, through every `.to(dtype)`.

    `backend` is a back end's name or "auto", which the product resolves by device and dtype.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
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
        """Make an empty layer, for published tensors to be loaded into; dtype is the bias's."""
        super().__init__()
        check_bits(bits)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.backend = bits, backend
        shape = (out_features, packed_columns(in_features, bits))
        self._set("weight", torch.zeros(shape, dtype=torch.int8, device=device))
        self._set("weight_scale", torch.zeros(out_features, dtype=torch.float16, device=device))
        if bias:
            self._set("bias", torch.zeros(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    def _set(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, backend: str = AUTO) -> Self:
        """Quantise linear where it lies; the result keeps a copy of its bias."""
        packed, scale = quantize_weight(linear.weight, bits)
        layer = cls.empty_like(linear, bits, backend, device=torch.device("meta"))
        layer._set("weight", packed)
        layer._set("weight_scale", scale)
        if linear.bias is not None:
            layer._set("bias", linear.bias.detach().clone())
        return layer

    @classmethod
    def empty_like(
        cls, linear: nn.Linear, bits: int, backend: str = AUTO, device: torch.device | None = None
    ) -> Self:
        """Make an empty layer of linear's sizes and dtype, on device or, when None, on linear's."""
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
        if x.device != self.weight.device:
            raise ValueError(
                f"the input is on {x.device} and the int{self.bits} weight on "
                f"{self.weight.device}; move one of them with .to(device)."
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)  # (M, in_features)
        product = QuantizedProduct.apply(
            rows, self.weight, self.weight_scale, self.bits, self.backend
        )
        if self.bias is not None:
            product = product.add_(self.bias.to(product.dtype))
        return product.unflatten(0, x.shape[:-1]) if x.dim() != 2 else product

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (out_features, in_features) in dtype."""
        return dequantize_weight(self.weight, self.weight_scale, self.bits, dtype)

    def extra_repr(self) -> str:
        """Describe the layer as print(model) shows it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, backend={self.backend}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_dtype(self, "weight_scale", fn), recurse)
