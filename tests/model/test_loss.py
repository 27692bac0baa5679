"""The chunked loss is the ordinary one."""

import weakref

import pytest
import torch
from torch.nn import functional

from ptuning.model.cpu.linear import Linear
from ptuning.model.loss import summed_loss, token_losses


def case(dtype=torch.float64, tokens=37):
    torch.manual_seed(0)
    head = Linear(16, 101, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randint(0, 101, (tokens,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 1000, None])
def test_loss_and_gradient_are_those_of_the_full_matrix(chunk_tokens, smoothing):
    head, hidden, targets = case()
    expected = functional.cross_entropy(
        head(hidden).float(), targets, reduction="sum", label_smoothing=smoothing
    )
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    loss = summed_loss(hidden, head, targets, chunk_tokens=chunk_tokens, label_smoothing=smoothing)
    (found,) = torch.autograd.grad(3 * loss, hidden)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # a float32 sum
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_targets_count_nothing(smoothing, trained):
    head, hidden, targets = case()
    head.weight.requires_grad_(trained)
    targets[::3] = -100
    expected = functional.cross_entropy(
        head(hidden).float(), targets, reduction="sum", label_smoothing=smoothing
    )
    (wanted,) = torch.autograd.grad(expected, hidden)
    loss = summed_loss(
        hidden, head, targets, chunk_tokens=5, label_smoothing=smoothing, may_ignore=True
    )
    (found,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_the_head_gets_no_gradient_and_a_trained_head_gets_its_own():
    head, hidden, targets = case()
    summed_loss(hidden, head, targets).backward()
    assert head.weight.grad is None
    head.weight.requires_grad_(True)
    summed_loss(hidden, head, targets).backward()
    assert head.weight.grad is not None


def test_no_matrix_of_tokens_by_vocabulary_is_kept_for_the_backward_pass():
    head, hidden, targets = case(tokens=64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        summed_loss(hidden, head, targets, chunk_tokens=8)
    assert kept == [hidden.shape]


def test_a_chunk_is_freed_before_the_next_one_is_formed():
    head, hidden, targets = case(torch.float32)
    slopes, alive, product, product_back = [], [], head.product, head.product_back

    def watched(x):
        alive.extend(slope for slope in slopes if slope() is not None)
        return product(x)

    def remembered(slope):  # float32 as it is, so not a copy
        slopes.append(weakref.ref(slope))
        return product_back(slope)

    head.product, head.product_back = watched, remembered
    summed_loss(hidden, head, targets, chunk_tokens=8)
    assert len(slopes) == 5
    assert not alive


def test_no_gradient_is_formed_while_validating():
    head, hidden, targets = case()
    with torch.no_grad():
        loss = summed_loss(hidden, head, targets)
    assert not loss.requires_grad
    assert summed_loss(hidden.detach(), head, targets).item() == loss.item()


def test_no_answer_tokens_sum_to_zero():
    head, hidden, targets = case()
    assert summed_loss(hidden[:0], head, targets[:0]).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_to_its_rounding(dtype):
    head, hidden, targets = case()
    expected = functional.cross_entropy(head(hidden), targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, hidden)
    half = hidden.detach().to(dtype).requires_grad_(True)
    loss = summed_loss(half, head.to(dtype), targets, chunk_tokens=8)
    (found,) = torch.autograd.grad(loss, half)
    epsilon = torch.finfo(dtype).eps  # a few roundings of operands of size one
    assert abs(loss.item() - expected.item()) < 4 * epsilon * abs(expected.item())
    assert (found.double() - wanted).norm() < 8 * epsilon * wanted.norm()


def test_smoothing_is_not_rounded_away_in_float16():
    """A logit's share, 0.1 / 130,528, is far below 1: divided by the tokens first, it would be 0."""
    torch.manual_seed(0)
    head = Linear(4, 130_528, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(3, 4), torch.randint(0, 130_528, (3,))

    def smoothing_part(dtype):
        gradients = []
        for smoothing in (0.1, 0.0):
            x = hidden.to(dtype).requires_grad_(True)
            loss = summed_loss(x, head.to(dtype), targets, label_smoothing=smoothing)
            (gradient,) = torch.autograd.grad(loss / 1000, x)
            gradients.append(gradient.float())
        return gradients[0] - 0.9 * gradients[1]

    wanted = smoothing_part(torch.float32)
    assert (smoothing_part(torch.float16) - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 1000, None])
def test_losses_token_by_token_are_those_of_the_full_matrix(chunk_tokens):
    head, hidden, targets = case()
    expected = functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    losses = token_losses(hidden, head, targets, chunk_tokens)
    assert losses.dtype is torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    assert token_losses(hidden[:0], head, targets[:0], chunk_tokens).shape == (0,)
