"""Each kind of damage is found from headers alone, and named in one line: what file, what is wrong, what to do."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from ptuning.model.chatglm import ChatGLMModel
from ptuning.model.checkpoint.layout import read_checkpoint
from tests.model.published import (
    golden_config,
    golden_tensors,
    make_published,
    make_quantized,
    make_safetensors,
    write_companions,
    write_shards,
)

THIRD = "pytorch_model-00003-of-00008.bin"


@pytest.fixture
def shards(golden: Path, tmp_path: Path) -> Path:
    return make_published(golden, tmp_path / "chatglm-6b")


@pytest.fixture
def single(golden: Path, tmp_path: Path) -> Path:
    return make_safetensors(golden, tmp_path / "single")


def complaint(directory: Path, kind: type[Exception] = ValueError) -> str:
    """What read_checkpoint and from_pretrained both say; they must not differ."""
    with pytest.raises(kind) as checked:
        read_checkpoint(directory)
    with pytest.raises(kind) as loaded:
        AutoModel.from_pretrained(directory)
    text = str(checked.value)
    assert text == str(loaded.value)
    assert "\n" not in text
    return text


def resave(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a weight file."""
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    else:
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)


def test_missing_shards_are_named(shards: Path) -> None:
    (shards / THIRD).unlink()
    (shards / "pytorch_model-00005-of-00008.bin").unlink()
    text = complaint(shards, FileNotFoundError)
    assert f"{THIRD}, pytorch_model-00005-of-00008.bin (2 of 8 shards, " in text
    assert text.endswith("download what is missing.")


def test_missing_index_is_named(shards: Path) -> None:
    (shards / "pytorch_model.bin.index.json").unlink()
    assert "has pytorch_model-00001-of-00008.bin but no pytorch_model.bin.index.json" in complaint(
        shards, FileNotFoundError
    )


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_shard_is_named(shards: Path, kept: float) -> None:
    file = shards / THIRD
    os.truncate(file, int(file.stat().st_size * kept))
    text = complaint(shards)
    assert str(file) in text
    if kept:
        assert "is cut short at" in text
    else:
        assert "is empty" in text


@pytest.mark.parametrize("kept", [4, 60, -1])
def test_truncated_safetensors_is_named(single: Path, kept: int) -> None:
    file = single / "model.safetensors"
    os.truncate(file, kept % file.stat().st_size)
    assert f"{file} is damaged or cut short (" in complaint(single)


@pytest.mark.parametrize("name", [THIRD, "model.safetensors"])
def test_git_lfs_pointer_is_recognised(shards: Path, golden: Path, name: str) -> None:
    if name == "model.safetensors":
        make_safetensors(golden, shards)
    (shards / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", encoding="utf-8"
    )
    assert complaint(shards).endswith(f"run `git lfs pull` in {shards}.")


