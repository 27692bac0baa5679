"""Presets are defaults that typed flags overrule; flags that contradict each other are told."""

import json

import pytest

from ptuning.train.flags import UsageError, parse_arguments
from ptuning.train.presets import preset_values, with_preset


def train(tmp_path, *more):
    return [
        *("--do_train", "--train_file", "train.json", "--model_name_or_path", "nowhere"),
        *("--output_dir", str(tmp_path), "--use_cpu", *more),
    ]


def test_gentle_lowers_the_rate_and_starts_near_zero_and_says_so(tmp_path):
    given = parse_arguments(train(tmp_path, "--pre_seq_len", "4", "--preset", "gentle"))
    assert given.training.learning_rate == 1e-3
    assert given.model.prefix_init_std == 1e-3
    assert given.notices == ("--preset gentle: --learning_rate 0.001, --prefix_init_std 0.001",)


def test_task_is_the_published_rate_and_start(tmp_path):
    given = parse_arguments(train(tmp_path, "--pre_seq_len", "4", "--preset=task"))
    assert given.training.learning_rate == 2e-2
    assert given.model.prefix_init_std is None


def test_what_is_typed_wins_before_and_behind_the_preset(tmp_path):
    for more in (
        ["--learning_rate", "5e-3", "--preset", "gentle"],
        ["--preset", "gentle", "--learning_rate=5e-3"],
    ):
        given = parse_arguments(train(tmp_path, "--pre_seq_len", "4", *more))
        assert given.training.learning_rate == 5e-3
        assert given.model.prefix_init_std == 1e-3
        assert "--learning_rate 5e-3 as typed" in given.notices[0]


def test_a_json_file_of_flags_takes_a_preset_too(tmp_path):
    values = {"do_train": True, "train_file": "t.json", "model_name_or_path": "nowhere"}
    values |= {"output_dir": str(tmp_path), "use_cpu": True, "pre_seq_len": 4, "preset": "gentle"}
    path = tmp_path / "run.json"
    for more, rate in (({}, 1e-3), ({"learning_rate": 0.5}, 0.5)):
        path.write_text(json.dumps(values | more), encoding="utf-8")
        given = parse_arguments([str(path)])
        assert given.training.learning_rate == rate
        assert given.model.prefix_init_std == 1e-3


def test_a_start_from_a_checkpoint_keeps_its_entries():
    words, _ = with_preset(["--preset", "gentle", "--init_from", "old"])
    assert words[-2:] == ["--learning_rate", "0.001"]
    assert preset_values({"learning_rate": 1}) == ({}, [])


def test_retention_is_measured_where_the_base_is_compared_unless_said(tmp_path):
    for more, wanted in (
        ([], True),
        (["--compare_base", "false"], False),
        (["--compare_base", "false", "--measure_retention", "true"], True),
        (["--measure_retention", "false"], False),
    ):
        data = parse_arguments(train(tmp_path, "--pre_seq_len", "4", *more)).data
        assert data.measure_retention is wanted


CONTRADICTIONS = {
    "unknown preset": (["--pre_seq_len", "4", "--preset", "soft"], "task or gentle"),
    "preset of lora": (["--tuning", "lora", "--preset", "gentle"], "leave --preset out"),
    "spread of lora": (["--tuning", "lora", "--prefix_init_std", "1"], "no new prefix"),
    "spread 0": (["--pre_seq_len", "4", "--prefix_init_std", "0"], "a number above 0"),
    "spread of an old prefix": (
        ["--ptuning_checkpoint", "old", "--prefix_init_std", "1"],
        "no new prefix",
    ),
    "mix without ratio": (["--pre_seq_len", "4", "--mix", "general.jsonl"], "FILE:RATIO"),
    "mix of nothing": (["--pre_seq_len", "4", "--mix", "none.jsonl:0.2"], "no file none.jsonl"),
    "prompts nowhere": (
        ["--pre_seq_len", "4", "--do_predict", "--test_file", "t", "--general_prompts", "none"],
        "--general_prompts is none",
    ),
}


@pytest.mark.parametrize("case", sorted(CONTRADICTIONS))
def test_contradictions_are_told_with_what_to_type(case, tmp_path):
    more, needed = CONTRADICTIONS[case]
    with pytest.raises(UsageError) as caught:
        parse_arguments(train(tmp_path, *more))
    assert needed in str(caught.value)
