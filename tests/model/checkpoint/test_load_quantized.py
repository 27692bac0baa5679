"""Slim releases as published, their embedding variants, and float weights quantised while they are read."""

import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import ptuning
from ptuning.model.checkpoint.files import CheckpointReader, TensorHeader
from ptuning.model.checkpoint.layout import read_checkpoint
from ptuning.model.checkpoint.load import quantized_when_read
from ptuning.model.quantization.layers import QuantizedEmbedding, QuantizedLinear
from ptuning.model.quantization.reference import dequantize_weight, quantize_weight
from tests.model.published import (
    golden_config,
    golden_tensors,
    make_published,
    make_quantized,
    make_safetensors,
    write_companions,
    write_shards,
)

TABLES = ("transformer.word_embeddings.weight", "lm_head.weight")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["bin", "safetensors", "on the fly"])
def test_published_numbers(golden: Path, tmp_path: Path, bits: int, form: str) -> None:
    if form == "bin":
        directory = make_quantized(golden, tmp_path, bits)
    else:
        kind = "model" if form == "on the fly" else f"model-int{bits}"
        directory = make_safetensors(golden, tmp_path, kind)
    asked = {"quantization_bit": bits} if form == "on the fly" else {}
    model = AutoModel.from_pretrained(directory, dtype=torch.float32, **asked)
    assert model.config.quantization_bit == bits
    for name, value in golden_tensors(golden, f"model-int{bits}").items():
        found = model.state_dict()[name]
        kept = value.dtype == torch.int8 or name.endswith("_scale")
        assert found.dtype == (value.dtype if kept else torch.float32), name
        assert torch.equal(found, value.to(found.dtype)), name
    ptuning.load_prefix(model, golden / "chatglm-tiny" / "prefix.safetensors")
    cases = load_file(golden / "chatglm-tiny" / "cases.safetensors")
    with torch.no_grad():
        logits = model(input_ids=cases["forward_prefix.input_ids"]).logits
    torch.testing.assert_close(logits, cases[f"forward_int{bits}.logits"], rtol=0, atol=1e-4)


def test_summary_of_a_slim_release(golden: Path, tmp_path: Path) -> None:
    summary = read_checkpoint(make_quantized(golden, tmp_path, 4))
    assert (summary.quantization_bits, summary.embedding_bits, summary.num_shards) == (4, 0, 1)
    assert "; int4 weights, " in str(summary)


