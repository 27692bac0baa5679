"""What a directory holds is told from its files, whoever wrote it, and damage is named."""

import json

import pytest
import torch

from ptuning.tunings.artefact import (
    FULL,
    LORA,
    PTUNING,
    TunedInfo,
    check_base,
    kind_of,
    read_tuned_info,
    write_tuned_info,
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
    assert read_tuned_info(adapter) == TunedInfo(LORA, base_model_name_or_path="some/base")
    info = TunedInfo(LORA, "other/base", "f" * 32, 10, 3, {"loss": 1.0}, {"recipe": "corrected"})
    write_tuned_info(adapter, info)
    assert read_tuned_info(adapter) == info
    assert read_tuned_info(prefix).step == 5


def test_a_plain_model_says_nothing_of_a_run(build_small, tmp_path):
    build_small().save_pretrained(tmp_path)
    assert read_tuned_info(tmp_path) is None


def test_a_description_of_another_version_or_no_json_is_refused(tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    write_tuned_info(adapter, TunedInfo(LORA, format_version=99))
    with pytest.raises(ValueError, match="format_version 99"):
        read_tuned_info(adapter)
    (adapter / "tuning_config.json").write_text('{"tuning": ')
    with pytest.raises(ValueError, match="is not JSON"):
        read_tuned_info(adapter)


def test_writing_one_kind_takes_the_marks_of_the_others_away(prefix):
    write_adapter(prefix)
    write_tuned_info(prefix, TunedInfo(LORA))
    assert kind_of(prefix) == LORA
    assert sorted(path.name for path in prefix.iterdir()) == [
        "adapter_config.json",
        "tuning_config.json",
    ]


def test_only_the_base_it_was_trained_on_fits(tmp_path):
    info = TunedInfo(LORA, "some/base", "a" * 32)
    check_base(info, "this/base", "a" * 32, tmp_path)
    check_base(TunedInfo(LORA), "this/base", "b" * 32, tmp_path)  # it does not say
    with pytest.raises(ValueError, match="trained on some/base"):
        check_base(info, "this/base", "b" * 32, tmp_path)