class Payload:
    """What a hostile pickle holds; reading it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_shard_damaged_in_its_tensor_table_is_named(shards: Path) -> None:
    content = bytearray((shards / THIRD).read_bytes())
    start = content.index(b"data.pkl") + 200
    content[start : start + 400] = bytes(400)
    (shards / THIRD).write_bytes(content)
    assert f"{shards / THIRD} " in complaint(shards)


def test_pickle_that_runs_code_is_not_read(shards: Path, tmp_path: Path) -> None:
    torch.save({"a": Payload(tmp_path / "code-ran")}, shards / THIRD)
    assert "holds more than tensors, which could run code" in complaint(shards)
    assert not (tmp_path / "code-ran").exists()


def test_file_from_before_torch_1_6_is_refused(shards: Path) -> None:
    tensors = torch.load(shards / THIRD, weights_only=True)
    torch.save(tensors, shards / THIRD, _use_new_zipfile_serialization=False)
    assert "save it again with a current torch" in complaint(shards)


@pytest.mark.parametrize("value", [[torch.ones(1)], {"a": 1}, {"model": {"a": torch.ones(1)}}])
def test_file_without_a_table_of_tensors_is_refused(shards: Path, value: object) -> None:
    torch.save(value, shards / THIRD)
    assert "is not a table of tensors" in complaint(shards)


def test_shard_that_lacks_what_the_index_promises_is_named(shards: Path) -> None:
    resave(shards / THIRD, lambda tensors: tensors.popitem())
    text = complaint(shards)
    assert f"{THIRD} does not hold transformer.layers." in text
    assert "although the index next to it lists it" in text


def test_missing_tensors_are_named_and_never_made_up(single: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for index in range(5):
            del tensors[f"transformer.layers.{index}.attention.dense.weight"]

    resave(single / "model.safetensors", drop)
    text = complaint(single)
    assert (
        "lacks transformer.layers.0.attention.dense.weight, transformer.layers.1.attention.dense.weight, "
        "transformer.layers.2.attention.dense.weight and 2 more of the 340 tensors"
    ) in text


def test_missing_head_is_refused_unless_the_config_says_tied(golden: Path, tmp_path: Path) -> None:
    for tied in (False, True):
        directory = make_safetensors(golden, tmp_path / str(tied), tie_word_embeddings=tied)
        resave(directory / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    assert "lacks lm_head.weight of the 340 tensors" in complaint(tmp_path / "False")
    model = AutoModel.from_pretrained(tmp_path / "True")
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_fewer_layers_than_the_config_says_are_missing_and_more_are_reported_once(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "lacks transformer.layers.28." in complaint(
        make_safetensors(golden, tmp_path / "29", num_layers=29)
    )
    with caplog.at_level(logging.WARNING):
        AutoModel.from_pretrained(make_safetensors(golden, tmp_path / "27", num_layers=27))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "also holds transformer.layers.27.attention.dense.bias" in messages[0]
    assert "and 9 more" in messages[0]


def test_wrong_shape_is_named_with_both_shapes(shards: Path) -> None:
    name = "transformer.layers.10.attention.dense.bias"
    weight_map = json.loads((shards / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))[
        "weight_map"
    ]
    file = shards / weight_map[name]
    resave(file, lambda tensors: tensors.update({name: torch.ones(31).half()}))
    assert f"{file}: {name} has shape [31], but config.json calls for [32]" in complaint(shards)


def test_config_of_another_size_is_a_wrong_shape(golden: Path, tmp_path: Path) -> None:
    directory = make_safetensors(golden, tmp_path / "base", vocab_size=1032)
    assert (
        "word_embeddings.weight has shape [1024, 32], but config.json calls for [1032, 32]"
        in complaint(directory)
    )


def test_prefix_given_as_a_model_says_where_it_goes(golden: Path, tmp_path: Path) -> None:
    write_companions(tmp_path, golden_config(golden))
    torch.save(
        {"transformer.prefix_encoder.embedding.weight": torch.ones(8, 1792)},
        tmp_path / "pytorch_model.bin",
    )
    assert f"{tmp_path} holds a prefix and no model; give the model" in complaint(tmp_path)


def test_prefix_of_another_base_among_the_weights_is_a_wrong_shape(
    golden: Path, tmp_path: Path
) -> None:
    write_companions(tmp_path, golden_config(golden))
    tensors = golden_tensors(golden) | {
        "transformer.prefix_encoder.embedding.weight": torch.ones(8, 100)
    }
    write_shards(tmp_path, tensors, num_shards=1)
    assert "has shape [8, 100], but config.json calls for [8, 1792]" in complaint(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": "../evil.bin"}}']
)
def test_bad_index_is_named(shards: Path, content: str) -> None:
    (shards / "pytorch_model.bin.index.json").write_text(content, encoding="utf-8")
    assert "pytorch_model.bin.index.json" in complaint(shards)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_bad_config_is_named(shards: Path, content: str) -> None:
    (shards / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        read_checkpoint(shards)


def test_missing_directory_config_and_weights_are_told_apart(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give the directory"):
        read_checkpoint(tmp_path / "nothing")
    write_companions(tmp_path / "no-weights", golden_config(golden))
    with pytest.raises(FileNotFoundError, match="has no weights"):
        AutoModel.from_pretrained(tmp_path / "no-weights")
    make_published(golden, tmp_path / "no-config")
    (tmp_path / "no-config" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_checkpoint(tmp_path / "no-config")


def test_bits_that_contradict_the_stored_ones_are_named(golden: Path, tmp_path: Path) -> None:
    directory = make_quantized(golden, tmp_path / "int4", 4)
    with pytest.raises(
        ValueError, match=r"quantization_bit is 8, but the weights in .* are stored with 4 bits"
    ):
        AutoModel.from_pretrained(directory, quantization_bit=8)
    with pytest.raises(ValueError, match="quantization_bit is 5; use 4 or 8"):
        AutoModel.from_pretrained(make_published(golden, tmp_path / "half"), quantization_bit=5)


def test_missing_scales_and_mixed_layers_are_named(golden: Path, tmp_path: Path) -> None:
    name = "transformer.layers.3.mlp.dense_4h_to_h.weight"
    lacking = make_quantized(golden, tmp_path / "a", 8)
    resave(lacking / "pytorch_model.bin", lambda tensors: tensors.pop(name + "_scale"))
    assert f"lacks {name}_scale of" in complaint(lacking)
    mixed = make_quantized(golden, tmp_path / "b", 8)
    resave(
        mixed / "pytorch_model.bin", lambda tensors: tensors.update({name: tensors[name].half()})
    )
    assert f"{name} is float16, unlike the other layers' weights" in complaint(mixed)


def test_a_model_saved_without_its_head_loads_as_it_was(golden: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(make_safetensors(golden, tmp_path / "whole"))
    model.transformer.save_pretrained(tmp_path / "base")
    assert "lacks transformer.word_embeddings.weight" in complaint(tmp_path / "base")
    alone = ChatGLMModel.from_pretrained(tmp_path / "base")
    assert torch.equal(alone.word_embeddings.weight, model.transformer.word_embeddings.weight)


def test_a_dtype_that_no_checkpoint_holds_is_named(single: Path) -> None:
    name = "transformer.final_layernorm.weight"
    file = single / "model.safetensors"
    resave(file, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    assert f"{name} of dtype F8_E4M3; ChatGLM checkpoints hold F64" in complaint(single)


def test_a_config_may_say_that_nothing_is_quantised(single: Path) -> None:
    file = single / "config.json"
    nulls = {"quantization_bit": None, "embedding_quantization_bit": None}
    values = json.loads(file.read_text(encoding="utf-8")) | nulls
    file.write_text(json.dumps(values), encoding="utf-8")
    assert AutoModel.from_pretrained(single).config.quantization_bit == 0
