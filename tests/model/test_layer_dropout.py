"""Residual dropout: golden schedules, masks of both sublayers, and nothing outside training."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import set_seed

from ptuning.model.chatglm import ChatGLMForConditionalGeneration, Layer, layer_dropouts
from ptuning.train.fit import checkpoint_layers

Model = ChatGLMForConditionalGeneration


@pytest.fixture
def small(small: Model) -> Model:
    """The random model in training, its prefix's own dropout off."""
    small.prefix_encoder.dropout = 0.0
    small.freeze_base()
    return small.train()


def loss_and_gradient(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), model.prefix_encoder.embedding.weight.grad.clone()


def test_schedules_are_the_golden_ones(golden: Path) -> None:
    cases = json.loads((golden / "lima.json").read_text(encoding="utf-8"))["layer_dropout"]
    for case in cases:
        assert layer_dropouts(case["layers"], case["top"]) == case["schedule"]
    assert len(cases) == 6


def test_every_layer_drops_its_share_of_both_outputs_and_scales_the_rest(
    small: Model, training_batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop, calls = Layer._drop, []

    def record(layer: Layer, output: Tensor) -> Tensor:
        dropped = drop(layer, output)
        calls.append((output.detach(), dropped.detach()))
        return dropped

    monkeypatch.setattr(Layer, "_drop", record)
    small.set_layer_dropout(0.6)
    set_seed(0)
    small(**{name: tensor.repeat(20, 1) for name, tensor in training_batch.items()})
    schedule = layer_dropouts(small.config.num_layers, 0.6)
    assert len(calls) == 2 * len(schedule)
    for index, (output, dropped) in enumerate(calls):
        share = schedule[index // 2]
        is_zero = dropped == 0
        deviation = (share * (1 - share) / output.numel()) ** 0.5
        assert is_zero.double().mean().item() == pytest.approx(share, abs=5 * deviation)
        torch.testing.assert_close(dropped[~is_zero], output[~is_zero] / (1 - share))


def test_it_acts_in_training_only_and_0_is_none_at_all(
    small: Model, training_batch: dict[str, Tensor]
) -> None:
    loss, gradient = loss_and_gradient(small, training_batch)
    state = torch.get_rng_state()
    small.set_layer_dropout(0.0)
    again, same_gradient = loss_and_gradient(small, training_batch)
    assert torch.equal(again, loss)
    assert torch.equal(same_gradient, gradient)
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    small.set_layer_dropout(0.3)
    assert not torch.allclose(loss_and_gradient(small, training_batch)[0], loss)
    with torch.no_grad():
        assert torch.equal(small.eval()(**training_batch).loss, loss)


@pytest.mark.parametrize("count", [1, 3])
def test_recomputed_layers_draw_the_same_masks(
    small: Model, training_batch: dict[str, Tensor], count: int
) -> None:
    small.set_layer_dropout(0.3)
    set_seed(1)
    loss, gradient = loss_and_gradient(small, training_batch)
    checkpoint_layers(small, count)
    set_seed(1)
    again, same_gradient = loss_and_gradient(small, training_batch)
    assert torch.equal(again, loss)
    torch.testing.assert_close(same_gradient, gradient)
    set_seed(2)
    assert not torch.allclose(loss_and_gradient(small, training_batch)[0], loss)
