"""The packed embedding and the head that shares its table."""

import pytest
import torch
from torch import nn

from ptuning.model.quantization import reference
from ptuning.model.quantization.embedding import QuantizedEmbedding
from ptuning.model.quantization.reference import dequantize_weight, quantize_weight


@pytest.fixture
def float_table() -> nn.Embedding:
    """An embedding of 20 rows, 8 wide."""
    torch.manual_seed(0)
    return nn.Embedding(20, 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_looking_up_gives_the_dequantised_rows(float_table: nn.Embedding, bits: int) -> None:
    table = QuantizedEmbedding.from_embedding(float_table, bits)
    ids = torch.tensor([[0, 19, 3], [3, 3, 7]])
    rows = table(ids)
    dense = dequantize_weight(*quantize_weight(float_table.weight, bits), bits, torch.float32)
    assert rows.shape == (2, 3, 8)
    assert torch.equal(rows, dense[ids])
    assert torch.equal(table(ids[0]), dense[ids[0]])


def test_the_table_is_quantised_in_pieces_with_the_same_result(
    float_table: nn.Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = QuantizedEmbedding.from_embedding(float_table)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 7 * 8 * 4)  # seven rows
    pieces = QuantizedEmbedding.from_embedding(float_table)
    assert torch.equal(pieces.weight, whole.weight)
    assert torch.equal(pieces.weight_scale, whole.weight_scale)


def test_lookups_follow_the_models_dtype_and_the_scale_does_not(float_table: nn.Embedding) -> None:
    table = QuantizedEmbedding.from_embedding(float_table)
    ids = torch.tensor([1, 2])
    exact = table(ids)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        table.to(dtype)
        assert table.weight_scale.dtype == torch.float16
        assert torch.equal(table(ids), exact.to(dtype))


def test_the_tied_head_multiplies_by_the_same_storage(float_table: nn.Embedding) -> None:
    table = QuantizedEmbedding.from_embedding(float_table)
    head = table.tied_head()
    assert head.weight is table.weight
    assert head.weight_scale is table.weight_scale
    x = torch.randn(3, 8)
    dense = dequantize_weight(table.weight, table.weight_scale, 8, torch.float32)
    torch.testing.assert_close(head(x), x @ dense.T, rtol=1e-5, atol=1e-5)
    model = nn.ModuleList([table, head]).to(torch.bfloat16)
    assert model[0].weight is model[1].weight
    assert model[1].weight_scale.dtype == torch.float16


def test_it_says_what_it_is(float_table: nn.Embedding) -> None:
    assert (
        repr(QuantizedEmbedding.from_embedding(float_table)) == "QuantizedEmbedding(20, 8, bits=8)"
    )
