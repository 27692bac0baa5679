"""The published config.json, the sizes it may hold, and the Auto classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import LATER_GENERATION_KEYS, ChatGLMConfig

PUBLISHED: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 130528,
}
FACTS = [
    "bos_token_id",
    "eos_token_id",
    "mask_token_id",
    "gmask_token_id",
    "pad_token_id",
    "hidden_size",
    "inner_hidden_size",
    "layernorm_epsilon",
    "max_sequence_length",
    "num_attention_heads",
    "num_layers",
    "position_encoding_2d",
    "use_cache",
    "vocab_size",
]


def write_config(directory: Path, values: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def test_the_published_file_is_read(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_config(tmp_path, PUBLISHED))
    assert type(config) is ChatGLMConfig
    assert {name: getattr(config, name) for name in FACTS} == {
        name: PUBLISHED[name] for name in FACTS
    }
    assert config.dtype == torch.float16
    assert config.head_dim == 128
    assert config.pre_seq_len is None
    assert config.prefix_projection is False
    assert config.quantization_bit == 0


def test_the_defaults_are_the_published_sizes() -> None:
    config = ChatGLMConfig()
    assert {name: getattr(config, name) for name in FACTS} == {
        name: PUBLISHED[name] for name in FACTS
    }


def test_the_names_transformers_asks_for_are_there() -> None:
    config = ChatGLMConfig()
    assert config.num_hidden_layers == 28
    assert config.intermediate_size == 16384
    assert config.max_position_embeddings == 2048


@pytest.mark.parametrize("key", LATER_GENERATION_KEYS)
def test_a_later_generation_is_refused_by_name(tmp_path: Path, key: str) -> None:
    values = PUBLISHED | {key: 65024 if key == "padded_vocab_size" else True}
    with pytest.raises(ValueError, match=rf"{key}.*ChatGLM2.*first ChatGLM-6B"):
        AutoConfig.from_pretrained(write_config(tmp_path, values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 4095}, r"hidden_size is 4095 with 32 heads.*divisible by 4"),
        ({"num_attention_heads": 5}, r"hidden_size is 4096 with 5 heads"),
        ({"hidden_size": 0}, r"hidden_size is 0; use 1 or more"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0; use 1 or more"),
        ({"num_layers": 0}, r"num_layers is 0; use 1 or more"),
        ({"vocab_size": -1}, r"vocab_size is -1; use 1 or more"),
        ({"inner_hidden_size": 0}, r"inner_hidden_size is 0; use 1 or more"),
        ({"pre_seq_len": 0}, r"pre_seq_len is 0; use 1 or more, or leave it out"),
        ({"pre_seq_len": -3}, r"pre_seq_len is -3"),
        ({"position_encoding_2d": False}, r"position_encoding_2d is false.*set it to true"),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatGLMConfig(**changes)


def test_a_config_survives_saving(tmp_path: Path) -> None:
    config = ChatGLMConfig(num_layers=2, pre_seq_len=16, prefix_projection=True)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert loaded == config.to_dict() | {"_name_or_path": loaded["_name_or_path"]}


@pytest.mark.parametrize("project", [False, True])
def test_a_model_and_its_prefix_survive_saving(
    tmp_path: Path, build_small: Callable[..., ChatGLMForConditionalGeneration], project: bool
) -> None:
    model = build_small(pre_seq_len=4, prefix_projection=project)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wanted, found = model.state_dict(), loaded.state_dict()
    assert set(found) == set(wanted)
    assert "transformer.prefix_encoder.embedding.weight" in found
    assert ("transformer.prefix_encoder.trans.2.weight" in found) == project
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert loaded.config.pre_seq_len == 4
    assert loaded.config.prefix_projection is project


def test_a_tied_model_survives_saving(
    tmp_path: Path, build_small: Callable[..., ChatGLMForConditionalGeneration]
) -> None:
    model = build_small(tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
@pytest.mark.parametrize("trusting", [{}, {"trust_remote_code": True}])
def test_auto_classes_never_run_remote_code(
    tmp_path: Path,
    build_small: Callable[..., ChatGLMForConditionalGeneration],
    auto_class: Any,
    trusting: dict[str, bool],
) -> None:
    """Old scripts pass trust_remote_code=True, and the published config.json asks for it."""
    build_small().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    write_config(tmp_path, values | {"auto_map": PUBLISHED["auto_map"]})
    for name in ("configuration_chatglm.py", "modeling_chatglm.py"):
        (tmp_path / name).write_text("raise RuntimeError('remote code ran')\n", encoding="utf-8")
    assert type(AutoConfig.from_pretrained(tmp_path, **trusting)) is ChatGLMConfig
    model = auto_class.from_pretrained(tmp_path, **trusting)
    assert type(model) is ChatGLMForConditionalGeneration


def test_a_config_without_auto_map_says_so() -> None:
    """trl's trainers read it where they are given a path."""
    config = ChatGLMConfig()
    assert config.auto_map == {}
    assert "auto_map" not in config.to_dict()
