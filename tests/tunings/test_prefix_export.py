"""Every export is read back: by our own loader, by plain safetensors, and by the peft library."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import ptuning
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.tunings.prefix import export_prefix, flat_table, read_encoder
from tests.model.published import golden_config, make_safetensors

KINDS = ["prefix", "prefix_projection"]


@pytest.fixture(scope="module")
def base(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_safetensors(golden, tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture
def model(base: Path) -> ChatGLMForConditionalGeneration:
    return AutoModel.from_pretrained(base, dtype=torch.float32)


@pytest.fixture
def artefact(
    model: ChatGLMForConditionalGeneration, golden: Path, tmp_path: Path, kind: str
) -> Path:
    ptuning.load_prefix(model, golden / "chatglm-tiny" / f"{kind}.safetensors")
    ptuning.save_prefix(model, tmp_path / "artefact")
    return tmp_path / "artefact"


def pairs_of(model: ChatGLMForConditionalGeneration) -> tuple[torch.Tensor, ...]:
    """The model's prefix, L tensors (2, 1, H, P, D)."""
    with torch.no_grad():
        return model.prefix_encoder(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_published_form_is_read_back_as_a_published_checkpoint(
    model: ChatGLMForConditionalGeneration, artefact: Path, base: Path, tmp_path: Path
) -> None:
    written = export_prefix(artefact, tmp_path / "published", form="published")
    assert written == tmp_path / "published" / "pytorch_model.bin"
    stored = torch.load(written, weights_only=True)
    assert all(name.startswith("transformer.prefix_encoder.") for name in stored)
    assert {value.dtype for value in stored.values()} == {torch.float32}
    again = AutoModel.from_pretrained(base, dtype=torch.float32)
    ptuning.load_prefix(again, tmp_path / "published")
    state = model.prefix_encoder.state_dict()
    assert again.prefix_encoder.state_dict().keys() == state.keys()
    for name, value in again.prefix_encoder.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_key_value_form_is_what_the_layers_see(
    model: ChatGLMForConditionalGeneration, artefact: Path, tmp_path: Path
) -> None:
    stored = load_file(export_prefix(artefact, tmp_path / "kv", form="kv"))
    assert len(stored) == 2 * 28
    for index, pair in enumerate(pairs_of(model)):
        assert stored[f"layers.{index}.key"].shape == (2, 8, 16)  # (H, P, D)
        torch.testing.assert_close(stored[f"layers.{index}.key"], pair[0, 0], rtol=0, atol=1e-6)
        torch.testing.assert_close(stored[f"layers.{index}.value"], pair[1, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_library_reads_the_adapter_and_makes_the_same_keys_and_values(
    model: ChatGLMForConditionalGeneration, artefact: Path, base: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="needs the peft library (pip install peft)")
    written = export_prefix(artefact, tmp_path / "peft", form="peft")
    assert written.name == "adapter_model.safetensors"
    config = peft.PeftConfig.from_pretrained(tmp_path / "peft")
    assert isinstance(config, peft.PrefixTuningConfig)
    assert config.base_model_name_or_path == str(base)
    wrapped = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(base, dtype=torch.float32), tmp_path / "peft"
    )
    prompt = wrapped.get_prompt(
        batch_size=3
    )  # a cache, one layer of keys and values after the other
    pairs = pairs_of(model)
    assert len(prompt.layers) == len(pairs) == 28
    for layer, pair in zip(prompt.layers, pairs, strict=True):
        torch.testing.assert_close(layer.keys, pair[0].expand(3, -1, -1, -1), rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.values, pair[1].expand(3, -1, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_form_says_every_size(artefact: Path, tmp_path: Path) -> None:
    written = export_prefix(artefact, tmp_path / "peft", form="peft")
    values = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    sizes = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    assert [values[name] for name in sizes] == [8, 28, 2, 32]
    assert (values["peft_type"], values["prefix_projection"], values["inference_mode"]) == (
        "PREFIX_TUNING",
        False,
        True,
    )
    stored = load_file(written)
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "prompt_embeddings": (8, 2 * 28 * 32)
    }
    torch.testing.assert_close(stored["prompt_embeddings"], flat_table(read_encoder(artefact)[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_published_prefix_of_another_size_needs_its_base(
    golden: Path, artefact: Path, tmp_path: Path
) -> None:
    export_prefix(artefact, tmp_path / "published", form="published")
    with pytest.raises(
        ValueError, match=r"a base of 28 layers of 4096 needs .*--model_name_or_path DIRECTORY"
    ):
        export_prefix(tmp_path / "published", tmp_path / "kv", form="kv")
    base = ChatGLMConfig(**golden_config(golden))
    found = load_file(export_prefix(tmp_path / "published", tmp_path / "kv", form="kv", base=base))
    expected = load_file(export_prefix(artefact, tmp_path / "kv2", form="kv"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_published_prefix_of_chatglm_6b_needs_no_base(tmp_path: Path) -> None:
    width = 2 * 28 * 4096
    table = torch.arange(2 * width, dtype=torch.float32).view(2, width)
    torch.save(
        {"transformer.prefix_encoder.embedding.weight": table}, tmp_path / "pytorch_model.bin"
    )
    stored = load_file(export_prefix(tmp_path, tmp_path / "kv", form="kv"))
    assert stored["layers.0.key"].shape == (32, 2, 128)
    # row 2l holds layer l's keys and row 2l + 1 its values, each as heads of 128
    assert stored["layers.1.value"][5, 1, 7] == table[1, 3 * 4096 + 5 * 128 + 7]


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    torch.save(
        {"transformer.prefix_encoder.embedding.weight": torch.ones(1, 2 * 28 * 4096)},
        tmp_path / "p.bin",
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"adapter_config\.json is already there"):
        export_prefix(tmp_path / "p.bin", tmp_path / "out", form="peft")
    assert os.listdir(tmp_path / "out") == ["adapter_config.json"]


def test_unknown_form_and_missing_prefix_are_errors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="--format is 'onnx'; use one of published, peft, kv"):
        export_prefix(tmp_path, tmp_path / "out", form="onnx")
    with pytest.raises(
        FileNotFoundError, match=r"has no prefix\.safetensors or pytorch_model\.bin"
    ):
        export_prefix(tmp_path, tmp_path / "out", form="kv")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
