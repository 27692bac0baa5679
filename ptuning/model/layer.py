"""One transformer layer: post-norm style, with a scaled skip that carries the normalised input.

Shapes: B batch, S tokens, E hidden size.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ptuning.model.activation import gelu
from ptuning.model.attention import Attention, LayerInputs
from ptuning.model.config import ChatGLMConfig
from ptuning.model.linear import Linear
from ptuning.model.packing import take_needed

# sqrt(2 * 28): the published code never passes the layer count to the block, so 28 holds at any
# depth.
SKIP_SCALE = 56**0.5


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
