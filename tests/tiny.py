"""A two-layer ChatGLM with its own small vocabulary, and rows for it: enough to run everything for real."""

import json
from pathlib import Path

import pytest
import torch

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.nano.build import train_vocabulary

KINDS = ("上衣", "裤", "裙", "外套", "衬衫", "毛衣")
COLOURS = ("白色", "黑色", "红色", "蓝色", "绿色")
CUTS = ("宽松", "修身", "直筒")


def rows(count: int) -> list[dict[str, str]]:
    """Rows in the ADGEN format; the answer follows from the prompt."""
    made = []
    for index in range(count):
        kind, colour, cut = (
            KINDS[index % 6],
            COLOURS[index // 6 % 5],
            CUTS[index // 30 % 3],
        )
        made.append(
            {
                "content": f"类型#{kind}*颜色#{colour}*版型#{cut}",
                "summary": f"这款{kind}是{colour}的，{cut}的版型，穿着舒适。" * (1 + index % 2),
            }
        )
    return made


def write_rows(path: Path, made: list[dict[str, str]]) -> Path:
    """Write rows as ADGEN has them, one JSON object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    path.write_text(text, encoding="utf-8")
    return path


def leave_picture_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs write an empty loss_curve.png: drawing it takes as long as training."""
    monkeypatch.setattr("trainer_seq2seq.draw_loss_curve", lambda _log, path: path.write_bytes(b""))


def make_base(directory: Path, *, num_layers: int = 2) -> Path:
    """Write a random base with a vocabulary trained on the rows above."""
    directory.mkdir(parents=True, exist_ok=True)
    sentences = [text for row in rows(90) for text in row.values()]
    train_vocabulary(sentences, directory / "ice_text.model", vocab_size=480)
    tokenizer = ChatGLMTokenizer(directory / "ice_text.model")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=num_layers,
        num_attention_heads=2,
        inner_hidden_size=64,
        bos_token_id=tokenizer.sop_token_id,
        eos_token_id=tokenizer.eop_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        gmask_token_id=tokenizer.gmask_token_id,
        tie_word_embeddings=True,
    )
    ChatGLMForConditionalGeneration(config).save_pretrained(directory)
    return directory
