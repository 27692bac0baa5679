"""Every flag parses, also those of the published scripts and of transformers 4.27, and mistakes are one line."""

import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from ptuning.train import parser
from ptuning.train.flags import GROUPS, UsageError
from ptuning.train.parser import (
    IGNORED,
    REFUSED,
    RENAMED,
    REPLACED,
    make_parser,
    transformers_flags,
)
from ptuning.train.run_config import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
NEEDED = [
    *("--do_train", "--train_file", "rows.json", "--model_name_or_path", "my/base"),
    *("--output_dir", "out", "--pre_seq_len", "4"),
]
OF_VALIDATION = ["--validation_file", "rows.json", "--test_file", "rows.json"]

# The fields of transformers 4.27.1's Seq2SeqTrainingArguments, with a value a script may hold.
OF_THE_OLD_TRAINER = """
adafactor=false adam_beta1=0.9 adam_beta2=0.999 adam_epsilon=1e-8 auto_find_batch_size=false bf16=false
bf16_full_eval=false data_seed=1 dataloader_drop_last=false dataloader_num_workers=0
dataloader_pin_memory=true ddp_bucket_cap_mb=25 ddp_find_unused_parameters=false ddp_timeout=1800
debug=underflow_overflow disable_tqdm=true do_eval=false do_predict=false eval_accumulation_steps=1
eval_delay=0 eval_steps=10 evaluation_strategy=no fp16=false fp16_backend=auto fp16_full_eval=false
fp16_opt_level=O1 fsdp= fsdp_min_num_params=0 fsdp_transformer_layer_cls_to_wrap=Layer
full_determinism=false generation_max_length=64 generation_num_beams=1 gradient_accumulation_steps=16
gradient_checkpointing=false greater_is_better=false group_by_length=false half_precision_backend=auto
hub_model_id=me/it hub_private_repo=false hub_strategy=every_save hub_token=t ignore_data_skip=false
include_inputs_for_metrics=false jit_mode_eval=false label_names=labels label_smoothing_factor=0.0
learning_rate=2e-2 length_column_name=length load_best_model_at_end=false local_rank=-1
log_level=passive log_level_replica=warning log_on_each_node=true logging_dir=logs
logging_first_step=false logging_nan_inf_filter=true logging_steps=10 logging_strategy=steps
lr_scheduler_type=linear max_grad_norm=1.0 max_steps=3000 metric_for_best_model=loss mp_parameters=
no_cuda=true num_train_epochs=3 optim=adamw_torch optim_args= overwrite_output_dir=true past_index=-1
per_device_eval_batch_size=1 per_device_train_batch_size=1 per_gpu_eval_batch_size=1
per_gpu_train_batch_size=1 predict_with_generate=true prediction_loss_only=false push_to_hub=false
push_to_hub_model_id=me push_to_hub_organization=us push_to_hub_token=t ray_scope=last
remove_unused_columns=true report_to=none resume_from_checkpoint=auto run_name=run
save_on_each_node=false save_steps=1000 save_strategy=steps save_total_limit=2 seed=42 sharded_ddp=
skip_memory_metrics=true sortish_sampler=false tf32=false torch_compile=false
torch_compile_backend=inductor torch_compile_mode=default torchdynamo=inductor tpu_metrics_debug=false
tpu_num_cores=8 use_ipex=false use_legacy_prediction_loop=false use_mps_device=false
warmup_ratio=0.1 warmup_steps=0 weight_decay=0 xpu_backend=ccl
""".split()

OF_THE_PUBLISHED_SCRIPTS = """
config_name=my/base tokenizer_name=t cache_dir=d use_fast_tokenizer=true model_revision=main
use_auth_token=false resize_position_embeddings=false quantization_bit=4 pre_seq_len=128
prefix_projection=false ptuning_checkpoint=p lang=zh dataset_config_name=c
train_file=a validation_file=b test_file=c overwrite_cache=true preprocessing_num_workers=4
max_source_length=64 max_target_length=64 val_max_target_length=64 pad_to_max_length=false
max_train_samples=10 max_eval_samples=10 max_predict_samples=10 num_beams=1
ignore_pad_token_for_loss=true source_prefix=x forced_bos_token=x prompt_column=content
response_column=summary history_column=history
""".split()


def read(*more):
    return parse_arguments([*NEEDED, *more])


