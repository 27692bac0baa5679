"""LoRA on our model: the right gradient on float and packed weights, peft's own files, and off means the base."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from ptuning.engine.engine import GreedyEngine
from ptuning.model.adapter import (
    adapter_parameters,
    add_adapter,
    fill_adapter,
    read_adapter_tensors,
    without_adapter,
)
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import base_fingerprint
from ptuning.model.quantization.layers import QuantizedLinear, quantize_model_
from ptuning.tunings.artefact import LORA, Info
from ptuning.tunings.lora import load_adapter, save_adapter
from tests.conftest import EOP, GMASK, SOP
from tests.model.test_full_gradient import ROWS, batch

peft = pytest.importorskip("peft", reason="needs the peft library (pip install peft)")

ALL = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def give_adapter(model, *, targets=ALL, rank=3):
    """An adapter with random A and B, so that it does something; the same for the same model."""
    add_adapter(model, rank=rank, alpha=6, target_modules=targets)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def gradients(model):
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in adapter_parameters(model).items()}


def plain_gradients(base, adapter):
    """The same from a model without any LoRA layer, whose weights are W + alpha / r B A, row by row, eager."""
    base = copy.deepcopy(base).requires_grad_(False)
    base.config._attn_implementation = "eager"
    values = {n: p.detach().clone().requires_grad_() for n, p in adapter.items()}
    weights = dict(base.named_parameters())
    for name, b in values.items():
        if ".lora_B." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            a = values[name.replace("lora_B", "lora_A")]
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + 6 / a.shape[0] * b @ a
    total, count = torch.zeros(()), 0
    for row in ROWS:
        logits = functional_call(base, weights, (torch.tensor([row]),)).logits[0]
        start = row.index(SOP)
        targets = torch.tensor(row[start:])
        total = total + torch.nn.functional.cross_entropy(
            logits[start - 1 : -1], targets, reduction="sum"
        )
        count += len(targets)
    loss = total / count
    loss.backward()
    return loss.item(), {n: v.grad for n, v in values.items()}


def close(found, wanted, *, rtol):
    """Whether each gradient is as near as rtol of its own size."""
    return all((found[n] - wanted[n]).norm() <= rtol * wanted[n].norm() for n in wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_plain_weights_row_by_row(build_small, checkpointing):
    base = build_small()
    model = give_adapter(copy.deepcopy(base)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss, found = gradients(model)
    wanted_loss, wanted = plain_gradients(base, adapter_parameters(model))
    assert found.keys() == wanted.keys()
    assert len(wanted) == 3 * 4 * 2
    assert all(value.norm() > 0 for value in wanted.values())
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert close(found, wanted, rtol=2e-5)  # float32 sums in another order


@pytest.mark.parametrize("bits", [8, 4])
def test_on_packed_weights_it_is_that_of_the_unpacked_ones(build_small, bits):
    packed = quantize_model_(build_small(), bits, backend="torch")
    unpacked = build_small()
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            unpacked.get_submodule(name).weight.data = module.dequantize()
    before = {n: p.clone() for n, p in packed.named_parameters()}
    model = give_adapter(packed)
    loss, found = gradients(model)
    wanted_loss, wanted = plain_gradients(unpacked, adapter_parameters(model))
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert close(found, wanted, rtol=2e-5)
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(after[name].equal(value) for name, value in before.items())


def test_only_the_adapter_is_trained_in_float32_and_a_fresh_one_changes_nothing(build_small):
    base = build_small().to(torch.bfloat16)
    model = copy.deepcopy(base)
    add_adapter(model, rank=2, alpha=4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2
    assert all("query_key_value.lora_" in name for name in trained)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert type(model) is ChatGLMForConditionalGeneration
    inputs = batch()
    del inputs["labels"]
    assert model(**inputs).logits.equal(base(**inputs).logits)


def test_off_is_exactly_the_base_and_on_again_is_as_before(build_small):
    base = build_small()
    model = give_adapter(copy.deepcopy(base)).eval()
    ids = torch.tensor([ROWS[0]])
    tuned = model(ids).logits
    trained = [p.requires_grad for p in model.parameters()]
    with without_adapter(model):
        assert model(ids).logits.equal(base(ids).logits)
    assert model(ids).logits.equal(tuned)
    assert not tuned.equal(base(ids).logits)
    assert [p.requires_grad for p in model.parameters()] == trained


def test_the_decoding_engine_answers_as_transformers_does(build_small):
    model = give_adapter(build_small()).eval()
    prompts = [[7, 8, 9, GMASK, SOP], [21, GMASK, SOP], [30, 31, GMASK, SOP]]
    engine = GreedyEngine(model, prompts, max_rows=2, max_new_tokens=8)
    found = dict(engine.run())
    for index, prompt in enumerate(prompts):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        answer = output[0, len(prompt) :].tolist()
        assert found[index] == (answer[: answer.index(EOP)] if EOP in answer else answer)


@pytest.fixture
def written(build_small, tmp_path):
    """A base, the model with its adapter, and the adapter's directory."""
    base = build_small()
    model = give_adapter(copy.deepcopy(base)).eval()
    info = Info(
        tuning=LORA,
        base_model_name_or_path="some/base",
        base_fingerprint=base_fingerprint(model),
        step=7,
        settings={"recipe": "corrected"},
    )
    save_adapter(model, tmp_path / "adapter", info)
    return base, model, tmp_path / "adapter"


