"""Label smoothing of transformers' Trainer: every token learns the next one, as without smoothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from ptuning.model.loss import IGNORED_LABEL

NEAR_ZERO = 1e-7


def trainer_of(model: Any, directory: Path, factor: float) -> Trainer:
    arguments = TrainingArguments(
        str(directory), label_smoothing_factor=factor, use_cpu=True, report_to=[]
    )
    return Trainer(model=model, args=arguments)


def smoothed_by_hand(model: Any, batch: dict[str, Tensor], factor: float) -> Tensor:
    """Cross-entropy with (1 - factor) on the next token and factor / V on every token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        label_smoothing=factor,
    )


def prefix_gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return model.prefix_encoder.embedding.weight.grad.clone()


def test_a_factor_near_zero_changes_neither_loss_nor_gradient(small, training_batch, tmp_path):
    plain = trainer_of(small, tmp_path, 0.0).compute_loss(small, dict(training_batch))
    smoothed = trainer_of(small, tmp_path, NEAR_ZERO).compute_loss(small, dict(training_batch))
    torch.testing.assert_close(smoothed, plain)
    torch.testing.assert_close(prefix_gradient(small, smoothed), prefix_gradient(small, plain))


def test_the_smoothed_loss_and_its_gradient_are_those_worked_out_by_hand(
    small, training_batch, tmp_path
):
    loss = trainer_of(small, tmp_path, 0.1).compute_loss(small, dict(training_batch))
    by_hand = smoothed_by_hand(small, training_batch, 0.1)
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(prefix_gradient(small, loss), prefix_gradient(small, by_hand))


def test_a_model_wrapped_by_peft_is_smoothed_alike(build_small, training_batch, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the peft library (pip install peft)")
    base = build_small()
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM"))
    loss = trainer_of(wrapped, tmp_path, 0.1).compute_loss(wrapped, dict(training_batch))
    torch.testing.assert_close(loss, smoothed_by_hand(base, training_batch, 0.1))


def test_our_trainers_loss_is_smoothed_in_training_and_plain_in_validation(small, training_batch):
    plain = small(**training_batch).loss
    small.label_smoothing = 0.1
    assert torch.equal(small(**training_batch).loss, plain)
    small.train()
    small.prefix_encoder.dropout = 0.0
    loss = small(**training_batch).loss
    by_hand = smoothed_by_hand(small, training_batch, 0.1)
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(prefix_gradient(small, loss), prefix_gradient(small, by_hand))
