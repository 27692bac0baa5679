"""Linear maps of a frozen base, with the fastest matrix products that PyTorch has on a CPU.

PyTorch multiplies float32 with MKL, which leaves half of the vector width of AMD's processors with
AVX-512 unused. oneDNN, which PyTorch carries for other types, uses all of it, on the weight as it
is stored; on a prepacked copy it is faster again, above all for a few rows. Without AVX-512 MKL is
ahead for many rows. docs/performance.md has the figures.
Shapes: T rows (tokens), I input features, O output features.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

GELU_LINEAR = 2 * math.sqrt(2 / math.pi)  # a; GELU's sqrt(2 / pi), doubled
GELU_CUBIC = GELU_LINEAR * 0.044715  # b
GELU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_ELEMENTS = 2**18  # of a GELU block: 1 MiB in float32
PREPACK_SHARE = 0.25  # of free memory that prepacked weights may take
MIN_ROWS = 4  # below, an unpacked weight is read from memory once and any product takes as long
MOST_ROWS_NARROW = 256  # without AVX-512, from here on a float32 product is MKL's

_plain_torch = False


@contextmanager
def plain_torch() -> Iterator[None]:
    """Use torch's own products and activation inside, as the published code did; to compare."""
    global _plain_torch
    before, _plain_torch = _plain_torch, True
    try:
        yield
    finally:
        _plain_torch = before


def prefers_plain_torch() -> bool:
    """Say whether torch's own operations are asked for, or needed by a compiler."""
    return _plain_torch or torch.compiler.is_compiling()


class PrepackedWeight(NamedTuple):
    """A copy of a frozen weight (O, I) in oneDNN's own layout, and what it was made of."""

    copy: Tensor
    source: Tensor
    state: tuple[Any, ...]


class Linear(nn.Linear):
    """nn.Linear with faster products on a CPU while its weight wants no gradient."""

    _prepacked: PrepackedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if not self._takes(x):
            return super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            # In two dimensions, where oneDNN's result is no view: autograd forbids changing a view
            # that a custom Function returned in place, and peft's AdaLoRA does.
            output: Tensor = _FrozenProduct.apply(x.reshape(-1, x.shape[-1]), self)
            return output.reshape(*x.shape[:-1], output.shape[-1])
        return self._multiply(x)

    def product(self, x: Tensor) -> Tensor:
        """Return x (..., I) times the weight transposed, plus the bias; autograd sees nothing."""
        if not self._takes(x):
            return functional.linear(x, self.weight, self.bias)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        packed = self.prepacked_weight()
        return _onednn(x, self.weight if packed is None else packed.copy, self.bias)

    def product_back(self, gradient: Tensor) -> Tensor:
        """Return gradient (..., O) times the weight (..., I): the gradient of `product`'s input."""
        is_float32 = gradient.dtype is torch.float32
        if not (is_float32 and self._takes(gradient) and has_avx512()):
            return gradient @ self.weight
        return _onednn(gradient, self.weight.t(), None)

    def prepack_(self) -> None:
        """Keep a copy of the weight in oneDNN's layout beside it.

        A weight that is changed, replaced, moved, cast or trained later drops its copy. What is
        written in place through `weight.data`, as peft's merge does, PyTorch cannot tell: pack anew
        after it.
        """
        copy = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        self._prepacked = PrepackedWeight(copy, self.weight, _state_of(self.weight))

    def prepacked_weight(self) -> PrepackedWeight | None:
        """Return the copy while it is that of the weight as it is now."""
        packed = self._prepacked
        if packed is None:
            return None
        weight = self.weight
        if packed.source is not weight or packed.state != _state_of(weight) or weight.requires_grad:
            self._prepacked = None
        return self._prepacked

    def _takes(self, x: Tensor) -> bool:
        """Say whether oneDNN is there, meant, and faster for this product."""
        return (
            not prefers_plain_torch()
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and self._gains(x)
            and not (torch.is_grad_enabled() and self._is_trained())
            and not torch.is_autocast_enabled("cpu")
            and has_onednn()
        )

    def _gains(self, x: Tensor) -> bool:
        """Say whether oneDNN is the faster one for so many rows."""
        is_packed = self.prepacked_weight() is not None
        if x.dtype is not torch.float32:
            return is_packed
        num_rows = x.numel() // x.shape[-1]
        is_few = num_rows < MOST_ROWS_NARROW or has_avx512()
        return is_few and (is_packed or num_rows >= MIN_ROWS)

    def _is_trained(self) -> bool:
        bias = self.bias
        return self.weight.requires_grad or (bias is not None and bias.requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> "Linear":
        """Move or cast, and drop the copy of what was there before."""
        super()._apply(fn, recurse)
        self.prepacked_weight()  # kept where nothing changed: trainers move a model to where it is
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed copy out of pickles and deep copies."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepacked"}


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    """Return what differs once a weight has other values or another form."""
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape


