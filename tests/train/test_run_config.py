"""What a command line means: which value wins, what is tuned, and which flags contradict each other."""

import json
import re
from pathlib import Path

import pytest

from ptuning.train.flags import UsageError
from ptuning.train.parser import make_parser
from ptuning.train.run_config import RunConfig, find_tuning, parse_arguments, preset_values
from ptuning.tunings.artefact import Info, write_info

ROOT = Path(__file__).resolve().parents[2]


def train(tmp_path, *more):
    return [
        *("--do_train", "--train_file", "train.json", "--output_dir", str(tmp_path)),
        *("--model_name_or_path", "ptuning/nano/weights", "--use_cpu", *more),
    ]


def read(tmp_path, *more):
    return parse_arguments(train(tmp_path, "--pre_seq_len", "4", *more))


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return tmp_path / "adapter"


# ---- Which value wins ----


def test_without_flags_the_user_is_told_what_to_type():
    with pytest.raises(
        UsageError, match=r"--do_train, --do_eval or --do_predict .* bash train\.sh"
    ):
        parse_arguments([])


def test_a_json_file_says_the_same_and_flags_behind_it_win(tmp_path):
    values = {"do_train": True, "train_file": "t.json", "model_name_or_path": "my/base"}
    values |= {"output_dir": str(tmp_path), "use_cpu": True, "pre_seq_len": 4, "preset": "gentle"}
    values |= {"prefix_projection": True, "max_steps": None, "weight_decay": "1e-3"}
    path = tmp_path / "run.json"
    for more, rate in (({}, 1e-3), ({"learning_rate": 0.5}, 0.5)):
        path.write_text(json.dumps(values | more), encoding="utf-8")
        config = parse_arguments([str(path)])
        assert config.learning_rate == rate
        assert config.prefix_init_std == 1e-3
        assert (config.prefix_projection, config.max_steps) == (True, -1)
        assert config.trainer_flags == {"weight_decay": 1e-3}
    assert parse_arguments([str(path), "--learning_rate", "0.25"]).learning_rate == 0.25


def test_gentle_lowers_the_rate_and_starts_near_zero_and_says_so(tmp_path):
    config = read(tmp_path, "--preset", "gentle")
    assert (config.learning_rate, config.prefix_init_std) == (1e-3, 1e-3)
    assert config.notices == ("--preset gentle: --learning_rate 0.001, --prefix_init_std 0.001",)


def test_task_is_the_published_rate_and_start(tmp_path):
    config = read(tmp_path, "--preset=task")
    assert (config.learning_rate, config.prefix_init_std) == (2e-2, None)


@pytest.mark.parametrize("rate", [["--learning_rate", "5e-4"], ["--learning-rate=5e-4"]])
def test_what_is_typed_wins_before_and_behind_the_preset(rate, tmp_path):
    for more in ([*rate, "--preset", "gentle"], ["--preset", "gentle", *rate]):
        config = read(tmp_path, *more)
        assert (config.learning_rate, config.prefix_init_std) == (5e-4, 1e-3)
        assert "--learning_rate 0.0005 (typed)" in config.notices[0]


def test_lima_ends_at_a_tenth_of_whatever_the_rate_is_and_says_all_it_sets(tmp_path):
    config = read(tmp_path, "--preset", "lima")
    assert (config.num_train_epochs, config.learning_rate, config.layer_dropout) == (15, 2e-2, 0)
    (notice,) = config.notices
    assert notice == (
        "--preset lima: --num_train_epochs 15, --learning_rate 0.02, --warmup_steps 0, "
        "--adam_beta1 0.9, --adam_beta2 0.95, --weight_decay 0.1, --save_strategy epoch, "
        '--lr_scheduler_type polynomial, --lr_scheduler_kwargs {"lr_end": 0.002}'
    )
    config = read(tmp_path, "--preset", "lima", "--learning_rate", "3e-3", "--weight_decay", "0")
    assert config.trainer_flags["lr_scheduler_kwargs"] == '{"lr_end": 0.0003}'
    assert "--weight_decay 0 (typed)" in config.notices[0]


