"""What forward takes from tools written for any causal model, and what it refuses in words."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from ptuning.data.tokenization import pad_right
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from tests.conftest import EOP, GMASK, PAD, SOP

Model = ChatGLMForConditionalGeneration


@pytest.fixture
def warnings_said(caplog):
    """The texts of the model's warnings, each of which would be said once in a process."""
    logging.Logger.warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [entry.getMessage() for entry in caplog.records]


# Logits and loss


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": ids[real].tolist(), "labels": labels[real].tolist()}
        for ids, labels, real in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        )
    ]


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    collated = pad_right(rows, pad_id=3)
    return {name: collated[name] for name in ("input_ids", "labels", "attention_mask")}


def trainer_of(model: Model, tmp_path: Any, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=2, disable_tqdm=True
    )
    return Trainer(model=model, args=arguments, data_collator=pad, **more)


def test_transformers_trainer_scores_logits(
    small: Model, training_batch: dict[str, Tensor], tmp_path: Any
) -> None:
    """The share of next tokens that are right, by compute_metrics and from predict."""
    seen = {}

    def compute_metrics(evaluation: Any) -> dict[str, float]:
        seen["labels"] = evaluation.label_ids
        wanted = evaluation.label_ids[:, 1:]
        right = evaluation.predictions[:, :-1] == wanted
        return {"accuracy": float(right[wanted != -100].mean())}

    rows = rows_of(training_batch)
    trainer = trainer_of(
        small,
        tmp_path,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    found = trainer.evaluate()
    with torch.no_grad():
        best = small(training_batch["input_ids"], training_batch["attention_mask"]).logits.argmax(
            -1
        )
    wanted = training_batch["labels"][:, 1:]
    right = (best[:, :-1] == wanted)[wanted != -100].float().mean()
    assert found["eval_accuracy"] == pytest.approx(float(right))
    assert 0 < found["eval_accuracy"] < 1
    assert trainer.predict(rows).predictions.shape == tuple(training_batch["labels"].shape)


def test_logits_beside_the_loss_are_those_asked_for(
    small: Model, training_batch: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        whole = small(**training_batch)
        last = small(**training_batch, logits_to_keep=2)
    assert last.logits.equal(whole.logits[:, -2:])
    assert last.loss == whole.loss


def test_a_collated_batch_costs_no_logits(small: Model, training_batch: dict[str, Tensor]) -> None:
    """The batches of main.py, in validation too: only answer tokens pass the output head."""
    collated = pad_right(rows_of(training_batch), pad_id=3)
    assert small(**collated).logits is None


def test_labels_that_are_shifted_already(small: Model, training_batch: dict[str, Tensor]) -> None:
    shifted = torch.nn.functional.pad(training_batch["labels"][:, 1:], (0, 1), value=-100)
    others = {name: value for name, value in training_batch.items() if name != "labels"}
    for model in (small.eval(), small.train()):
        model.prefix_encoder.dropout = 0.0
        found = model(**others, shift_labels=shifted)
        wanted = model(**training_batch)
        assert found.loss == wanted.loss
        assert model(**training_batch, shift_labels=shifted).loss == wanted.loss


# One warning for what has no meaning


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_labels_on_the_context_are_said_once(
    small: Model, training_batch: dict[str, Tensor], warnings_said: Any, mode: str
) -> None:
    getattr(small, mode)()
    small(**training_batch)
    assert not warnings_said()
    wrong = {**training_batch, "labels": training_batch["input_ids"]}
    for _ in range(2):
        small(**wrong)
    (said,) = warnings_said()
    assert said.startswith("Some labels are on context tokens (before <sop>, id 62)")
    assert "set those labels to -100" in said


def test_a_row_without_sop_is_said_once(small: Model, warnings_said: Any) -> None:
    """What scores a text by its log-likelihood hands question and answer in as one text."""
    small(torch.tensor([[5, 6, 7, 8, GMASK, SOP, 30]]))
    assert not warnings_said()
    for _ in range(2):
        small(torch.tensor([[5, 6, 7, 8, 30]]))
    (said,) = warnings_said()
    assert "no <sop> (id 62)" in said
    assert "tokenizer(question, answer)" in said


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_rows_without_an_answer_are_said_once(
    small: Model, side: str, warnings_said: Any
) -> None:
    """trl computes the loss itself, and puts a plain completion in front of [gMASK] <sop>."""
    good, bad = [5, GMASK, SOP, 30, 31], [5, 30, 31, GMASK, SOP]
    padded = [PAD, *bad[1:]] if side == "left" else [*bad[1:], PAD]
    small.train().transformer(torch.tensor([good, good]))
    small.eval().transformer(torch.tensor([good, bad]))
    assert not warnings_said()
    small.train()
    for _ in range(2):
        rows = torch.tensor([good, padded])
        small.transformer(rows, attention_mask=(rows != PAD).long())
    (said,) = warnings_said()
    assert "ends with <sop> (id 62)" in said
    assert "tokenizer(question, answer)" in said


def test_the_causal_collator_is_warned_about(loaded_nano: Any, warnings_said: Any) -> None:
    """It puts labels on every token, the question's too."""
    model, tokenizer = loaded_nano
    rows = [tokenizer("你好", "你也好"), tokenizer("天气", "很好")]
    collated = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    with torch.no_grad():
        model(**collated)
    (said,) = warnings_said()
    assert said.startswith("Some labels are on context tokens")


def test_decoding_steps_and_generate_say_nothing(
    small: Model, left_padded: dict[str, Tensor], warnings_said: Any
) -> None:
    small.generate(**left_padded, max_new_tokens=3)
    small.generate(**left_padded, max_new_tokens=3, use_cache=False)
    small.train().generate(**left_padded, max_new_tokens=3, use_cache=False)
    cache = small.eval()(**left_padded).past_key_values
    mask = torch.nn.functional.pad(left_padded["attention_mask"], (0, 1), value=1)
    small(torch.full((4, 1), 30), attention_mask=mask, past_key_values=cache)
    assert not warnings_said()


def test_attentions_without_eager_are_said_and_not_returned(
    small: Model, left_padded: dict[str, Tensor], warnings_said: Any
) -> None:
    assert small(**left_padded, output_attentions=True).attentions is None
    (said,) = warnings_said()
    assert "attn_implementation='eager'" in said


def test_a_finished_answer_given_to_generate_is_said_once(
    small: Model, prompts: list[list[int]], warnings_said: Any
) -> None:
    """Rows with their answer, as Trainer evaluates them, or a second question behind the first."""
    for row in ([*prompts[0], 30, EOP], [*prompts[0], 30, EOP, *prompts[1]]):
        small.generate(torch.tensor([row]), max_new_tokens=2)
    (said,) = warnings_said()
    assert "holds <eop> (id 63)" in said
    assert "apply_chat_template" in said


# Refusals


REFUSED = {
    "only embeddings": (
        {"inputs_embeds": torch.zeros(1, 4, 32)},
        "got inputs_embeds.*give input_ids",
    ),
    "nothing": ({}, "got no input_ids.*give input_ids"),
    "no tokens": ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids is \(1, 0\)"),
    "a row alone": (
        {"input_ids": torch.tensor([5, GMASK, SOP])},
        r"input_ids is \(3,\); give \(B, S\)",
    ),
    "positions of one channel": (
        {"input_ids": torch.tensor([[5, GMASK, SOP]]), "position_ids": torch.arange(3)[None]},
        r"position_ids is \(1, 3\).*two channels, \(1, 2, 3\)",
    ),
    "a label too few": (
        {"input_ids": torch.tensor([[5, GMASK, SOP]]), "labels": torch.tensor([[5, GMASK]])},
        r"labels is \(1, 2\) for input_ids \(1, 3\)",
    ),
    "rows end to end": (
        {
            "input_ids": torch.tensor([[5, GMASK, SOP]]),
            "cu_seq_lens_q": torch.tensor([0, 3]),
            "max_length_q": 3,
        },
        r"got cu_seq_lens_q, max_length_q.*attention_mask",
    ),
    "another model's argument": (
        {"input_ids": torch.tensor([[5, GMASK, SOP]]), "token_type_ids": torch.zeros(1, 3)},
        r"got token_type_ids, which ChatGLM does not take: leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_forward_cannot_use_is_refused_in_words(small: Model, case: str) -> None:
    given, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        small(**given)
    if "labels" not in given:
        with pytest.raises(ValueError, match=words):
            small.transformer(**given)


def test_arguments_that_are_none_are_nothing(small: Model) -> None:
    small(torch.tensor([[5, GMASK, SOP]]), token_type_ids=None, cache_position=None)


@pytest.mark.parametrize("name", ["mine", "paged|sdpa", "flex_attention"])
def test_an_attention_function_that_would_not_be_called_is_refused(
    small: Model, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", lambda *args, **kwargs: None)
    small.config._attn_implementation = name
    with pytest.raises(ValueError, match=r"attn_implementation is .*choose 'sdpa'"):
        small(torch.tensor([[5, GMASK, SOP]]))
