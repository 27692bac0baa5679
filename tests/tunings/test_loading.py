"""The base of a run is found, or refused in the words typed, and frozen however it is loaded."""

import pytest
import torch

from ptuning import save_prefix
from ptuning.model.adapter import adapter_parameters, add_adapter
from ptuning.model.quantization.layers import QuantizedLinear
from ptuning.tunings.artefact import LORA, Info
from ptuning.tunings.loading import NANO_DIR, ModelError, find_base, load_base, load_tokenizer
from ptuning.tunings.lora import save_adapter

LOADS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "quantization_bit": 8},
    "int4, embedding int8": {
        "dtype": torch.float32,
        "quantization_bit": 4,
        "quantize_embeddings": True,
    },
}


@pytest.mark.parametrize("how", LOADS.values(), ids=LOADS)
def test_no_parameter_of_a_loaded_base_is_trained(how):
    model = load_base(str(NANO_DIR), **how)
    assert model.transformer.final_layernorm.weight.dtype is how["dtype"]
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    is_quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert is_quantized is ("quantization_bit" in how)


def test_a_prefix_added_to_a_loaded_base_is_all_that_is_trained():
    model = load_base(str(NANO_DIR), dtype=torch.float32)
    model.add_prefix(4)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["transformer.prefix_encoder.embedding.weight"]


def test_an_adapter_in_the_folder_of_the_base_is_left_alone(tmp_path):
    pytest.importorskip("peft", reason="needs the peft library (pip install peft)")
    model = load_base(str(NANO_DIR), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    add_adapter(model, rank=2, alpha=4)
    save_adapter(model, tmp_path, Info(tuning=LORA))
    assert not adapter_parameters(load_base(str(tmp_path), dtype=torch.float32))


def test_nano_names_the_embedded_model_unless_a_folder_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_base("nano", flag="--model") == str(NANO_DIR)
    assert load_tokenizer("nano").vocab_size > 0
    (tmp_path / "nano").mkdir()
    with pytest.raises(ModelError, match=r"--model is nano, a folder without config\.json"):
        find_base("nano", flag="--model")


@pytest.mark.parametrize("name", ["THUDM/chatglm-6b", str(NANO_DIR)])
def test_a_hub_id_and_a_folder_stand_for_themselves(name):
    assert find_base(name, flag="--model") == name


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "../b", "~/b", "a/b/c", "/no/folder", ""])
def test_what_is_neither_is_refused(name):
    with pytest.raises(ModelError, match=r"^--model is .*which is not a folder|without config"):
        find_base(name, flag="--model")


def test_a_prefix_in_the_place_of_a_base_is_told_where_it_belongs(tmp_path):
    model = load_base(str(NANO_DIR), dtype=torch.float32)
    model.add_prefix(2)
    save_prefix(model, tmp_path)
    with pytest.raises(ModelError) as caught:
        load_base(str(tmp_path), dtype=torch.float32)
    assert str(caught.value) == (
        f"--model_name_or_path is {tmp_path}, which holds a prefix and no model; give the model it "
        f"was trained on: --model_name_or_path {NANO_DIR} --ptuning_checkpoint {tmp_path}"
    )
