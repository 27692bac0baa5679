"""Prefix encoder: the only trained weights in P-Tuning v2.

Each prefix token owns one key and one value per layer, placed before the real tokens' keys.
Sources: Liu et al. 2021, https://arxiv.org/abs/2110.07602, section 3; PrefixEncoder in
https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/modeling_chatglm.py
Shapes: P prefix tokens, B batch, L layers, H heads, D width of a head, E = H x D.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class PrefixTable(nn.Embedding):
    """The (P, ...) table of prefix entries, the only embedding that is initialised from N(0, 1)."""


class PrefixLinear(nn.Linear):
    """A linear layer of the projection, which keeps nn.Linear's default initialisation."""


class PrefixEncoder(nn.Module):
    """Trained table of prefix keys and values, with or without a two-layer projection.

    State-dict keys are the published ones: `embedding.weight` (P, 2*L*E), or with projection
    `embedding.weight` (P, E), `trans.0.{weight,bias}` and `trans.2.{weight,bias}`. They are float32
    in a model of any type.
    """

    def __init__(
        self,
        *,
        prefix_length: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        project: bool,
    ) -> None:
        super().__init__()
        if prefix_length < 1:
            raise ValueError(f"prefix_length is {prefix_length}; use 1 or more.")
        self.prefix_length = prefix_length
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.project = project
        self.dropout = 0.1  # of the prefix alone, as in the published code
        hidden_size = num_heads * head_dim
        table_width = 2 * num_layers * hidden_size
        entry_width = hidden_size if project else table_width
        # A model that loads in half precision is also built in it, hence the explicit dtype.
        self.embedding = PrefixTable(prefix_length, entry_width, dtype=torch.float32)
        self.trans: nn.Sequential | None = None
        if project:
            self.trans = nn.Sequential(
                PrefixLinear(hidden_size, hidden_size, dtype=torch.float32),
                nn.Tanh(),
                PrefixLinear(hidden_size, table_width, dtype=torch.float32),
            )

    @torch.no_grad()
    def scale_entries(self, factor: float) -> None:
        """Multiply the keys and values; with a projection, through its last layer."""
        last = self.embedding if self.trans is None else self.trans[2]
        for parameter in last.parameters():
            parameter.mul_(factor)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return L tensors (2, 1, H, P, D) in dtype: [0] holds keys, [1] values; 1 broadcasts."""
        table = self.embedding.weight  # (P, 2*L*E), or (P, E) before the projection
        if self.trans is not None:
            table = self.trans(table)
        # Cast first: the backward pass then permutes in dtype, in half the memory of float32.
        table = table.to(dtype)
        table = table.view(-1, 2 * self.num_layers, self.num_heads, self.head_dim)  # (P, 2*L, H, D)
        table = table.permute(1, 2, 0, 3)  # (2*L, H, P, D)
        return table.contiguous().unsqueeze(1).split(2)  # L x (2, 1, H, P, D)


def join_prefix(
    prefix: Tensor, keys: Tensor, values: Tensor, *, dropout: float
) -> tuple[Tensor, Tensor]:
    """Prepend one layer's prefix (2, 1 or B, H, P, D) to keys and values: (B, H, P + S, D) each.

    dropout > 0 draws a mask for each row, as the published code does. In training on a CPU
    `ptuning.model.cpu.varlen_attention` does both without the copy.
    """
    prefix = prefix.to(keys.dtype).expand(-1, keys.shape[0], -1, -1, -1)  # (2, B, H, P, D)
    if dropout > 0.0:
        prefix = functional.dropout(prefix, dropout)
    # One backward node for both halves: indexing each would fill a gradient of zeros for the other.
    prefix_keys, prefix_values = prefix.unbind(0)
    return torch.cat((prefix_keys, keys), dim=2), torch.cat((prefix_values, values), dim=2)