def test_another_schedule_or_length_than_limas_is_taken_as_typed(tmp_path):
    config = read(tmp_path, "--preset", "lima", "--lr_scheduler_type", "cosine")
    assert config.lr_scheduler_type == "cosine"
    assert "lr_scheduler_kwargs" not in config.trainer_flags
    own = '{"power": 2}'
    config = read(tmp_path, "--preset", "lima", "--lr_scheduler_kwargs", own)
    assert config.trainer_flags["lr_scheduler_kwargs"] == own
    assert config.notices[0].endswith(f"--lr_scheduler_kwargs {own} (typed)")
    rows = ("--validation_file", "dev.json")
    for steps, strategy in (((), "epoch"), (("--eval_steps", "5"), "steps")):
        config = read(tmp_path, "--preset", "lima", *rows, *steps)
        assert config.eval_strategy == strategy

    config = read(tmp_path, "--preset", "lima", "--save_steps", "7")
    assert "save_strategy" not in config.notices[0]
    assert config.trainer_flags.get("save_strategy") != "epoch"

    notices = read(tmp_path, "--preset", "lima", "--max_steps", "5").notices
    assert "--num_train_epochs 15 has no effect: --max_steps 5 overrides it." in notices


def test_a_start_from_a_checkpoint_keeps_its_entries():
    values, _ = preset_values({"preset": "gentle", "init_from": "old"})
    assert values == {"learning_rate": 1e-3}
    assert preset_values({"learning_rate": 1}) == ({}, [])


def test_a_checkpoint_remembers_columns_and_lengths_and_what_is_typed_wins(tmp_path):
    settings = {"prompt_column": "q", "max_source_length": 64, "recipe": "published"}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write_info(tmp_path / "old", Info(tuning="lora", settings=settings))
    start = ["--ptuning_checkpoint", str(tmp_path / "old")]
    config = parse_arguments(train(tmp_path, *start, "--max_source_length", "32"))
    assert (config.prompt_column, config.max_source_length, config.recipe) == ("q", 32, "published")
    assert config.max_target_length == 128


def test_columns_and_formats_that_are_typed_replace_each_other(tmp_path):
    def remembering(**settings):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        write_info(tmp_path / "old", Info(tuning="lora", settings=settings))
        return train(tmp_path, "--ptuning_checkpoint", str(tmp_path / "old"))

    start = remembering(prompt_column="q", response_column="a", turns="last")
    config = parse_arguments([*start, "--format", "alpaca"])
    assert (config.format, config.prompt_column, config.turns) == ("alpaca", None, "last")
    start = remembering(format="alpaca")
    assert parse_arguments(start).format == "alpaca"
    config = parse_arguments([*start, "--prompt_column", "q"])
    assert (config.format, config.prompt_column) == ("auto", "q")


def test_which_rows_are_learned_is_said_by_the_rows_themselves(tmp_path):
    first = read(tmp_path, "--prompt_column", "q", "--turns", "last").settings()
    assert first == read(tmp_path).settings()
    assert first != read(tmp_path, "--source_prefix", "q").settings()


def test_files_may_be_several_or_a_pattern(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).touch()
    both = [tmp_path / "a.json", tmp_path / "b.json"]
    for given in (list(map(str, both)), [f"{tmp_path}/*.json"]):
        config = read(tmp_path, "--test_file", *given)
        assert config.files("test_file") == both
    assert read(tmp_path).files("test_file") == []
    path = tmp_path / "run.json"
    values = {"do_train": True, "model_name_or_path": "my/base", "output_dir": str(tmp_path)}
    for given in ("a.json", ["a.json"]):
        path.write_text(json.dumps(values | {"pre_seq_len": 4, "train_file": given}))
        assert parse_arguments([str(path)]).train_file == ("a.json",)


def test_epochs_next_to_steps_are_said_to_have_no_effect(tmp_path):
    notices = read(tmp_path, "--num_train_epochs", "3", "--max_steps", "5").notices
    assert notices == ("--num_train_epochs 3 has no effect: --max_steps 5 overrides it.",)
    assert read(tmp_path, "--num_train_epochs", "3").notices == ()


def test_a_config_cannot_be_changed(tmp_path):
    config = read(tmp_path)
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]


