"""AutoTokenizer finds our class for every folder a user may have, without the network or remote code."""

import json
import socket
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import ptuning
from ptuning.data.tokenizer import ChatGLMTokenizer

assert ptuning  # imported for its registrations

# The published file names remote code, which must never run.
TOKENIZER_CONFIG = {
    "name_or_path": "THUDM/chatglm-6b",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "num_image_tokens": 0,
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the tokenizer touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A folder as published: vocabulary, tokenizer_config.json and config.json."""
    (tmp_path / "ice_text.model").write_bytes((tokenizer_folder / "ice_text.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), encoding="utf-8")
    config = {
        "model_type": "chatglm",
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
        "architectures": ["ChatGLMModel"],
        "hidden_size": 32,
        "num_layers": 1,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # Remote code that would be noticed if anything ran it.
    for name in ("tokenization_chatglm.py", "configuration_chatglm.py"):
        (tmp_path / name).write_text("raise SystemExit('remote code ran')\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("arguments", [{}, {"trust_remote_code": True}, {"use_fast": False}])
@pytest.mark.parametrize("missing", ["nothing", "config.json"])
def test_a_published_folder_loads_our_class(
    folder: Path, tokenizer: ChatGLMTokenizer, arguments: dict, missing: str
) -> None:
    (folder / missing).unlink(missing_ok=True)
    loaded = AutoTokenizer.from_pretrained(folder, **arguments)
    assert type(loaded) is ChatGLMTokenizer
    assert loaded("你好 <eop>")["input_ids"] == tokenizer("你好 <eop>")["input_ids"]
    assert loaded.padding_side == "left"


def test_a_saved_tokenizer_loads_again(folder: Path, tmp_path: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again) is ChatGLMTokenizer
    assert again("你好", "a")["input_ids"] == loaded("你好", "a")["input_ids"]
    assert again.special_tokens_map == loaded.special_tokens_map


def test_the_real_folder_loads(shared: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(shared / "data" / "chatglm-6b")
    assert type(loaded) is ChatGLMTokenizer
    assert loaded("你好")["input_ids"] == [5, 74874, 130001, 130004]
