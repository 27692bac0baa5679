"""Linear layers of a frozen base, and GELU, by the fastest operations PyTorch has on a CPU.

PyTorch multiplies float32 with MKL, which leaves half of the vector width of AMD's processors with
AVX-512 unused. oneDNN, which PyTorch ships for other types, uses all of it on the stored weight; on
a prepacked copy, in oneDNN's own layout, it is faster again, above all for a few rows. Without
AVX-512 MKL is ahead for many rows. docs/performance.md has the figures.
Shapes: T rows (tokens), I input features, O output features.
"""

import math
import os
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

PREPACK_SHARE = 0.25  # of free memory that prepacked weights may take
MIN_ROWS = 4  # below, reading the stored weight takes most of the time, whatever the product
MAX_ROWS_WITHOUT_AVX512 = 255  # above, MKL is faster for float32
# oneDNN, and PyTorch's wrapper of it, ideep, each keep 0.3 MB per shape multiplied, for up to 1,024
# shapes: 0.6 GB in training, where nearly every batch has another number of tokens. A shape that is
# no longer kept costs 0.3 ms. https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html
CACHED_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "64"}
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)  # a; GELU's sqrt(2 / pi), doubled
GELU_CUBIC = GELU_LINEAR * 0.044715  # b
GELU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GELU_BLOCK = 2**18  # elements: 1 MiB in float32


class Linear(nn.Linear):
    """nn.Linear with faster products on a CPU while its weight needs no gradient."""

    # The prepacked copy, the weight (O, I) it was made of, and that weight's state.
    _prepacked: tuple[Tensor, Tensor, tuple[Any, ...]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if not self._uses_onednn(x):
            return super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            # In two dimensions, where oneDNN's result is no view: autograd forbids changing a view
            # that a custom Function returned in place, and peft's AdaLoRA does.
            output: Tensor = _FrozenProduct.apply(x.reshape(-1, x.shape[-1]), self)  # (T, O)
            return output.reshape(*x.shape[:-1], output.shape[-1])  # (..., O)
        return self._multiply(x)

    def product(self, x: Tensor) -> Tensor:
        """Return what forward does, outside autograd."""
        if not self._uses_onednn(x):
            return functional.linear(x, self.weight, self.bias)
        return self._multiply(x)

    def product_back(self, gradient: Tensor) -> Tensor:
        """Return gradient (..., O) times the weight (..., I): the gradient of `product`'s input."""
        is_float32 = gradient.dtype is torch.float32
        if not (is_float32 and self._uses_onednn(gradient) and has_avx512()):
            return gradient @ self.weight
        return _onednn(gradient, self.weight.t(), None)

    def _multiply(self, x: Tensor) -> Tensor:
        prepacked = self.prepacked_weight()
        return _onednn(x, self.weight if prepacked is None else prepacked, self.bias)

    def prepack_(self) -> None:
        """Keep a prepacked copy next to the weight.

        It is dropped once the weight is changed, replaced, moved, cast or trained. PyTorch cannot
        detect what is written in place through `weight.data`, as peft's merge does: prepack again.
        """
        copy = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        self._prepacked = (copy, self.weight, _state_of(self.weight))

    def prepacked_weight(self) -> Tensor | None:
        """Return the prepacked copy if there is one and the weight has not changed since."""
        if self._prepacked is None:
            return None
        copy, source, state = self._prepacked
        weight = self.weight
        if source is weight and state == _state_of(weight) and not weight.requires_grad:
            return copy
        self._prepacked = None
        return None

    def _uses_onednn(self, x: Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and self._gains(x)
            and not (torch.is_grad_enabled() and self._is_trained())
            and not torch.is_autocast_enabled("cpu")
            and has_onednn()
        )

    def _gains(self, x: Tensor) -> bool:
        is_prepacked = self.prepacked_weight() is not None
        if x.dtype is not torch.float32:
            return is_prepacked
        num_rows = x.numel() // x.shape[-1]
        is_few = num_rows <= MAX_ROWS_WITHOUT_AVX512 or has_avx512()
        return is_few and (is_prepacked or num_rows >= MIN_ROWS)

    def _is_trained(self) -> bool:
        bias = self.bias
        return self.weight.requires_grad or (bias is not None and bias.requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> "Linear":
        super()._apply(fn, recurse)
        self.prepacked_weight()  # drops the copy if anything changed; trainers often move nothing
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the prepacked copy out of pickles and deep copies."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepacked"}


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape


class _FrozenProduct(torch.autograd.Function):
    """The product with a frozen weight: only the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear) -> Tensor:
        ctx.linear = linear
        return linear._multiply(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.product_back(grad_outputs[0]), None


def prepack_weights_(model: nn.Module, *, room_bytes: int) -> int:
    """Prepack the frozen linear layers on the CPU if the copies fit in room_bytes.

    Decoding, a few rows at a time, becomes two to three times as fast, a training step 2 to 5 %.
    Return the bytes of the copies, 0 if there is nothing to prepack or no room.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, Linear)
        and module.weight.device.type == "cpu"
        and can_prepack(module.weight.dtype)
        and not module.weight.requires_grad
    ]
    needed = sum(layer.weight.nbytes for layer in layers)
    if needed > room_bytes:
        return 0
    for layer in layers:
        layer.prepack_()
    return needed