class _FrozenProduct(torch.autograd.Function):
    """The product of a frozen weight: only the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear) -> Tensor:
        ctx.linear = linear
        return linear._multiply(x)  # Linear.forward asked before

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.product_back(grad_outputs[0]), None


def prepack_weights_(model: nn.Module, *, room_bytes: int) -> int:
    """Pack the frozen linear maps of model that lie on the CPU, if the copies fit in room_bytes.

    A few rows at a time (decoding) are two to three times as fast, a training step 2 to 5 %.
    Returns the bytes that the copies take, 0 when there is nothing to pack or no room.
    """
    maps = [
        module
        for module in model.modules()
        if isinstance(module, Linear)
        and module.weight.device.type == "cpu"
        and can_prepack(module.weight.dtype)
        and not module.weight.requires_grad
    ]
    needed = sum(module.weight.nbytes for module in maps)
    if needed > room_bytes:
        return 0
    for module in maps:
        module.prepack_()
    return needed


def prepack_if_room(model: PreTrainedModel) -> int:
    """Pack a float model on the CPU if a quarter of the free memory is enough; return its bytes.

    A quantised model is meant to be small, so its float output head is not held twice.
    """
    if model.config.quantization_bit:
        return 0
    return prepack_weights_(
        model, room_bytes=int(PREPACK_SHARE * psutil.virtual_memory().available)
    )


def can_prepack(dtype: torch.dtype) -> bool:
    """Say whether this processor has packed products of a type."""
    if dtype is torch.bfloat16:
        return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32 and has_onednn()


@cache
def has_avx512() -> bool:
    """Say whether PyTorch computes with vectors of 512 bits here."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def has_onednn() -> bool:
    """Say whether this build of PyTorch has the oneDNN products, and they work here."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    products = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and all(hasattr(products, n) for n in names)):
        return False
    ones = torch.ones(4, 4)
    try:
        stored = _onednn(ones, ones.t(), None)
        packed = _onednn(ones, products._reorder_linear_weight(ones), None)
    except (RuntimeError, NotImplementedError):  # built, but not for this processor
        return False
    return torch.equal(stored, ones * 4) and torch.equal(packed, ones * 4)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight, bias, "none", [], ""
    )
    return result


def gelu(x: Tensor) -> Tensor:
    """Return 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), element by element.

    The tanh form of section 2 in https://arxiv.org/abs/1606.08415. PyTorch's CPU kernel spends its
    time in a tanh of full precision, in both passes. As 1 + tanh(z) is 2 sigmoid(2 z), the same
    function is x sigmoid(u) with u = a x + b x^3, which takes half the time in blocks that stay in
    the processor's cache; its slope s + (s - s^2) (3 u - 2 a x), s = sigmoid(u), is formed from the
    same numbers, so that the backward pass is one product.

    On a CPU the gradient is a number for |x| up to 1e12, where x^3 is one too.
    """
    if x.device.type != "cpu" or x.dtype not in GELU_DTYPES or prefers_plain_torch():
        return functional.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        output: Tensor = _GeluWithSlope.apply(x)
        return output
    return _gelu_in_blocks(x.contiguous(), None)


class _GeluWithSlope(torch.autograd.Function):
    """Keeps the slope in place of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        slope = torch.empty_like(x)
        ctx.save_for_backward(slope)
        return _gelu_in_blocks(x, slope)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] * ctx.saved_tensors[0]


def _gelu_in_blocks(x: Tensor, slope: Tensor | None) -> Tensor:
    """Return GELU of a contiguous x, and fill slope; the arithmetic is float32."""
    output = torch.empty_like(x)
    blocks = [x.view(-1).split(BLOCK_ELEMENTS), output.view(-1).split(BLOCK_ELEMENTS)]
    slopes = [None] * len(blocks[0]) if slope is None else slope.view(-1).split(BLOCK_ELEMENTS)
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
