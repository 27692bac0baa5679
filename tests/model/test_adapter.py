"""`from_pretrained` with the folder of an adapter: the base it names, with the adapter on it."""

import copy
import json
import pickle
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ptuning.model.adapter import add_adapter
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import base_fingerprint
from ptuning.storage import INFO_NAME
from ptuning.tunings.artefact import FULL, LORA, Info, find_prefix_weights
from ptuning.tunings.lora import save_adapter
from tests.model.checkpoint.test_hub import COMMIT
from tests.model.test_full_gradient import ROWS
from tests.tunings.test_lora import give_adapter

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
    info = Info(
        tuning=LORA,
        base_model_name_or_path=base.name_or_path,
        base_fingerprint=base_fingerprint(base),
    )
    save_adapter(model, folder, info)
    return model


def by_peft(base, folder):
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(folder)
    return model


def by_peft_with_embedding(base, folder):
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM"))
    base.transformer.word_embeddings.weight.data = base.lm_head.weight.data.clone()
    model.save_pretrained(folder, save_embedding_layers=True)
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


def by_dora(base, folder):
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, use_dora=True)
    model = peft.get_peft_model(base, config)
    for name, value in model.named_parameters():
        if "magnitude" in name:
            value.data = value * 2
    model.save_pretrained(folder)
    return model


def by_module(base, folder):
    config = peft.LoraConfig(task_type="CAUSAL_LM", bias="all", modules_to_save=["final_layernorm"])
    model = peft.get_peft_model(base, config)
    model.base_model.model.transformer.final_layernorm.modules_to_save.default.bias.data += 1
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


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | changes
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


@every_class
@pytest.mark.parametrize(
    "write",
    [by_training, by_peft, by_peft_with_embedding, by_transformers, by_ia3, by_dora, by_module],
)
def test_the_folder_of_an_adapter_loads_as_the_tuned_model(base, tmp_path, write, auto):
    tuned = write(copy.deepcopy(base), tmp_path / "adapter").eval()
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, ChatGLMForConditionalGeneration)
    assert loaded.name_or_path == str(tmp_path / "base")
    assert loaded._hf_peft_config_loaded
    assert not loaded.training
    assert not any(value.requires_grad for value in loaded.parameters())
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
    change_config(folder, base_model_name_or_path="gone/elsewhere")
    info = Info(tuning=FULL, base_fingerprint="of the weights before they were tuned")
    (folder / INFO_NAME).write_text(json.dumps(asdict(info)), encoding="utf-8")
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


def put_on_hub(folder: Path, repository: Path, *references: str) -> None:
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for name in references:
        (repository / "refs" / name).write_text(COMMIT, encoding="utf-8")


def test_an_adapter_on_the_hub_is_found_in_its_cache(written, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, tuned, folder = written
    put_on_hub(folder, tmp_path / "hub" / "models--someone--adapter", "main")
    cache = {"cache_dir": tmp_path / "hub"}
    direct = ChatGLMForConditionalGeneration.from_pretrained("someone/adapter", **cache)
    auto = AutoModelForCausalLM.from_pretrained("someone/adapter", adapter_kwargs=cache)
    torch.testing.assert_close(logits(direct), logits(tuned))
    torch.testing.assert_close(logits(auto), logits(tuned))


def test_the_revision_of_an_adapter_is_not_that_of_its_base(written, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, tuned, folder = written
    change_config(folder, base_model_name_or_path="someone/base")
    put_on_hub(folder, tmp_path / "hub" / "models--someone--adapter", "v2")
    put_on_hub(tmp_path / "base", tmp_path / "hub" / "models--someone--base", "main")
    loaded = ChatGLMForConditionalGeneration.from_pretrained(
        "someone/adapter", cache_dir=tmp_path / "hub", revision="v2"
    )
    torch.testing.assert_close(logits(loaded), logits(tuned))


@every_class
def test_no_adapter_is_attached_where_its_name_is_none(written, auto):
    base, _, folder = written
    base.save_pretrained(folder)
    loaded = auto.from_pretrained(folder, adapter_name=None)
    torch.testing.assert_close(logits(loaded), logits(base))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        ChatGLMForConditionalGeneration.from_pretrained(folder.parent, adapter_name=None)


def drop_one(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)


def fill_with_nan(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)


def cut_short(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


@every_class
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_one, r"5 tensors where this model needs 6 .*lora_A.*incomplete"),
        (fill_with_nan, "lora_A.* not finite"),
        (cut_short, "cut short"),
        (remove_weights, r"no adapter_model\.safetensors"),
        (lambda folder: change_config(folder, r=4), "with another rank"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(written, auto, damage, words):
    _, _, folder = written
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        auto.from_pretrained(folder)


@every_class
def test_weights_in_the_older_format_of_peft_load_too(written, auto):
    _, tuned, folder = written
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    remove_weights(folder)
    torch.testing.assert_close(logits(auto.from_pretrained(folder)), logits(tuned))


@every_class
def test_a_base_of_the_same_name_and_other_weights_is_refused(base, tmp_path, auto, build_small):
    by_training(copy.deepcopy(base), tmp_path / "adapter")
    other = build_small()
    other.transformer.final_layernorm.bias.data += 1
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"adapter at .* was trained on .* load the base"):
        auto.from_pretrained(tmp_path / "adapter")


@every_class
def test_an_adapter_on_an_offloaded_base_is_refused(written, auto, tmp_path):
    _, _, folder = written
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "disk"}
    with pytest.raises(ValueError, match=r"offloaded.*device_map"):
        auto.from_pretrained(folder, **options)


@every_class
def test_loading_info_can_be_asked_for(written, auto):
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
    change_config(folder, base_model_name_or_path=None)
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


def test_a_new_adapter_names_its_base_for_every_folder(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run started in the base's parent folder is loaded from anywhere."""
    monkeypatch.chdir(golden)
    model = AutoModelForCausalLM.from_pretrained("chatglm-tiny")
    add_adapter(model, rank=2, alpha=4)
    name = model.peft_config["default"].base_model_name_or_path
    assert name == str(golden / "chatglm-tiny")


def test_an_adapter_is_no_prefix(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"holds a peft adapter.*AutoModelForCausalLM"):
        find_prefix_weights(tmp_path)


def test_an_adapter_on_a_model_without_a_name_names_no_base(build_small) -> None:
    model = build_small()
    add_adapter(model, rank=2, alpha=4)
    assert model.peft_config["default"].base_model_name_or_path == ""


def test_modules_that_are_no_linears_of_a_layer_are_refused(build_small) -> None:
    with pytest.raises(ValueError, match="lm_head; give one or more of query_key_value"):
        add_adapter(build_small(), rank=2, alpha=4, target_modules=["lm_head"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"format_version": 2}, "format_version 2"), ({"tuning": None}, "it lacks tuning")],
)
def test_a_description_of_another_format_is_refused(base, tmp_path, changes, words) -> None:
    by_training(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / INFO_NAME
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    values = {name: value for name, value in values.items() if value is not None}
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_an_adapter_on_packed_weights_is_pickled(written) -> None:
    model = AutoModelForCausalLM.from_pretrained(written[2], quantization_bit=4)
    again = pickle.loads(pickle.dumps(model))
    assert logits(again).equal(logits(model))