def prepack_if_room(model: PreTrainedModel) -> int:
    """Prepack a float model if a quarter of the free memory suffices; return the bytes.

    A quantised model is meant to be small, so its float output head is not copied.
    """
    if model.config.quantization_bit:
        return 0
    return prepack_weights_(
        model, room_bytes=int(PREPACK_SHARE * psutil.virtual_memory().available)
    )


def can_prepack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has products of this type for this processor."""
    if dtype is torch.bfloat16:
        return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32 and has_onednn()


@cache
def has_avx512() -> bool:
    """Return whether PyTorch computes with 512-bit vectors here."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def has_onednn() -> bool:
    """Return whether this build of PyTorch has the oneDNN products, and they work here.

    Limits oneDNN's caches of shapes, unless the user set CACHED_SHAPES' variables.
    """
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    products = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and all(hasattr(products, n) for n in names)):
        return False
    for variable, capacity in CACHED_SHAPES.items():
        os.environ.setdefault(variable, capacity)  # read at the first product
    ones = torch.ones(4, 4)
    try:
        stored = _onednn(ones, ones.t(), None)
        prepacked = _onednn(ones, products._reorder_linear_weight(ones), None)
    except (RuntimeError, NotImplementedError):  # built, but not for this processor
        return False
    return torch.equal(stored, ones * 4) and torch.equal(prepacked, ones * 4)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight, bias, "none", [], ""
    )
    return result


def gelu(x: Tensor) -> Tensor:
    """Return 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), element by element.

    The tanh form of section 2 in https://arxiv.org/abs/1606.08415. PyTorch's CPU kernel spends its
    time in a full-precision tanh, in both passes. As 1 + tanh(z) is 2 sigmoid(2 z), the same
    function is x sigmoid(u) with u = a x + b x^3, which takes half the time in blocks that stay in
    the processor's cache. Its slope s + (s - s^2) (3 u - 2 a x), with s = sigmoid(u), comes from
    the same numbers, so the backward pass is one product.

    On a CPU the gradient is finite for |x| up to 1e12, where x^3 is.
    """
    if x.device.type != "cpu" or x.dtype not in GELU_DTYPES or torch.compiler.is_compiling():
        return functional.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        output: Tensor = _GeluWithSlope.apply(x)
        return output
    return _gelu_in_blocks(x.contiguous(), None)


class _GeluWithSlope(torch.autograd.Function):
    """Saves the slope instead of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = torch.empty_like(x, memory_format=torch.contiguous_format)
        ctx.save_for_backward(slope)
        return _gelu_in_blocks(x.contiguous(), slope)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] * ctx.saved_tensors[0]


def _gelu_in_blocks(x: Tensor, slope: Tensor | None) -> Tensor:
    """Return GELU of a contiguous x, and fill slope; the arithmetic is float32."""
    output = torch.empty_like(x)
    blocks = [x.view(-1).split(GELU_BLOCK), output.view(-1).split(GELU_BLOCK)]  # each (n,)
    slopes = [None] * len(blocks[0]) if slope is None else slope.view(-1).split(GELU_BLOCK)
    linear = torch.tensor(GELU_LINEAR)
    for source, target, slope_target in zip(*blocks, slopes, strict=True):
        exact = source.float()
        power = torch.addcmul(linear, exact, exact, value=GELU_CUBIC).mul_(exact)  # u
        if slope_target is None:
            target.copy_(power.sigmoid_().mul_(exact))
            continue
        third = torch.add(power, exact, alpha=-2 / 3 * GELU_LINEAR)  # u - 2/3 a x
        share = power.sigmoid_()  # s
        target.copy_(share * exact)
        bend = torch.addcmul(share, share, share, value=-1.0)  # s - s^2
        slope_target.copy_(share.addcmul_(bend, third, value=3.0))
    return output