def test_settings_hold_what_decides_the_result_and_nothing_else(tmp_path):
    def settings(*more):
        return read(tmp_path, *more).settings()

    same = settings()
    assert json.loads(json.dumps(same)) == same
    for more in (
        ["--logging_steps", "3"],
        ["--save_steps", "3"],
        ["--do_eval", "--validation_file", "x"],
    ):
        assert settings(*more) == same
    assert settings("--dataloader_num_workers", "1") == same
    assert settings("--dataloader_drop_last") != same
    for more in (["--learning_rate", "1"], ["--weight_decay", "1"], ["--seed", "1"], ["--bf16"]):
        assert settings(*more) != same
    assert settings("--layer_dropout", "0.3")["layer_dropout"] == 0.3
    assert same["layer_dropout"] is None, "equal to that of a run before there was the flag"
    assert settings("--max_steps", "3") == settings("--max_steps", "3", "--num_train_epochs", "1")


def test_retention_is_measured_where_the_base_is_compared_unless_said(tmp_path):
    for more, wanted in (
        ([], True),
        (["--compare_base", "false"], False),
        (["--compare_base", "false", "--measure_retention", "true"], True),
        (["--measure_retention", "false"], False),
    ):
        assert read(tmp_path, *more).measures_retention is wanted


@pytest.mark.parametrize(
    ("more", "wanted", "options"),
    [
        ([], "auto", None),
        (["--gradient_checkpointing"], "true", None),
        (["--gradient_checkpointing", "False"], "false", None),
        (["--activation_checkpointing", "true"], "true", None),
        (
            ["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
            "auto",
            {"use_reentrant": True},
        ),
    ],
)
def test_gradient_checkpointing_is_read_under_both_names(more, wanted, options, tmp_path):
    config = read(tmp_path, *more)
    assert (config.checkpointing, config.checkpointing_options) == (wanted, options)
    assert "checkpointing" not in "".join(config.trainer_values())


def test_mixed_precision_is_for_the_whole_model_alone(tmp_path):
    whole = parse_arguments(train(tmp_path, "--tuning", "full", "--bf16"))
    assert (whole.dtype_name, whole.trainer_values()["bf16"]) == ("bfloat16", True)
    for more in (["--pre_seq_len", "4"], ["--tuning", "lora"]):
        frozen = parse_arguments(train(tmp_path, "--fp16", *more))
        assert (frozen.dtype_name, frozen.trainer_values()["fp16"]) == ("float16", False)
    assert read(tmp_path).dtype_name is None


# ---- What is tuned ----


def test_what_is_trained_is_found_without_the_flag(tmp_path, adapter):
    (tmp_path / "full").mkdir()
    write_info(tmp_path / "full", Info(tuning="full"))
    assert find_tuning({"pre_seq_len": 128}) == "ptuning"
    assert find_tuning({"ptuning_checkpoint": str(adapter)}) == "lora"
    assert find_tuning({"ptuning_checkpoint": "nowhere"}) == "ptuning"
    assert find_tuning({"do_train": True, "deepspeed": "deepspeed.json"}) == "full"
    assert find_tuning({"do_train": False, "deepspeed": "deepspeed.json"}) is None
    assert find_tuning({"do_predict": True, "model_name_or_path": str(tmp_path / "full")}) == "full"
    assert find_tuning({"do_train": True}) is None
    assert find_tuning({"tuning": "lora", "pre_seq_len": 128}) == "lora"


def test_a_fully_tuned_model_given_as_the_model_is_the_checkpoint(tmp_path):
    write_info(tmp_path, Info(tuning="full", settings={"prompt_column": "q"}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    flags = ["--do_predict", "--test_file", "t", "--output_dir", "o"]
    config = parse_arguments([*flags, "--model_name_or_path", str(tmp_path)])
    assert (config.tuning, config.checkpoint) == ("full", str(tmp_path))
    assert config.prompt_column == "q"


PREFIX = ["--pre_seq_len", "4"]
ROWS = str(ROOT / "AdvertiseGen" / "sample" / "dev.json")
# flags, words of the message, the flags that its advice leads to
HINTS = {
    "nothing to tune": ([], "--tuning lora for", ["--tuning", "lora"]),
    "nothing to tune, otherwise": ([], "--pre_seq_len 128 to train", ["--pre_seq_len", "128"]),
    "unknown kind": (["--tuning", "qlora"], "ptuning, lora, full", ["--tuning", "full"]),
    "prefix without length": (
        ["--tuning", "ptuning"],
        "--pre_seq_len 128",
        ["--tuning", "ptuning", "--pre_seq_len", "128"],
    ),
    "prefix and lora": (
        ["--tuning", "lora", "--pre_seq_len", "8"],
        "--pre_seq_len belong",
        ["--tuning", "lora"],
    ),
    "projection and full": (
        ["--tuning", "full", "--prefix_projection"],
        "--prefix_projection belong",
        ["--tuning", "full"],
    ),
    "rank and prefix": ([*PREFIX, "--lora_rank", "4"], "--lora_rank belong", PREFIX),
    "full and int4": (
        ["--tuning", "full", "--quantization_bit", "4"],
        "--tuning lora",
        ["--tuning", "lora", "--quantization_bit", "4"],
    ),
    "full and int8 embedding": (
        ["--tuning", "full", "--quantize_embeddings"],
        "--tuning lora",
        ["--tuning", "lora", "--quantize_embeddings"],
    ),
    "rank 0": (
        ["--tuning", "lora", "--lora_rank", "0"],
        "--lora_rank is 0; use 1 or more",
        ["--tuning", "lora", "--lora_rank", "1"],
    ),
    "alpha 0": (
        ["--tuning", "lora", "--lora_alpha", "0"],
        "--lora_alpha is 0; use a number above 0",
        ["--tuning", "lora", "--lora_alpha", "0.1"],
    ),
    "dropout 1": (
        ["--tuning", "lora", "--lora_dropout", "1"],
        "--lora_dropout is 1.0; use 0 to less than 1",
        ["--tuning", "lora", "--lora_dropout", "0"],
    ),
    "layers' dropout 1": (
        [*PREFIX, "--layer_dropout", "1"],
        "--layer_dropout is 1.0; use 0 to less than 1",
        [*PREFIX, "--layer_dropout", "0.3"],
    ),
    "layers' dropout nan": (
        [*PREFIX, "--layer_dropout", "nan"],
        "--layer_dropout is nan; use 0 to less than 1",
        [*PREFIX, "--layer_dropout", "0"],
    ),
    "smoothing 1": (
        [*PREFIX, "--label_smoothing_factor", "1"],
        "--label_smoothing_factor is 1.0; use 0 to less than 1",
        [*PREFIX, "--label_smoothing_factor", "0.1"],
    ),
    "smoothing below 0": (
        [*PREFIX, "--label_smoothing_factor=-0.1"],
        "--label_smoothing_factor is -0.1; use 0 to less than 1",
        [*PREFIX, "--label_smoothing_factor", "0"],
    ),
    "odd module": (
        ["--tuning", "lora", "--lora_target_modules", "dense,q_proj"],
        "query_key_value",
        ["--tuning", "lora", "--lora_target_modules", "dense,query_key_value"],
    ),
    "no steps": ([*PREFIX, "--max_steps", "0"], "--max_steps is 0; use 1 or more", PREFIX),
    "no steps, otherwise": (
        [*PREFIX, "--max_steps", "-3"],
        "--num_train_epochs",
        [*PREFIX, "--num_train_epochs", "2"],
    ),
    "no epochs": (
        [*PREFIX, "--num_train_epochs", "0"],
        "--num_train_epochs is 0; use a number above 0",
        [*PREFIX, "--num_train_epochs", "0.5"],
    ),
    "no memory": (
        [*PREFIX, "--gpu_memory", "0"],
        "--gpu_memory is 0; use a number above 0",
        [*PREFIX, "--gpu_memory", "8"],
    ),
    "checkpointing": (
        [*PREFIX, "--gradient_checkpointing", "some"],
        "auto, true or false",
        [*PREFIX, "--gradient_checkpointing", "true"],
    ),
    "its options": (
        [*PREFIX, "--gradient_checkpointing_kwargs", "[1]"],
        '{"use_reentrant": false}',
        [*PREFIX, "--gradient_checkpointing_kwargs", '{"use_reentrant": false}'],
    ),
    "validation without rows": (
        [*PREFIX, "--eval_strategy", "steps"],
        "--validation_file",
        [*PREFIX, "--eval_strategy", "steps", "--validation_file", ROWS],
    ),
    "patience": (
        [*PREFIX, "--early_stopping_patience", "2"],
        "--load_best_model_at_end",
        [
            *(*PREFIX, "--early_stopping_patience", "2", "--load_best_model_at_end"),
            *("--eval_strategy", "steps", "--validation_file", ROWS),
        ],
    ),
    "both dtypes": ([*PREFIX, "--bf16", "--fp16"], "keep one", [*PREFIX, "--bf16"]),
    "recipe": (
        [*PREFIX, "--recipe", "mine"],
        "use corrected or published",
        [*PREFIX, "--recipe", "published"],
    ),
    "format": ([*PREFIX, "--format", "xml"], "use auto, columns,", [*PREFIX, "--format", "alpaca"]),
    "turns": ([*PREFIX, "--turns", "2"], "use all or last.", [*PREFIX, "--turns", "last"]),
    "format with columns": (
        [*PREFIX, "--format", "alpaca", "--prompt_column", "q"],
        "leave one of them out",
        [*PREFIX, "--format", "alpaca"],
    ),
    "bits": (
        [*PREFIX, "--quantization_bit", "3"],
        "4 or 8, or leave it out",
        [*PREFIX, "--quantization_bit", "4"],
    ),
    "two starts": (
        ["--init_from", "a", "--ptuning_checkpoint", "b"],
        "leave one out",
        ["--init_from", "a"],
    ),
    "unknown preset": (
        [*PREFIX, "--preset", "soft"],
        "task, gentle, lima",
        [*PREFIX, "--preset", "lima"],
    ),
    "preset of lora": (
        ["--tuning", "lora", "--preset", "gentle"],
        "leave --preset out and give --learning_rate",
        ["--tuning", "lora", "--learning_rate", "1e-3"],
    ),
    "spread of lora": (
        ["--tuning", "lora", "--prefix_init_std", "1"],
        "leave it out",
        ["--tuning", "lora"],
    ),
    "spread 0": (
        [*PREFIX, "--prefix_init_std", "0"],
        "a number above 0",
        [*PREFIX, "--prefix_init_std", "1e-3"],
    ),
    "spread of an old prefix": (
        ["--ptuning_checkpoint", "old", "--prefix_init_std", "1"],
        "no new prefix",
        ["--ptuning_checkpoint", "old"],
    ),
    "mix without ratio": (
        [*PREFIX, "--mix", "general.jsonl"],
        "FILE:RATIO",
        [*PREFIX, "--mix", f"{ROWS}:0.2"],
    ),
    "mix of nothing": (
        [*PREFIX, "--mix", "none.jsonl:0.2"],
        "no file none.jsonl",
        [*PREFIX, "--mix", f"{ROWS}:0.2"],
    ),
    "prompts nowhere": (
        [*PREFIX, "--do_predict", "--test_file", "t", "--general_prompts", "none"],
        "--general_prompts is none",
        [*PREFIX, "--do_predict", "--test_file", "t"],
    ),
    "other config": (
        [*PREFIX, "--config_name", "X"],
        "--config_name is X, which is not supported",
        PREFIX,
    ),
    "hub data": ([*PREFIX, "--dataset_name", "adgen"], "give --train_file", PREFIX),
    "no column": (
        [*PREFIX, "--lerning_rate", "1"],
        "--learning_rate",
        [*PREFIX, "--learning_rate", "1"],
    ),
    "model": (
        [*PREFIX, "--model_name_or_path", "./nowhere"],
        "or nano",
        [*PREFIX, "--model_name_or_path", "nano"],
    ),
}


@pytest.mark.parametrize("case", sorted(HINTS))
def test_a_hint_names_flags_of_main_and_following_it_helps(case, tmp_path):
    more, needed, followed = HINTS[case]
    with pytest.raises(UsageError) as caught:
        parse_arguments(train(tmp_path, *more))
    message = str(caught.value)
    assert needed in message
    assert "\n" not in message
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*", message)) - set(more)
    assert named <= set(make_parser()._option_string_actions), message
    assert isinstance(parse_arguments(train(tmp_path, *followed)), RunConfig)


def test_the_config_of_the_base_itself_is_accepted(tmp_path):
    assert isinstance(read(tmp_path, "--config_name", "ptuning/nano/weights"), RunConfig)


def test_a_checkpoint_of_another_kind_is_reported(tmp_path, adapter):
    more = ["--tuning", "full", "--ptuning_checkpoint", str(adapter)]
    with pytest.raises(UsageError, match="is a lora checkpoint"):
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
    assert parse_arguments([*flags, "--tuning", "full"]).tuning == "full"


def test_smoothing_says_what_it_smooths(tmp_path):
    (notice,) = read(tmp_path, "--label_smoothing_factor", "0.1").notices
    assert notice.startswith("--label_smoothing_factor 0.1 smooths the training loss")
    assert read(tmp_path, "--label_smoothing_factor", "0").notices == ()
