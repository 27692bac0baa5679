"""Self-attention with an optional prefix of extra keys and values.

The prefix is joined outside the key/value cache: a cache holds real tokens only, and any call can
change the prefix or leave it out. Eager attention computes the softmax in float32.
Shapes: B batch, S tokens of this call, T real tokens of all rows, N tokens whose output is read,
K = P + C keys: the prefix, cached tokens and these, H heads, D head width, E = H x D.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import Linear
from ptuning.model.cpu.varlen_attention import VarlenRows, varlen_attention, varlen_prefill
from ptuning.model.positions import (
    FlatLayout,
    Rotation,
    flatten_rows,
    keep_needed,
    rotate,
    unflatten_rows,
)
from ptuning.model.prefix_encoder import join_prefix

# cuDNN's attention builds an execution plan for each new shape, about a second for forward and
# backward, and nearly every batch has a new length.
# https://github.com/modelscope/FunASR/issues/3704
CUDA_ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class LayerInputs(NamedTuple):
    """What all layers of one forward pass share."""

    rotation: Rotation  # of the tokens in the hidden states: (B, S, D), or (1, T, D) if flat
    mask: Tensor | None  # (B or 1, 1, S, K), 0 where visible, else very low; None: all visible
    prefix_dropout: float  # 0 outside training
    layout: FlatLayout | None  # None: hidden states are (B, S, E); else flat, (1, T, E)
    rows: VarlenRows | None = None  # with a layout on a CPU: attention without a grid


class Attention(nn.Module):
    """One layer's self-attention, under the published names `query_key_value` and `dense`."""

    def __init__(self, config: ChatGLMConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        shared: LayerInputs,
        prefix: Tensor | None,
        past_key_values: Cache | None,
        only_needed: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, shaped as the input, and the weights (B, H, S, K), None unless eager.

        prefix is (2, 1 or B, H, P, D). only_needed drops flat tokens whose output is not read:
        (1, N, E).
        """
        fused = self.query_key_value(hidden_states)  # (B, S, 3E)
        if shared.layout is not None and shared.rows is not None:
            output = self._attend_varlen(fused, prefix, shared, shared.rows, past_key_values)
            if only_needed:
                output = keep_needed(output, shared.layout)  # (1, N, E)
            return self.dense(output), None
        heads = fused.unflatten(-1, (self.num_heads, 3, -1))  # (B, S, H, 3, D), or (1, T, ...)
        parts = rotate(heads, shared.rotation).unbind(3)  # (B, S, H, D) each, or (1, T, H, D)
        if shared.layout is not None:
            # Separately, so that saving the queries for the backward pass saves nothing else.
            parts = tuple(unflatten_rows(part, shared.layout) for part in parts)  # (B, S, H, D)
        query, key, value = (part.transpose(1, 2) for part in parts)  # (B, H, S, D) each
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)
        if prefix is not None:
            key, value = join_prefix(prefix, key, value, dropout=shared.prefix_dropout)
        weights = None
        if self.config._attn_implementation == "eager":
            output, weights = eager_attention(query, key, value, shared.mask)
        else:
            output = fused_attention(query, key, value, shared.mask)
        output = output.transpose(1, 2).flatten(2)  # (B, S, E)
        if shared.layout is not None:
            output = flatten_rows(output, shared.layout, only_needed=only_needed)  # (1, T or N, E)
        return self.dense(output), weights

    def _attend_varlen(
        self,
        fused: Tensor,
        prefix: Tensor | None,
        shared: LayerInputs,
        rows: VarlenRows,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Return the output (1, T, E); a cache gets keys and values end to end, (1, H, T, D)."""
        if past_key_values is None:
            dropout = shared.prefix_dropout
            return varlen_attention(fused, prefix, rows, num_heads=self.num_heads, dropout=dropout)
        output, key, value = varlen_prefill(fused, prefix, rows, num_heads=self.num_heads)
        past_key_values.update(key.unsqueeze(0), value.unsqueeze(0), self.layer_index)
        return output


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, S, D) and the weights (B, H, S, K), step by step in float32."""
    query_scaled = query.float() * query.shape[-1] ** -0.5
    scores = query_scaled @ key.float().transpose(-1, -2)  # (B, H, S, K)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1).to(query.dtype)
    return weights @ value, weights


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the output (B, H, S, D) of PyTorch's fused attention, on CUDA not cuDNN's."""
    if query.device.type != "cuda":
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with sdpa_kernel(CUDA_ATTENTION):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
