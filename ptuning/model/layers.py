"""One transformer layer: post-norm style, with a scaled skip that carries the normalised input.

Shapes: B batch, S tokens, E hidden size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ptuning.model.attention import Attention, LayerInputs
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import Linear, prefers_plain_torch
from ptuning.model.cpu.packing import take_needed

# sqrt(2 * 28): the published code never passes the layer count to the block, so 28 holds at any
# depth.
SKIP_SCALE = 56**0.5
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)  # a; GELU's sqrt(2 / pi), doubled
GELU_CUBIC = GELU_LINEAR * 0.044715  # b
BLOCK_ELEMENTS = 2**18  # of a GELU block: 1 MiB in float32
GELU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FeedForward(nn.Module):
    """Two linear maps around the tanh form of GELU, under the published names."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, S, E) to (B, S, E)."""
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(hidden_states)))


class Layer(GradientCheckpointingLayer):
    """Attention and feed-forward; gradient checkpointing recomputes it in the backward pass."""

    def __init__(self, config: ChatGLMConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Attention(config, layer_index)
        self.post_attention_layernorm = nn.LayerNorm(
            config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mlp = FeedForward(config)

    def forward(
        self,
        hidden_states: Tensor,
        shared: LayerInputs,
        prefix: Tensor | None,
        past_key_values: Cache | None = None,
        only_needed: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the next hidden states (B, S, E) and the attention weights, None unless eager.

        With a packing the states are (1, T, E); only_needed makes them (1, N, E).
        """
        normalised = self.input_layernorm(hidden_states)
        attended, weights = self.attention(
            normalised, shared, prefix, past_key_values, only_needed=only_needed
        )
        if only_needed and shared.packing is not None:
            normalised = take_needed(normalised, shared.packing)
        hidden_states = torch.add(attended, normalised, alpha=SKIP_SCALE)
        normalised = self.post_attention_layernorm(hidden_states)
        return torch.add(self.mlp(normalised), normalised, alpha=SKIP_SCALE), weights


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
