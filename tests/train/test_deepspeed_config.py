"""deepspeed.json and configs/fsdp.yaml are what transformers and accelerate read; neither engine is run here."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers.integrations import deepspeed

from ptuning.model.chatglm import Layer
from ptuning.train.flags import UsageError
from ptuning.train.processes import trainer_arguments
from ptuning.train.run_config import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "deepspeed.json"
FLAGS = [
    *("--do_train", "--train_file", "train.json", "--model_name_or_path", "THUDM/chatglm-6b"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--use_cpu"),
    *("--learning_rate", "1e-4", "--tuning", "full"),
]


class Config(deepspeed.HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
    """What transformers makes where deepspeed is installed: its class above accelerate's."""


@pytest.fixture
def filled(monkeypatch, tmp_path):
    """The settings that DeepSpeed would get for a precision flag."""
    monkeypatch.setattr(deepspeed, "dep_version_check", lambda _name: None)

    def fill(*precision):
        arguments = trainer_arguments(
            parse_arguments([*FLAGS, "--output_dir", str(tmp_path), *precision])
        )
        config = Config(str(CONFIG))
        config.trainer_config_process(arguments)
        config.trainer_config_finalize(arguments, model=None, num_training_steps=5000)
        deepspeed.unset_hf_deepspeed_config()
        return config

    return fill


def values(node):
    """Yield every value at any depth."""
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, dict | list):
            yield from values(value)
        else:
            yield value


def test_transformers_fills_every_auto_and_finds_no_mismatch(filled):
    config = filled("--bf16")
    assert "auto" not in list(values(config.config))
    assert config.mismatches == []
    assert (config.get_value("train_batch_size"), config.get_value("gradient_clipping")) == (8, 1.0)
    assert config.is_zero2()


def test_the_published_precision_flag_reaches_deepspeed(filled):
    found = {}
    for precision in ("--bf16", None):
        config = filled(*([precision] if precision else []))
        found[precision] = (config.is_true("fp16.enabled"), config.is_true("bf16.enabled"))
    assert found == {"--bf16": (False, True), None: (False, False)}
    assert json.loads(CONFIG.read_text())["fp16"]["enabled"] == "auto"


def test_the_published_command_line_means_the_whole_model_and_names_what_is_missing(tmp_path):
    """ds_train_finetune.sh of the published code: no --tuning, no --pre_seq_len."""
    published = f"""
        --deepspeed {CONFIG} --do_train --train_file AdvertiseGen/train.json
        --test_file AdvertiseGen/dev.json --prompt_column content --response_column summary
        --overwrite_cache --model_name_or_path THUDM/chatglm-6b --output_dir {tmp_path}
        --overwrite_output_dir --max_source_length 64 --max_target_length 64
        --per_device_train_batch_size 4 --per_device_eval_batch_size 1
        --gradient_accumulation_steps 1 --predict_with_generate --max_steps 5000
        --logging_steps 10 --save_steps 1000 --learning_rate 1e-4 --fp16
    """
    if deepspeed.is_deepspeed_available():
        pytest.skip("deepspeed is installed, so nothing is missing")
    with pytest.raises(UsageError, match="deepspeed"):
        trainer_arguments(parse_arguments(published.split()))


def test_the_fsdp_example_is_a_config_that_accelerate_loads():
    config = ClusterConfig.from_yaml_file(str(ROOT / "configs" / "fsdp.yaml"))
    assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == Layer.__name__
    assert (
        yaml.safe_load((ROOT / "configs" / "fsdp.yaml").read_text())["distributed_type"] == "FSDP"
    )
