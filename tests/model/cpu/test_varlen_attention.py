"""Attention row by row is that of the padded grid: output, gradients, and the dropout's statistics."""

import pytest
import torch

from ptuning.model.chatglm import ChatGLMModel
from ptuning.model.cpu.varlen_attention import (
    draw_keep_mask,
    find_rows,
    group_rows,
    varlen_attention,
)
from ptuning.model.positions import (
    additive_mask,
    find_layout,
    inverse_frequencies,
    rotate,
    rotation_at,
)

H, D, P = 2, 16, 3
LENGTHS = (5, 7, 2)


def padded_mask(side):
    longest = max(LENGTHS)
    real = torch.zeros(len(LENGTHS), longest, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        real[row, :length] = 1
    return real if side == "right" else real.flip(1)


def case(side, prefix_rows, seed=0):
    """Return fused (1, T, 3E), prefix, the rows, and what a plain computation needs."""
    torch.manual_seed(seed)
    real = padded_mask(side)
    num_rows, longest = real.shape
    layout = find_layout(real, None)
    positions = torch.randint(0, 9, (num_rows, 2, longest))
    rotation = rotation_at(positions, inverse_frequencies(D))
    visible = torch.rand(num_rows, 1, longest, longest) < 0.7
    visible |= torch.eye(longest, dtype=torch.bool)
    rows = find_rows(
        layout,
        additive_mask(visible, torch.float32),
        rotation,
        num_heads=H,
        prefix_length=P if prefix_rows else 0,
    )
    fused = torch.randn(1, sum(LENGTHS), 3 * H * D, requires_grad=True)
    prefix = torch.randn(2, prefix_rows, H, P, D, requires_grad=True) if prefix_rows else None
    return fused, prefix, rows, (layout, rotation, visible)


def plain(fused, prefix, given, keep=None, dropout=0.0):
    """The same by the book: the grid, one row at a time, softmax over visible keys."""
    layout, rotation, visible = given
    longest = layout.shape[1]
    output = []
    for row in range(layout.shape[0]):
        own = layout.tokens // longest == row
        columns = layout.tokens[own] % longest
        heads = fused[:, own].unflatten(-1, (H, 3, D))  # (1, S, H, 3, D)
        turn = type(rotation)(*(angle[row, columns][None] for angle in rotation))
        query, key, value = rotate(heads, turn)[0].transpose(0, 1).unbind(2)  # (H, S, D) each
        seen = visible[row, 0][columns][:, columns]
        if prefix is not None:
            mine = prefix[:, min(row, prefix.shape[1] - 1)]
            if keep is not None:
                mine = mine * keep[:, row] / (1 - dropout)
            key, value = torch.cat((mine[0], key), 1), torch.cat((mine[1], value), 1)
            seen = torch.cat((torch.ones(len(seen), P, dtype=torch.bool), seen), 1)
        scores = (query @ key.transpose(1, 2)) / D**0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        output.append((weights @ value).transpose(0, 1).flatten(1))
    return torch.cat(output)[None]


def gradients(output, *inputs):
    torch.manual_seed(9)
    upstream = torch.randn_like(output)
    return torch.autograd.grad(output, [x for x in inputs if x is not None], upstream)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prefix_rows", [0, 1, 3])
def test_output_and_gradients_are_those_of_plain_attention(side, prefix_rows):
    fused, prefix, rows, given = case(side, prefix_rows)
    output = varlen_attention(fused, prefix, rows, num_heads=H, dropout=0.0)
    expected = plain(fused, prefix, given)
    torch.testing.assert_close(output, expected)
    for got, wanted in zip(
        gradients(output, fused, prefix), gradients(expected, fused, prefix), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dropout_zeroes_the_same_entries_in_every_type(dtype):
    fused, prefix, rows, _ = case("right", 1)
    exact = []
    for kind in (torch.float32, dtype):
        torch.manual_seed(5)
        inputs = fused.detach().to(kind), prefix.detach().to(kind)
        exact.append(varlen_attention(*inputs, rows, num_heads=H, dropout=0.5))
    assert exact[1].dtype == dtype
    torch.testing.assert_close(exact[1].float(), exact[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("prefix_rows", [1, 3])
def test_dropout_is_on_the_prefix_alone_and_in_the_gradient_too(prefix_rows):
    fused, prefix, rows, given = case("right", prefix_rows)
    torch.manual_seed(5)
    output = varlen_attention(fused, prefix, rows, num_heads=H, dropout=0.5)
    torch.manual_seed(5)
    drawn = draw_keep_mask((2, len(LENGTHS), H, P, D), 0.5) != 0
    assert 0 < drawn.sum() < drawn.numel()
    keep = torch.empty_like(drawn)
    for group in rows.groups:  # masks are drawn group by group
        keep[:, group.rows] = drawn[:, group.members]
    expected = plain(fused, prefix, given, keep, 0.5)
    torch.testing.assert_close(output, expected)
    for got, wanted in zip(
        gradients(output, fused, prefix), gradients(expected, fused, prefix), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_a_frozen_input_has_no_gradient_and_the_prefix_still_has_its_own():
    fused, prefix, rows, given = case("right", 1)
    fused.requires_grad_(False)
    (got,) = gradients(varlen_attention(fused, prefix, rows, num_heads=H, dropout=0.0), prefix)
    (wanted,) = gradients(plain(fused, prefix, given), prefix)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("prefix_rows", [0, 1, 5])
@pytest.mark.parametrize("prefix_length", [3, 32])
def test_rows_in_groups_are_the_rows_alone(prefix_rows, prefix_length, monkeypatch):
    """Lengths that share a group, that just miss it, and a row of one token."""
    lengths = (16, 14, 13, 1, 15)
    groups = group_rows(lengths, num_heads=H)
    assert sorted(map(sorted, groups)) == [[0, 1, 4], [2], [3]]
    monkeypatch.setitem(globals(), "LENGTHS", lengths)
    monkeypatch.setitem(globals(), "P", prefix_length)
    fused, prefix, rows, given = case("left", prefix_rows)
    assert [group.rows.tolist() for group in rows.groups] == groups
    assert all(
        (group.mask.shape[3] + prefix_length * bool(prefix_rows)) % 32 == 0 for group in rows.groups
    )
    output = varlen_attention(fused, prefix, rows, num_heads=H, dropout=0.0)
    expected = plain(fused, prefix, given)
    torch.testing.assert_close(output, expected)
    for got, wanted in zip(
        gradients(output, fused, prefix), gradients(expected, fused, prefix), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_groups_hold_few_matrices_and_little_padding():
    sizes = list(range(40, 130))
    for num_heads in (4, 8, 32, 64):
        groups = group_rows(sizes, num_heads=num_heads)
        assert sorted(row for group in groups for row in group) == list(range(len(sizes)))
        for group in groups:
            own = [sizes[row] for row in group]
            assert own == sorted(own, reverse=True)
            assert len(group) == 1 or len(group) * num_heads <= 32
            assert own[-1] >= own[0] * 7 / 8


def test_masks_keep_nine_in_ten_and_follow_torchs_seed():
    torch.manual_seed(1)
    first = draw_keep_mask((2, 50, 4, 25, 101), 0.1)
    assert first.unique().tolist() == [-1, 0], "every bit or none"
    first = first != 0
    second = draw_keep_mask((2, 50, 4, 25, 101), 0.1) != 0
    torch.manual_seed(1)
    assert torch.equal(draw_keep_mask((2, 50, 4, 25, 101), 0.1) != 0, first)
    assert not torch.equal(first, second)
    # A million draws: the standard deviation of the share is 0.0003, and that of 400 roundings of
    # the threshold, by 1/256 each, 0.0001.
    assert first.float().mean().item() == pytest.approx(0.9, abs=0.0015)
    rows = first.flatten(2).float().mean(dim=(0, 2))
    assert (rows - 0.9).abs().max() < 0.01, "each row has its own mask"
    together = (first & second).float().mean().item()
    assert together == pytest.approx(0.81, abs=0.002), "two masks are independent"


@pytest.mark.parametrize("dropout", [0.001, 0.3, 0.5, 0.99])
def test_any_probability_is_met_on_average(dropout):
    """0.001 lies between two thresholds of a byte, 0 and 1: most matrices lose nothing."""
    torch.manual_seed(2)
    mask = draw_keep_mask((4000, 16, 16), dropout)
    # The threshold's rounding adds at most a variance of 1/4 x 1/256**2 for each of the matrices.
    deviation = (dropout * (1 - dropout) / mask.numel() + 0.25 / 256**2 / len(mask)) ** 0.5
    assert (mask == 0).double().mean().item() == pytest.approx(dropout, abs=5 * deviation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_is_that_of_the_padded_grid(
    build_small, training_batch, dtype, monkeypatch
):
    """The whole model, beside the grid and PyTorch's fused attention that a GPU takes."""
    model = build_small(torch_dtype=dtype).to(dtype)
    model.add_prefix(4)
    model.freeze_base()
    encoder = model.prefix_encoder
    encoder.dropout = 0.0
    model.train()

    def step():
        model.zero_grad()
        loss = model(**training_batch).loss
        loss.backward()
        return loss.detach(), encoder.embedding.weight.grad.clone()

    loss, gradient = step()
    calls = []
    monkeypatch.setattr(ChatGLMModel, "uses_varlen", lambda self: bool(calls.append(self)))
    grid_loss, grid_gradient = step()
    assert calls, "the second step took the other path"
    if dtype == torch.float32:
        torch.testing.assert_close(loss, grid_loss)
        torch.testing.assert_close(gradient, grid_gradient, atol=1e-6, rtol=1e-4)
    else:
        torch.testing.assert_close(loss, grid_loss, atol=0.02, rtol=0.01)
        assert torch.cosine_similarity(gradient.flatten(), grid_gradient.flatten(), dim=0) > 0.99
