"""An int8 or int4 word embedding, and the output head that can share its packed table.

ChatGLM-6B's table is 130,528 x 4,096: 1.07 GB in float16, half of that in int8. Looking up converts
only the rows asked for; the head multiplies block by block. Neither ever forms the float table.
Shapes: V vocabulary, E hidden size; packed columns are E, or E / 2 in int4.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from ptuning.model.quantization.backends import AUTO
from ptuning.model.quantization.layers import QuantizedLinear, keep_dtype
from ptuning.model.quantization.reference import (
    check_bits,
    dequantize_weight,
    packed_columns,
    quantize_in_blocks,
)


class QuantizedEmbedding(nn.Module):
    """Replaces nn.Embedding; weight is int8, weight_scale float16, and the output follows
    `.to(dtype)`.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
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
        """Make an empty table that looks up in dtype."""
        super().__init__()
        check_bits(bits)
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        shape = (num_embeddings, packed_columns(embedding_dim, bits))
        packed = torch.zeros(shape, dtype=torch.int8, device=device)
        scale = torch.zeros(num_embeddings, dtype=torch.float16, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        # Empty; it goes through every .to(dtype), and so remembers which dtype the model is in.
        anchor = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("dtype_anchor", anchor, persistent=False)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, bits: int = 8) -> Self:
        """Quantise embedding where it is, a few rows at a time."""
        table = embedding.weight.detach()  # (V, E)
        packed, scale = quantize_in_blocks(table, bits)
        result = cls(*table.shape, bits=bits, device=torch.device("meta"))
        result.weight = nn.Parameter(packed, requires_grad=False)
        result.weight_scale = nn.Parameter(scale, requires_grad=False)
        result.dtype_anchor = table.new_empty(0)
        return result

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids of any shape (...) to (..., E)."""
        packed, scale = self.weight[ids.flatten()], self.weight_scale[ids.flatten()]
        rows = dequantize_weight(packed, scale, self.bits, self.dtype_anchor.dtype)
        return rows.unflatten(0, ids.shape) if ids.dim() != 1 else rows

    def tied_head(self, backend: str = AUTO) -> QuantizedLinear:
        """Return an output head (E to V, no bias) that holds this table's own packed weight and
        scale.
        """
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_dtype(self, "weight_scale", fn), recurse)
