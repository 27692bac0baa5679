"""What a directory holds is told from its files, whoever wrote it, and damage is named."""

import json

import pytest
import torch

from ptuning.model.checkpoint.layout import base_fingerprint, check_base
from ptuning.tunings.artefact import (
    FULL,
    LORA,
    PTUNING,
    Info,
    kind_of,
    read_info,
    remove_other_marks,
    write_info,
)
from ptuning.tunings.prefix import save_prefix


@pytest.fixture
def prefix(build_small, tmp_path):
    model = build_small()
    model.add_prefix(3)
    save_prefix(model, tmp_path / "prefix", step=5)
    return tmp_path / "prefix"


def write_adapter(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return folder


def test_a_prefix_a_file_an_adapter_and_a_model_are_told_apart(build_small, prefix, tmp_path):
    model = build_small()
    model.save_pretrained(tmp_path / "model")
    assert kind_of(prefix) == PTUNING
    assert kind_of(prefix / "prefix.safetensors") == PTUNING
    assert kind_of(write_adapter(tmp_path / "adapter")) == LORA
    assert kind_of(tmp_path / "model") == FULL


def test_a_published_prefix_is_one_beside_its_config_or_without(build_small, tmp_path):
    model = build_small()
    model.save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "model.safetensors").unlink()
    key = "transformer.prefix_encoder.embedding.weight"
    torch.save({key: torch.zeros(2, 4)}, tmp_path / "published" / "pytorch_model.bin")
    assert kind_of(tmp_path / "published") == PTUNING
    (tmp_path / "published" / "config.json").unlink()
    assert kind_of(tmp_path / "published") == PTUNING


def test_a_folder_with_none_of_them_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no prefix .*no LoRA adapter"):
        kind_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        kind_of(tmp_path / "nowhere")


def test_other_adapters_of_peft_are_refused(tmp_path):
    with pytest.raises(ValueError, match="PREFIX_TUNING"):
        kind_of(write_adapter(tmp_path / "adapter", peft_type="PREFIX_TUNING"))


def test_the_description_is_read_back(prefix, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path="some/base")
    assert read_info(adapter) == Info(tuning=LORA, base_model_name_or_path="some/base")
    info = Info(
        tuning=LORA,
        base_model_name_or_path="other/base",
        base_fingerprint="f" * 32,
        trained_parameters=10,
        step=3,
        metrics={"loss": 1.0},
        settings={"recipe": "corrected"},
    )
    write_info(adapter, info)
    assert read_info(adapter) == info
    assert read_info(prefix).step == 5


def test_a_plain_model_says_nothing_of_a_run(build_small, tmp_path):
    build_small().save_pretrained(tmp_path)
    assert read_info(tmp_path) is None


def test_a_description_of_another_version_or_no_json_is_refused(tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    write_info(adapter, Info(tuning=LORA, format_version=99))
    with pytest.raises(ValueError, match="format_version 99"):
        read_info(adapter)
    (adapter / "tuning_config.json").write_text('{"tuning": ')
    with pytest.raises(ValueError, match="is not JSON"):
        read_info(adapter)


def test_writing_one_kind_takes_the_marks_of_the_others_away(prefix):
    write_adapter(prefix)
    write_info(prefix, Info(tuning=LORA))
    remove_other_marks(prefix, LORA)
    assert kind_of(prefix) == LORA
    assert sorted(path.name for path in prefix.iterdir()) == [
        "adapter_config.json",
        "tuning_config.json",
    ]


def test_only_the_base_it_was_trained_on_fits(build_small):
    model = build_small()
    check_base(model, "the adapter", "some/base", base_fingerprint(model))
    check_base(model, "the adapter", "some/base", None)  # it does not say
    with pytest.raises(ValueError, match="trained on some/base"):
        check_base(model, "the adapter", "some/base", "b" * 32)
