"""`from_pretrained` with the folder of an adapter: the base it names, with the adapter on it."""

import copy
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from ptuning.model.adapter import save_adapter
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.prefix_artefact import base_fingerprint
from ptuning.model.tuned import LORA, TunedInfo
from tests.model.test_adapter import give_adapter
from tests.model.test_checkpoint_hub import COMMIT
from tests.model.test_full_gradient import ROWS

peft = pytest.importorskip("peft", reason="needs the peft library (pip install peft)")

CONFIG = "adapter_config.json"
every_class = pytest.mark.parametrize(
    "auto", [AutoModelForCausalLM, ChatGLMForConditionalGeneration]
)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ROWS[0]])).logits


def by_training(base, folder):
    model = give_adapter(base)
    info = TunedInfo(LORA, base.name_or_path, base_fingerprint(base))
    save_adapter(model, folder, info)
    return model


def by_peft(base, folder):
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(folder)
    return model


def by_transformers(base, folder):
    base.add_adapter(peft.LoraConfig(init_lora_weights=False), adapter_name="mine")
    base.save_pretrained(folder)
    return base


def by_ia3(base, folder):
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["query_key_value", "dense_4h_to_h"],
        feedforward_modules=["dense_4h_to_h"],
        init_ia3_weights=False,
    )
    model = peft.get_peft_model(base, config)
    for name, value in model.named_parameters():
        if "ia3_l" in name:
            value.data = torch.rand_like(value) + 0.5
    model.save_pretrained(folder)
    return model


@pytest.fixture
def base(build_small, tmp_path):
    build_small().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.fixture
def written(base, tmp_path):
    """The base, the tuned model, and the folder of its adapter."""
    return base, by_peft(copy.deepcopy(base), tmp_path / "adapter").eval(), tmp_path / "adapter"


def rename_base(folder: Path, name: str | None) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = name
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


@every_class
@pytest.mark.parametrize("write", [by_training, by_peft, by_transformers, by_ia3])
def test_the_folder_of_an_adapter_loads_as_the_tuned_model(base, tmp_path, write, auto):
    tuned = write(copy.deepcopy(base), tmp_path / "adapter").eval()
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, ChatGLMForConditionalGeneration)
    assert loaded.name_or_path == str(tmp_path / "base")
    assert loaded._hf_peft_config_loaded
    assert not loaded.training
    assert (logits(tuned) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded), logits(tuned))


@every_class
def test_the_adapter_gets_the_name_that_is_asked_for(written, auto):
    _, tuned, folder = written
    loaded = auto.from_pretrained(folder, adapter_name="mine")
    assert loaded.active_adapters() == ["mine"]
    torch.testing.assert_close(logits(loaded), logits(tuned))


def test_an_adapter_in_a_subfolder_is_found_by_adapter_kwargs(written):
    _, tuned, folder = written
    load = ChatGLMForConditionalGeneration.from_pretrained
    for options in ({"subfolder": folder.name}, {"adapter_kwargs": {"subfolder": folder.name}}):
        torch.testing.assert_close(logits(load(folder.parent, **options)), logits(tuned))


@every_class
def test_a_model_with_an_adapter_beside_it_loads_with_it(written, auto, tmp_path):
    base, tuned, folder = written
    base.save_pretrained(folder)
    rename_base(folder, "gone/elsewhere")
    loaded = auto.from_pretrained(folder)
    assert loaded.name_or_path == str(folder)
    torch.testing.assert_close(logits(loaded), logits(tuned))


def test_an_adapter_loads_on_its_base_packed_to_four_bits(written):
    base, _, folder = written
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_bit=4)
    packed = AutoModelForCausalLM.from_pretrained(base.name_or_path, quantization_bit=4)
    assert not torch.equal(logits(loaded), logits(packed))
    for layer in loaded.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.enable_adapters(False)
    assert torch.equal(logits(loaded), logits(packed))


def test_an_adapter_on_the_hub_is_found_in_its_cache(written, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, tuned, folder = written
    repository = tmp_path / "hub" / "models--someone--adapter"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    cache = {"cache_dir": tmp_path / "hub"}
    direct = ChatGLMForConditionalGeneration.from_pretrained("someone/adapter", **cache)
    auto = AutoModelForCausalLM.from_pretrained("someone/adapter", adapter_kwargs=cache)
    torch.testing.assert_close(logits(direct), logits(tuned))
    torch.testing.assert_close(logits(auto), logits(tuned))


@every_class
def test_the_loading_info_is_that_of_the_adapter(written, auto):
    _, tuned, folder = written
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    torch.testing.assert_close(logits(loaded), logits(tuned))
    assert not info["missing_keys"]


def test_a_base_that_has_gone_is_named_with_its_adapter(written, tmp_path):
    _, _, folder = written
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match=r"adapter.*names .*base as its base") as error:
        ChatGLMForConditionalGeneration.from_pretrained(folder)
    assert str(tmp_path / "base") in str(error.value)
    assert str(folder) in str(error.value)


def test_an_adapter_that_names_no_base_says_how_to_load_it(written):
    _, _, folder = written
    rename_base(folder, None)
    with pytest.raises(ValueError, match=r"names no base.*load_adapter"):
        ChatGLMForConditionalGeneration.from_pretrained(folder)


def test_without_peft_the_folder_is_refused_and_not_loaded_as_the_base(written, monkeypatch):
    base, _, folder = written
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"peft library.*pip install"):
        ChatGLMForConditionalGeneration.from_pretrained(folder)
    base.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"peft library.*pip install"):
        AutoModelForCausalLM.from_pretrained(folder)
