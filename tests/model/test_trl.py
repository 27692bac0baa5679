"""trl's SFTTrainer on our model; runs where trl (1.16.0 tried) and datasets are installed."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import NANO

trl = pytest.importorskip("trl", reason="needs trl, which this project does not depend on")
datasets = pytest.importorskip("datasets", reason="needs datasets, which trl brings")
PAIRS = [
    ("类型#裤*颜色#白色", "这条白色的裤子"),
    ("类型#裙*颜色#蓝色*风格#简约", "简约的蓝色裙子"),
] * 2


def trainer(rows: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32),
        args=trl.SFTConfig(**settings | options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(NANO),
    )


def conversations() -> list[dict[str, Any]]:
    """prompt and completion as lists of messages."""
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in PAIRS
    ]


def test_a_model_is_given_by_its_path(tmp_path: Path) -> None:
    made = trl.SFTTrainer(
        str(NANO),
        args=trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to="none"),
        train_dataset=datasets.Dataset.from_list(conversations()),
    )
    made.train()


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_messages_as_prompt_and_completion_train_the_answer(
    tmp_path: Path, gradient_checkpointing: bool
) -> None:
    made = trainer(conversations(), tmp_path, gradient_checkpointing=gradient_checkpointing)
    tokenizer = made.processing_class
    batch = next(iter(made.get_train_dataloader()))
    wanted = {tuple(tokenizer(*pair)["input_ids"]) for pair in PAIRS}
    for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
    ):
        row = ids[mask].tolist()
        assert tuple(row) in wanted, "question [gMASK] <sop> answer <eop>"
        start = row.index(tokenizer.sop_token_id) + 1
        assert labels[mask].tolist() == [-100] * start + row[start:]
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_plain_texts_put_the_answer_into_the_context(tmp_path: Path, caplog: Any) -> None:
    """Why docs/transformers.md says to give messages: trl joins the texts, and <sop> comes last."""
    rows = [{"prompt": question, "completion": answer} for question, answer in PAIRS]
    made = trainer(rows, tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        assert ids[mask][-1] == made.processing_class.sop_token_id
    logging.Logger.warning_once.cache_clear()
    made.train()
    assert "A training row ends with <sop>" in caplog.text


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packing_is_rejected(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="forward got cu_seq_lens_k, cu_seq_lens_q"):
        trainer(conversations(), tmp_path, **options).train()


def test_assistant_only_loss_trains_the_last_answer(tmp_path: Path) -> None:
    rows = [{"messages": row["prompt"] + row["completion"]} for row in conversations()]
    made = trainer(rows, tmp_path, assistant_only_loss=True)
    batch = next(iter(made.get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        start = ids.tolist().index(made.processing_class.sop_token_id) + 1
        answer = labels[start:]
        assert (labels[:start] == -100).all()
        assert torch.equal(answer[answer != -100], ids[start:][: int((answer != -100).sum())])
        assert made.processing_class.eop_token_id in answer
