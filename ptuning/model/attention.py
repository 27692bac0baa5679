"""Self-attention with an optional prefix of extra keys and values.

The prefix is joined outside the key/value cache, so that a cache holds real tokens only and a
prefix can be changed or left out at any call. Softmax runs in float32.
Shapes: B batch, S tokens, T real tokens of a packed batch, N needed ones, K = P + cached + S keys,
P prefix, H heads, D width of a head, E = H x D.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import Linear
from ptuning.model.cpu.packing import Packing, pack, take_needed, unpack
from ptuning.model.cpu.varlen_attention import PackedRows, attend_rows, read_rows
from ptuning.model.prefix_encoder import join_prefix
from ptuning.model.rotary import Rotation, rotate

# cuDNN's attention builds an execution plan for every new shape, about a second for forward and
# backward, and nearly every batch has a new length.
# https://github.com/modelscope/FunASR/issues/3704
CUDA_ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class LayerInputs(NamedTuple):
    """What every layer of one forward pass shares."""

    rotation: Rotation  # of the tokens in the hidden states: (B, S, D), or (1, T, D) if packed
    mask: Tensor | None  # (B or 1, 1, S, K), 0 for visible, else very low; None: all are visible
    prefix_dropout: float  # 0 outside training
    packing: Packing | None  # None: hidden states are (B, S, E); else (1, T, E), rows end to end
    rows: PackedRows | None = None  # with a packing on a CPU: attention in groups of rows


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bool visible (..., K) as summands of the scores: 0, or the lowest number of dtype.

    Row strides are padded to a multiple of 16 elements: fused CUDA kernels copy the mask at every
    call otherwise.
    """
    num_keys = visible.shape[-1]
    # torch.export could not leave the number of tokens open with the rounding.
    stride = num_keys if torch.compiler.is_exporting() else -(-num_keys // 16) * 16
    stored = visible.new_empty(*visible.shape[:-1], stride, dtype=dtype)
    mask = stored[..., :num_keys]
    mask.fill_(torch.finfo(dtype).min)
    return mask.masked_fill_(visible, 0.0)


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
    """Return the output (B, H, S, D) of PyTorch's fused attention; on CUDA not by cuDNN."""
    if query.device.type != "cuda":
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with sdpa_kernel(CUDA_ATTENTION):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


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

        only_needed leaves out the packed tokens whose output is not read: (1, N, E).
        """
        fused = self.query_key_value(hidden_states)  # (B, S, 3E)
        if shared.packing is not None and shared.rows is not None:
            output = self._attend_rows(fused, prefix, shared, past_key_values)
            if only_needed:
                output = take_needed(output, shared.packing)
            return self.dense(output), None
        heads = fused.unflatten(-1, (self.num_heads, 3, -1))  # (B, S, H, 3, D), or (1, T, ...)
        parts = rotate(heads, shared.rotation).unbind(3)  # (B, S, H, D) each, or (1, T, H, D)
        if shared.packing is not None:
            # One by one: what keeps the queries for the backward pass keeps nothing else then.
            parts = tuple(unpack(part, shared.packing) for part in parts)
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
        if shared.packing is not None:
            output = pack(output, shared.packing, only_needed=only_needed)
        return self.dense(output), weights

    def _attend_rows(
        self,
        fused: Tensor,
        prefix: Tensor | None,
        shared: LayerInputs,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Return the output (1, T, E); a cache gets keys and values end to end, (1, H, T, D)."""
        assert shared.rows is not None, "asked before"
        if past_key_values is None:
            dropout = shared.prefix_dropout
            return attend_rows(
                fused, prefix, shared.rows, num_heads=self.num_heads, dropout=dropout
            )
        output, key, value = read_rows(fused, prefix, shared.rows, num_heads=self.num_heads)
        past_key_values.update(key.unsqueeze(0), value.unsqueeze(0), self.layer_index)
        return output