def test_a_mistake_is_reported_within_a_second_and_without_torch():
    """Help under 0.5 s of CPU, a typo within 1 s; twice that here, for a machine under load."""
    code = (
        "import sys, time; sys.argv = ['main.py'] + sys.argv[1:]\n"
        "import main\n"
        "try: code = main.main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.stderr.write(f'\\n{code} {time.process_time()}')"
    )
    for flags, code_wanted in ((["--help"], 0), ([], 2), (["--learnin_rate", "3"], 2)):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
        )
        code_found, cpu_s = done.stderr.splitlines()[-1].split()
        assert (int(code_found), done.returncode) == (code_wanted, 0), done.stderr
        assert float(cpu_s) < 1
        assert time.monotonic() - started < 10
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("spelling", ["--prefix_projection", "--prefix-projection"])
def test_a_switch_is_read_in_every_published_spelling(spelling):
    assert read().prefix_projection is None
    assert read(spelling).prefix_projection is True
    assert read(spelling, "True").prefix_projection is True
    assert read(f"{spelling}=false").prefix_projection is False
    assert read(spelling, "--do_eval", "--validation_file", "d").do_eval is True
    assert read("--no_compare_base").compare_base is False
    assert read("--no-compare-base").compare_base is False
    assert read("--measure_retention").measures_retention is True


def test_a_flag_with_hyphens_is_the_flag():
    config = read("--pre-seq-len", "128")
    assert (config.pre_seq_len, config.tuning) == (128, "ptuning")


def test_names_are_not_abbreviated():
    with pytest.raises(UsageError, match=r"--pre_seq \(did you mean --pre_seq_len"):
        read("--pre_seq", "8")


