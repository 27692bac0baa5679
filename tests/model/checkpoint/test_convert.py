import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from ptuning.model.checkpoint import convert as checkpoint_convert
from ptuning.model.checkpoint.convert import convert_checkpoint
from ptuning.model.checkpoint.layout import read_checkpoint
from tests.model.published import (
    golden_config,
    golden_tensors,
    make_published,
    make_quantized,
    published_order,
    write_companions,
    write_shards,
)


def listing(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_converted_checkpoint_is_the_same_model_in_one_copy(golden: Path, tmp_path: Path) -> None:
    source = make_published(golden, tmp_path / "source", tied=True)
    summary = convert_checkpoint(source, tmp_path / "out")
    assert listing(tmp_path / "out") == {
        "config.json",
        "tokenizer_config.json",
        "ice_text.model",
        "MODEL_LICENSE",
        "model.safetensors",
    }
    assert summary == read_checkpoint(tmp_path / "out")
    tensors = golden_tensors(golden)
    assert summary.num_bytes == sum(v.nbytes for k, v in tensors.items() if k != "lm_head.weight")
    first, second = AutoModel.from_pretrained(source), AutoModel.from_pretrained(tmp_path / "out")
    assert second.lm_head.weight is second.transformer.word_embeddings.weight
    assert second.dtype == torch.float16
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_an_untied_model_with_equal_tables_is_converted_untied(
    golden: Path, tmp_path: Path
) -> None:
    source = make_published(golden, tmp_path / "source", tied=True)
    AutoModel.from_pretrained(source, tie_word_embeddings=False).save_pretrained(tmp_path / "two")
    convert_checkpoint(tmp_path / "two", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["transformer.word_embeddings.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False


def test_configuration_points_to_no_code(golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(make_published(golden, tmp_path / "source"), tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
        original = json.loads((tmp_path / "source" / name).read_text(encoding="utf-8"))
        assert "auto_map" in original
        assert "auto_map" not in values
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    expected = golden_config(
        golden, architectures=["ChatGLMForConditionalGeneration"], tie_word_embeddings=True
    )
    assert config == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_conversion_has_the_published_numbers(
    golden: Path, tmp_path: Path, bits: int
) -> None:
    source = make_published(golden, tmp_path / "source", tied=False)
    summary = convert_checkpoint(source, tmp_path / "out", quantization_bits=bits)
    assert summary.quantization_bits == bits
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = golden_tensors(golden, f"model-int{bits}")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert written[name].dtype == value.dtype, name
        assert torch.equal(written[name], value), name
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (config["quantization_bit"], config["tie_word_embeddings"]) == (bits, False)
    assert AutoModel.from_pretrained(tmp_path / "out").config.quantization_bit == bits


def test_slim_release_is_converted_as_it_is(golden: Path, tmp_path: Path) -> None:
    source = make_quantized(golden, tmp_path / "int4", 4)
    convert_checkpoint(source, tmp_path / "out", quantization_bits=4)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in golden_tensors(golden, "model-int4").items():
        assert torch.equal(written[name], value), name
    with pytest.raises(ValueError, match=r"--quantization_bit is 8, but .* is stored with 4 bits"):
        convert_checkpoint(source, tmp_path / "other", quantization_bits=8)
    assert listing(tmp_path) == {"int4", "out"}


def test_prefix_in_an_old_style_checkpoint_is_kept(golden: Path, tmp_path: Path) -> None:
    prefix = load_file(golden / "chatglm-tiny" / "prefix.safetensors")["embedding.weight"]
    tensors = golden_tensors(golden) | {"transformer.prefix_encoder.embedding.weight": prefix}
    write_companions(tmp_path / "source", golden_config(golden))
    write_shards(tmp_path / "source", tensors, num_shards=1)
    assert convert_checkpoint(tmp_path / "source", tmp_path / "out").prefix_length == 8
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["transformer.prefix_encoder.embedding.weight"], prefix)


def test_large_checkpoint_is_written_in_shards(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_convert, "SHARD_BYTES", 300_000)
    source = make_published(golden, tmp_path / "source", tied=False)
    summary = convert_checkpoint(source, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    names = [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    assert [shard.name for shard in shards] == names
    assert summary.num_shards == len(shards) == 3
    assert all(sum(v.nbytes for v in load_file(shard).values()) <= 300_000 for shard in shards)
    first, second = AutoModel.from_pretrained(source), AutoModel.from_pretrained(tmp_path / "out")
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_files_may_be_read_by_those_who_may_read_the_configuration(
    golden: Path, tmp_path: Path
) -> None:
    convert_checkpoint(make_published(golden, tmp_path / "source"), tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").glob("*.safetensors")}
    assert modes == {(tmp_path / "out" / "config.json").stat().st_mode}


def test_destination_must_be_new_or_empty(golden: Path, tmp_path: Path) -> None:
    source = make_published(golden, tmp_path / "source")
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty")
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name in ("empty", "file", "source"):
        with pytest.raises(FileExistsError, match=f"{name} is already there and not empty"):
            convert_checkpoint(source, tmp_path / name)
    assert listing(tmp_path) == {"source", "empty", "file"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_interrupted_conversion_leaves_nothing(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    monkeypatch.setattr(checkpoint_convert, "SHARD_BYTES", 300_000)
    source = make_published(golden, tmp_path / "source")
    save: Callable[..., None] = checkpoint_convert.save_file
    written: list[Path] = []

    def save_once(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        if written:
            assert written[0].exists(), "the first shard lies in the temporary directory"
            raise failure
        save(tensors, file, metadata=metadata)
        written.append(file)

    monkeypatch.setattr(checkpoint_convert, "save_file", save_once)
    with pytest.raises(failure):
        convert_checkpoint(source, tmp_path / "deep" / "out")
    assert written
    assert listing(tmp_path / "deep") == set()


def test_full_disk_is_noticed_before_anything_is_written(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_published(golden, tmp_path / "source")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(OSError, match=r"needs 0\.1 GB and its disk has 0\.0 GB free; make room"):
        convert_checkpoint(source, tmp_path / "deep" / "out")
    assert listing(tmp_path) == {"source"}


def test_damaged_source_is_refused_before_anything_is_written(golden: Path, tmp_path: Path) -> None:
    source = make_published(golden, tmp_path / "source")
    os.truncate(source / "pytorch_model-00002-of-00008.bin", 1000)
    with pytest.raises(
        ValueError, match=r"pytorch_model-00002-of-00008\.bin is cut short at 1,000 bytes"
    ):
        convert_checkpoint(source, tmp_path / "out")
    assert listing(tmp_path) == {"source"}


def test_unknown_tensors_are_not_written(golden: Path, tmp_path: Path) -> None:
    write_companions(tmp_path / "source", golden_config(golden))
    tensors = published_order(golden_tensors(golden)) | {"extra.weight": torch.ones(3)}
    write_shards(tmp_path / "source", tensors)
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == golden_tensors(golden).keys()
