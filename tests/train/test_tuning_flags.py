"""What a command line means to train, new ones and published ones, and which flags contradict each other."""

import pytest

from ptuning.model.tuned import TunedInfo, write_tuned_info
from ptuning.train.flags import UsageError, parse_arguments
from ptuning.train.tuning_flags import find_tuning, with_tuning


def train(tmp_path, *more):
    return [
        *(
            "--do_train",
            "--train_file",
            "train.json",
            "--model_name_or_path",
            "ptuning/nano/weights",
        ),
        *("--output_dir", str(tmp_path), "--use_cpu", *more),
    ]


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return tmp_path / "adapter"


def test_what_is_trained_is_found_without_the_flag(tmp_path, adapter):
    (tmp_path / "full").mkdir()
    write_tuned_info(tmp_path / "full", TunedInfo("full"))
    assert find_tuning({"pre_seq_len": 128}) == "ptuning"
    assert find_tuning({"ptuning_checkpoint": str(adapter)}) == "lora"
    assert find_tuning({"ptuning_checkpoint": "nowhere"}) == "ptuning"
    assert find_tuning({"do_train": True, "deepspeed": "deepspeed.json"}) == "full"
    assert find_tuning({"do_predict": True, "model_name_or_path": str(tmp_path / "full")}) == "full"
    assert find_tuning({"do_train": True}) is None
    assert find_tuning({"tuning": "lora", "pre_seq_len": 128}) == "lora"


def test_flags_in_each_form_are_read(adapter):
    assert with_tuning(["--do_train", "--deepspeed=x.json"])[-1] == "full"
    assert with_tuning(["--do_train", "false", "--deepspeed", "x.json"])[-1] == "x.json"
    assert with_tuning(["--ptuning_checkpoint", str(adapter), "--do_predict"])[-1] == "lora"
    given = ["--tuning", "full", "--pre_seq_len", "8"]
    assert with_tuning(given) == given


def test_the_published_mixed_precision_stays_for_the_whole_model_alone(tmp_path):
    whole = parse_arguments(train(tmp_path, "--tuning", "full", "--bf16")).training
    assert (whole.bf16, whole.base_dtype, whole.mixed_precision) == (True, "bfloat16", "bf16")
    for more in (["--pre_seq_len", "4"], ["--tuning", "lora"]):
        frozen = parse_arguments(train(tmp_path, "--bf16", *more)).training
        assert (frozen.bf16, frozen.base_dtype, frozen.mixed_precision) == (False, "bfloat16", "no")


CONTRADICTIONS = {
    "nothing to tune": ([], "--tuning lora"),
    "unknown": (["--tuning", "qlora"], "ptuning, lora, full"),
    "prefix without length": (["--tuning", "ptuning"], "--pre_seq_len 128"),
    "prefix and lora": (["--tuning", "lora", "--pre_seq_len", "8"], "--pre_seq_len belong"),
    "projection and full": (["--tuning", "full", "--prefix_projection"], "--prefix_projection"),
    "rank and prefix": (["--pre_seq_len", "8", "--lora_rank", "4"], "--lora_rank belong"),
    "full and int4": (["--tuning", "full", "--quantization_bit", "4"], "--tuning lora"),
    "full and int8 embedding": (["--tuning", "full", "--quantize_embeddings"], "--tuning lora"),
    "rank 0": (["--tuning", "lora", "--lora_rank", "0"], "--lora_rank is 0"),
    "alpha 0": (["--tuning", "lora", "--lora_alpha", "0"], "--lora_alpha is 0"),
    "dropout 1": (["--tuning", "lora", "--lora_dropout", "1"], "--lora_dropout is 1"),
    "odd module": (
        ["--tuning", "lora", "--lora_target_modules", "dense,q_proj"],
        "query_key_value",
    ),
    "fsdp and scores": (
        ["--tuning", "full", "--fsdp", "full_shard", "--do_predict", "--test_file", "x.json"],
        "bash evaluate.sh",
    ),
}


@pytest.mark.parametrize("case", sorted(CONTRADICTIONS))
def test_contradictions_are_told_with_what_to_type(case, tmp_path):
    more, needed = CONTRADICTIONS[case]
    with pytest.raises(UsageError) as caught:
        parse_arguments(train(tmp_path, *more))
    assert needed in str(caught.value)


def test_a_checkpoint_of_another_kind_is_told(tmp_path, adapter):
    more = ["--tuning", "full", "--ptuning_checkpoint", str(adapter)]
    with pytest.raises(UsageError, match="is of the kind lora"):
        parse_arguments(train(tmp_path, *more))
    more = ["--ptuning_checkpoint", str(adapter), "--lora_rank", "4"]
    with pytest.raises(UsageError, match="adapter has its own"):
        parse_arguments(train(tmp_path, *more))


def test_scoring_without_anything_tuned_says_what_to_give(tmp_path):
    flags = ["--do_predict", "--test_file", "dev.json", "--output_dir", str(tmp_path), "--use_cpu"]
    flags += ["--model_name_or_path", "ptuning/nano/weights"]
    with pytest.raises(UsageError, match="--ptuning_checkpoint DIR"):
        parse_arguments(flags)
    with pytest.raises(UsageError, match="lora without an adapter"):
        parse_arguments([*flags, "--tuning", "lora"])
    assert parse_arguments([*flags, "--tuning", "full"]).training.tuning == "full"