@pytest.mark.parametrize(
    ("more", "needed"),
    [
        (["--max_steps", "many"], "--max_steps is many; give a whole number"),
        (["--learning-rate", "high"], "--learning-rate is high; give a number"),
        (["--use_cpu", "perhaps"], "--use_cpu is perhaps; give true or false"),
        (["--max_steps"], "--max_steps has no value"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_line(more, needed):
    with pytest.raises(UsageError) as caught:
        read(*more)
    assert needed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_flag_of_transformers_is_read_as_it_declares_it():
    """Against the classes themselves: what is read from their source is what they hold."""
    from dataclasses import MISSING, fields

    from transformers import Seq2SeqTrainingArguments

    real = {f.name: f for f in fields(Seq2SeqTrainingArguments) if f.init}
    read = {flag.name: flag for flag in transformers_flags()}
    assert set(real) - set(read) <= {"parallelism_config"}
    assert set(read) <= set(real)
    for name, flag in read.items():
        if flag.default is not None:
            assert real[name].default is not MISSING
            assert real[name].default == flag.default, name
        assert flag.help, name


def test_declared_defaults_are_those_of_transformers():
    from dataclasses import fields

    from transformers import Seq2SeqTrainingArguments

    from ptuning.train.flags import TrainerArguments

    theirs = {f.name: f.default for f in fields(Seq2SeqTrainingArguments)}
    changed = {"eval_strategy", "lr_scheduler_type", "disable_tqdm"}
    for flag in fields(TrainerArguments):
        if flag.name in theirs and flag.name not in changed:
            assert flag.default == theirs[flag.name], flag.name


def test_help_shows_every_flag_once_and_no_old_one():
    text = make_parser().format_help()
    for name in ("--pre_seq_len", "--gradient_accumulation_steps", "--weight_decay"):
        assert text.count(f"  {name} ") == 1
    assert "--pre-seq-len" not in text
    assert "--no_cuda" not in text


@pytest.mark.parametrize(
    ("content", "needed"),
    [
        ('{"lerning_rate": 1}', "did you mean --learning_rate"),
        ('{"max_steps": "many"}', "--max_steps is many; give a whole number"),
        ('{"max_steps": 2.5}', "--max_steps is 2.5; give a whole number"),
        ('{"max_steps": true}', "--max_steps is true; give a whole number"),
        ('{"max_steps": [5]}', "--max_steps is [5]; give a whole number"),
        ('{"learning_rate": [0.001]}', "--learning_rate is [0.001]; give a number"),
        ('{"do_train": [true]}', "--do_train is [true]; give true or false"),
        ('{"no_compare_base": {}}', "--no_compare_base is {}; give true or false"),
        ('{"use_cpu": "perhaps"}', "--use_cpu is perhaps; give true or false"),
        ("[1]", "holds a list"),
        ("{", "not a JSON file"),
    ],
)
def test_a_wrong_json_file_is_one_line(content, needed, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        parse_arguments([str(path)])
    assert needed in str(caught.value)


def test_a_list_or_an_object_in_a_json_file_is_a_value(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(
        '{"past_index": {}, "train_file": ["a.json", "-b.json"], "fsdp_config": {"x": 1}}'
    )
    values, notices = parser.parse([str(path)])
    assert values == {"train_file": ["a.json", "-b.json"], "fsdp_config": {"x": 1}}
    assert [notice[:25] for notice in notices] == ["--past_index is ignored: "]


def test_words_that_are_no_flags_are_named_as_typed():
    with pytest.raises(UsageError, match=r"^stray is not a flag; python main\.py --help"):
        read("stray")
    with pytest.raises(
        UsageError, match=r"run\.json is not a flag; a JSON file of flags goes first"
    ):
        read("run.json")


def test_a_json_file_may_spell_flags_as_a_command_line_does(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(
        '{"max-steps": 3, "no_compare_base": true, "activation_checkpointing": false, '
        '"resume_from_checkpoint": true}'
    )
    config = parse_arguments([str(path), *NEEDED])
    assert (config.max_steps, config.compare_base, config.checkpointing) == (3, False, "false")
    assert config.resume_from_checkpoint == "true"


# ---- Old flags ----


@pytest.mark.parametrize("pair", OF_THE_OLD_TRAINER + OF_THE_PUBLISHED_SCRIPTS)
def test_every_old_flag_parses(pair):
    name, _, value = pair.partition("=")
    parse_arguments([*NEEDED, f"--{name}", value] if value else [*NEEDED, f"--{name}="])


@pytest.mark.parametrize(
    "pair",
    [p for p in OF_THE_OLD_TRAINER + OF_THE_PUBLISHED_SCRIPTS if p.endswith(("true", "false"))],
)
def test_every_old_switch_may_stand_alone(pair):
    name = pair.partition("=")[0]
    parse_arguments([*NEEDED, *OF_VALIDATION, f"--{name}"])
    parse_arguments([f"--{name}", *NEEDED, *OF_VALIDATION])


def test_every_old_flag_is_read_from_a_json_file(tmp_path):
    values = {"do_train": True, "train_file": "rows.json", "model_name_or_path": "my/base"}
    values |= {"output_dir": "out", "pre_seq_len": 4}
    for pair in OF_THE_OLD_TRAINER + OF_THE_PUBLISHED_SCRIPTS:
        name, _, value = pair.partition("=")
        (tmp_path / "run.json").write_text(json.dumps(values | {name: value}))
        if name not in ("use_auth_token",):
            parse_arguments([str(tmp_path / "run.json")])


def test_an_ignored_flag_takes_its_values_with_it_and_is_named_once():
    config = parse_arguments([*NEEDED, "--tpu_num_cores", "8", "--ray_scope=last", "--seed", "1"])
    assert config.seed == 1
    assert [notice.split()[0] for notice in config.notices] == ["--tpu_num_cores", "--ray_scope"]


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_a_renamed_flag_keeps_its_value_and_its_type(old):
    value = {"no_cuda": "true", "evaluation_strategy": "no", "warmup_ratio": "0.5"}.get(old, "3")
    config = parse_arguments([*NEEDED, f"--{old}={value}"])
    found = vars(config) | config.trainer_flags
    assert str(found[RENAMED[old]]).lower() == value
    assert config.notices == (f"--{old} is called --{RENAMED[old]} now.",)


@pytest.mark.parametrize("old", sorted(REPLACED))
def test_a_replaced_switch_is_turned_only_when_it_was_on(old, tmp_path):
    new, value = REPLACED[old]
    for more in ([f"--{old}"], [f"--{old}", "true", "--seed", "1"]):
        assert parse_arguments([*NEEDED, *more]).trainer_flags == {new: value}
    assert parse_arguments([*NEEDED, f"--{old}", "False"]).trainer_flags == {}
    path = tmp_path / "run.json"
    for is_on in (True, False):
        path.write_text(json.dumps({old: is_on}))
        config = parse_arguments([str(path), *NEEDED])
        assert config.trainer_flags == ({new: value} if is_on else {})


def test_ignored_keys_of_a_json_file_are_named(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(dict.fromkeys(IGNORED, 1) | {"seed": 2}))
    config = parse_arguments([str(tmp_path / "run.json"), *NEEDED])
    assert config.seed == 2
    assert config.trainer_flags == {}
    assert len(config.notices) == len(IGNORED)


def test_no_flag_of_today_is_in_the_tables_of_old_ones():
    today = {f.name for group in GROUPS for f in fields(group)}
    assert not today & {*RENAMED, *REPLACED, *IGNORED, *REFUSED}


def test_a_flag_that_this_transformers_still_has_is_declared_once(monkeypatch):
    """warmup_ratio is a deprecated flag of transformers 5.10, and none of later releases."""
    old = parser.Flag("warmup_ratio", "float | None", None, "", {})
    later = [flag for flag in parser.transformers_flags() if flag.name != "warmup_ratio"]
    monkeypatch.setattr(parser, "transformers_flags", lambda: (*later, old))
    config = parse_arguments([*NEEDED, "--warmup_ratio", "0.1"])
    assert config.notices[0] == "--warmup_ratio is called --warmup_steps now."