def test_the_fingerprint_of_the_base_is_the_same_with_an_adapter(build_small):
    base = build_small()
    assert base_fingerprint(give_adapter(copy.deepcopy(base))) == base_fingerprint(base)


def test_a_written_adapter_loads_to_the_same_answers(written):
    base, model, directory = written
    assert sorted(path.name for path in directory.iterdir() if path.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tuning_config.json",
    ]
    loaded = copy.deepcopy(base)
    info = load_adapter(loaded, directory)
    ids = torch.tensor([ROWS[0]])
    assert loaded(ids).logits.equal(model(ids).logits)
    assert (info.step, info.settings) == (7, {"recipe": "corrected"})
    assert not any(p.requires_grad for p in loaded.parameters())


def test_peft_itself_reads_the_directory(written):
    base, model, directory = written
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()
    ids = torch.tensor([ROWS[0]])
    assert loaded(input_ids=ids).logits.equal(model(ids).logits)


def test_an_adapter_that_peft_wrote_loads(build_small, tmp_path):
    base = build_small()
    config = peft.LoraConfig(
        r=2, target_modules=["dense"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    info = load_adapter(base, tmp_path)
    ids = torch.tensor([ROWS[0]])
    assert base(ids).logits.equal(theirs(input_ids=ids).logits)
    assert info.base_fingerprint is None


def test_gathered_tensors_are_written_in_place_of_the_models_own(written, tmp_path):
    _, model, _ = written
    tensors = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    save_adapter(model, tmp_path / "gathered", Info(tuning=LORA), tensors)
    stored = load_file(tmp_path / "gathered" / "adapter_model.safetensors")
    assert stored.keys() == adapter_parameters(model).keys()
    assert all(bool((value == 1).all()) for value in stored.values())


def test_another_base_is_refused_by_its_fingerprint(written, build_small):
    _, _, directory = written
    other = build_small()
    with torch.no_grad():
        other.transformer.final_layernorm.bias += 1.0
    with pytest.raises(ValueError, match=r"trained on some/base \(fingerprint"):
        load_adapter(other, directory)
    assert not adapter_parameters(other)


def test_damage_and_what_does_not_fit_are_named(written, build_small):
    base, model, directory = written
    file = directory / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        load_adapter(copy.deepcopy(base), directory)
    file.write_bytes(whole)
    tensors = load_file(file)
    first = min(tensors)
    save_file(tensors | {first: tensors[first] * float("nan")}, file)
    with pytest.raises(ValueError, match="not finite"):
        load_adapter(copy.deepcopy(base), directory)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        load_adapter(copy.deepcopy(base), directory)
    narrower = give_adapter(copy.deepcopy(base), rank=2)
    with pytest.raises(ValueError, match="another rank"):
        fill_adapter(narrower, tensors, directory)
    fewer = give_adapter(copy.deepcopy(base), targets=("dense",))
    with pytest.raises(ValueError, match="made for other modules"):
        fill_adapter(fewer, tensors, directory)
    with pytest.raises(ValueError, match="has a LoRA adapter already"):
        give_adapter(model)


def test_merging_into_packed_weights_is_refused(build_small):
    model = give_adapter(quantize_model_(build_small(), 8, backend="torch"))
    with pytest.raises(ValueError, match="load the base unquantised"):
        model.transformer.layers[0].attention.dense.merge()


def test_without_the_library_the_error_says_what_to_install(build_small, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install 'peft>="):
        add_adapter(build_small(), rank=2, alpha=4)


def test_names_that_are_no_linears_of_a_layer_are_refused(build_small):
    with pytest.raises(ValueError, match="q_proj"):
        add_adapter(build_small(), rank=2, alpha=4, target_modules=("q_proj",))


def test_the_stored_tensors_are_read_back_as_they_were(written):
    _, model, directory = written
    stored = read_adapter_tensors(Path(directory))
    assert all(stored[name].equal(value) for name, value in adapter_parameters(model).items())
