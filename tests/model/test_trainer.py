"""transformers' own Trainer on our model, as any model's user would write it; ours is tested in tests/test_main.py."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from ptuning.model.chatglm import ChatGLMForConditionalGeneration

Model = ChatGLMForConditionalGeneration
PAIRS = [
    ("类型#裤*颜色#白色", "这条白色的裤子很好看"),
    ("类型#裙*颜色#蓝色*风格#简约", "简约的蓝色裙子"),
    ("你好！", "你好，有什么可以帮你？"),
    ("类型#外套", "外套"),
]


@pytest.fixture
def nano(loaded_nano: tuple[Model, Any]) -> Model:
    torch.manual_seed(0)
    return copy.deepcopy(loaded_nano[0])


@pytest.fixture
def rows(loaded_nano: tuple[Model, Any]) -> list[dict[str, list[int]]]:
    """question [gMASK] <sop> answer <eop>, with labels from behind <sop> on."""
    made = []
    for question, answer in PAIRS:
        ids = loaded_nano[1](question, answer)["input_ids"]
        start = ids.index(loaded_nano[1].sop_token_id) + 1
        made.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return made


@pytest.fixture
def train(nano: Model, rows: list[Any], loaded_nano: Any, tmp_path: Path) -> Any:
    """A function that trains a copy of the nano model for two steps and returns the trainer."""

    def run(
        folder: str = "run", resume: bool = False, *, given: Any = None, **options: Any
    ) -> Trainer:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / folder),
            "max_steps": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "seed": 1,
        }
        trainer = Trainer(
            model=copy.deepcopy(nano),
            args=TrainingArguments(**settings | options),
            data_collator=DataCollatorForSeq2Seq(loaded_nano[1]),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=loaded_nano[1],
            **(given or {}),
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    return run


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters()])


def test_the_loss_is_the_mean_over_answer_tokens(nano: Model, rows: list[Any], train: Any) -> None:
    (loss,) = losses(train(max_steps=1, per_device_train_batch_size=4))
    sums, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            steps = nano(ids).logits[0, :-1]
            sums += torch.nn.functional.cross_entropy(steps, labels[1:], reduction="sum").item()
            count += int((labels[1:] != -100).sum())
    assert loss == pytest.approx(sums / count, rel=1e-4)


def test_a_resumed_run_ends_as_an_unbroken_one(train: Any) -> None:
    whole = train("whole", max_steps=4)
    train("cut", max_steps=2, save_strategy="steps", save_steps=2)
    assert torch.equal(weights(train("cut", True, max_steps=4)), weights(whole))


def test_accumulated_steps_are_those_of_one_batch(train: Any) -> None:
    whole = train(per_device_train_batch_size=4)
    parts = train(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_step(train: Any, use_reentrant: bool) -> None:
    sgd = {"optim": "sgd"}  # Adam divides gradients near 0 by themselves
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    torch.testing.assert_close(
        weights(train(**sgd, **options)), weights(train(**sgd)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length"},
        {"label_smoothing_factor": 0.1},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"optim": "adafactor"},
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_of_the_trainer_trains(train: Any, options: dict[str, Any]) -> None:
    found = losses(train(**options, max_steps=3))
    assert len(found) == 3
    assert found[-1] < found[0]


def test_a_loss_of_ones_own_gets_logits(train: Any) -> None:
    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    found = losses(train(given={"compute_loss_func": loss_of}, per_device_train_batch_size=4))
    assert found == pytest.approx(losses(train(per_device_train_batch_size=4)), rel=1e-3)


def test_the_best_model_is_loaded_at_the_end(train: Any) -> None:
    trainer = train(
        learning_rate=1.0,  # every step makes it worse
        max_steps=2,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    scores = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(scores.values()))
    saved = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(torch.cat([v.flatten() for v in saved.parameters()]), weights(trainer))


def test_seq2seq_trainer_predicts_by_generating(
    nano: Model, loaded_nano: tuple[Model, Any], tmp_path: Path
) -> None:
    tokenizer = loaded_nano[1]
    questions = [question for question, _ in PAIRS]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        predict_with_generate=True,
        per_device_eval_batch_size=4,
    )
    trainer = Seq2SeqTrainer(
        nano,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    rows = [tokenizer(question) for question in questions]
    found = trainer.predict(rows, max_new_tokens=6, do_sample=False).predictions
    batch = tokenizer(questions, padding=True, return_tensors="pt")
    wanted = nano.generate(**batch, max_new_tokens=6, do_sample=False)
    padding = [tokenizer.pad_token_id] * (found.shape[1] - wanted.shape[1])  # the trainer's own
    assert found.tolist() == [row + padding for row in wanted.tolist()]