def test_slim_release_trains_its_prefix(golden: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(make_quantized(golden, tmp_path, 4), dtype=torch.float32)
    model.add_prefix(4)
    model.freeze_base()
    ids = torch.tensor([[5, 6, 1001, 1004, 9, 10]])
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.prefix_encoder.embedding.weight.grad.abs().sum() > 0
    assert all(value.grad is None for _, value in model.base_parameters())


def make_qe(golden: Path, directory: Path, embedding_bits: int, *, tied: bool) -> Path:
    """The layout of -int4-qe: the embedding and the head are packed as the layers are."""
    tensors = golden_tensors(golden, "model-int4")
    if tied:
        tensors[TABLES[1]] = tensors[TABLES[0]].clone()
    for name in TABLES:
        tensors[name], tensors[f"{name}_scale"] = quantize_weight(tensors[name], embedding_bits)
    config = golden_config(golden, quantization_bit=4, quantization_embeddings=True)
    write_companions(directory, config)
    write_shards(directory, tensors, num_shards=1)
    return directory


@pytest.mark.parametrize("embedding_bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_embedding_means_its_dequantised_values(
    golden: Path, tmp_path: Path, embedding_bits: int, tied: bool
) -> None:
    directory = make_qe(golden, tmp_path / "qe", embedding_bits, tied=tied)
    assert f"int4 weights, int{embedding_bits} embedding" in str(read_checkpoint(directory))
    model = AutoModel.from_pretrained(directory, dtype=torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    assert (head.weight is embedding.weight) == tied
    assert (head.weight_scale is embedding.weight_scale) == tied
    stored = torch.load(directory / "pytorch_model.bin", weights_only=True)
    plain = AutoModel.from_pretrained(
        make_quantized(golden, tmp_path / "plain", 4), dtype=torch.float32
    )
    for module, name in (
        (plain.transformer.word_embeddings, TABLES[0]),
        (plain.lm_head, TABLES[1]),
    ):
        table = dequantize_weight(
            stored[name], stored[f"{name}_scale"], embedding_bits, torch.float32
        )
        module.weight = torch.nn.Parameter(table)
    ids = torch.tensor([[5, 6, 7, 1001, 1004, 9]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-4
        )


def test_quantised_embedding_is_saved_and_loaded_again(golden: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(
        make_qe(golden, tmp_path / "qe", 8, tied=True), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert again.lm_head.weight is again.transformer.word_embeddings.weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_half_quantised_tables_are_refused(golden: Path, tmp_path: Path) -> None:
    directory = make_qe(golden, tmp_path, 8, tied=False)
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    del tensors["lm_head.weight_scale"]
    torch.save(tensors, directory / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"one of transformer.word_embeddings.weight and lm_head.weight as int8"
    ):
        read_checkpoint(directory)


def test_backend_is_chosen_by_name(golden: Path, tmp_path: Path) -> None:
    directory = make_quantized(golden, tmp_path, 8)
    model = AutoModel.from_pretrained(directory, quantization_backend="torch")
    assert {m.backend for m in model.modules() if isinstance(m, QuantizedLinear)} == {"torch"}
    with pytest.raises(ValueError, match="--quantization_backend is 'fast'"):
        AutoModel.from_pretrained(directory, quantization_backend="fast")


def test_weights_are_quantised_once_however_many_threads_read(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_published(golden, tmp_path)
    calls: list[tuple[int, ...]] = []
    inside = threading.Lock()

    def counting(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert inside.acquire(blocking=False), "two float weights are being quantised at a time"
        calls.append(tuple(weight.shape))
        try:
            return quantize_weight(weight, bits)
        finally:
            inside.release()

    monkeypatch.setattr("ptuning.model.quantization.reference.quantize_weight", counting)
    AutoModel.from_pretrained(directory, quantization_bit=8)
    assert len(calls) == 4 * 28


def test_blocks_of_rows_give_the_numbers_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(37, 16, generator=torch.Generator().manual_seed(0)).half()
    torch.save({"w": weight}, tmp_path / "w.bin")
    monkeypatch.setattr("ptuning.model.quantization.reference.BLOCK_BYTES", 5 * 16 * 2)  # five rows
    reader = CheckpointReader({"w": TensorHeader(tmp_path / "w.bin", torch.float16, (37, 16))})
    parts = quantized_when_read(reader, "w", 4, device=None, turn=threading.Lock())
    packed, scale = quantize_weight(weight, 4)
    assert torch.equal(parts["w_scale"][...], scale)
    assert torch.equal(parts["w"][...], packed)
    assert (parts["w"].shape, parts["w_scale"].shape) == ((37, 8), (37,))


@pytest.mark.parametrize("order", [("w", "w_scale"), ("w_scale", "w")])
def test_weight_and_scale_are_computed_once_and_handed_out_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]
) -> None:
    weight = torch.arange(32.0).view(2, 16).half()
    torch.save({"w": weight}, tmp_path / "w.bin")
    calls: list[int] = []

    def counting(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(bits)
        return quantize_weight(weight, bits)

    monkeypatch.setattr("ptuning.model.checkpoint.load.quantize_in_blocks", counting)
    reader = CheckpointReader({"w": TensorHeader(tmp_path / "w.bin", torch.float16, (2, 16))})
    parts = quantized_when_read(reader, "w", 8, device=None, turn=threading.Lock())
    found = {name: parts[name][...] for name in order}
    packed, scale = quantize_weight(weight, 8)
    assert torch.equal(found["w"], packed)
    assert torch.equal(found["w_scale"], scale)
    assert calls == [8]


def test_value_that_cannot_be_quantised_is_named_with_its_tensor(
    golden: Path, tmp_path: Path
) -> None:
    name = "transformer.layers.5.mlp.dense_4h_to_h.weight"
    tensors = golden_tensors(golden)
    tensors[name][3, 4] = float("nan")
    write_companions(tmp_path, golden_config(golden))
    write_shards(tmp_path, tensors, num_shards=1)
    with pytest.raises(
        ValueError, match=rf"pytorch_model\.bin: {re.escape(name)}: row 3 of a weight"
    ):
        AutoModel.from_pretrained(tmp_path, quantization_bit=8)


def test_embedding_bits_that_contradict_the_stored_ones_are_named(
    golden: Path, tmp_path: Path
) -> None:
    directory = make_quantized(golden, tmp_path, 8)
    with pytest.raises(
        ValueError, match=r"embedding_quantization_bit is 8, but .* is stored as floats"
    ):
        AutoModel.from_pretrained(directory, embedding_quantization_bit=8)
