"""Old command lines: every flag of the published scripts and of transformers 4.27's trainer parses."""

import json
from dataclasses import fields

import pytest

from ptuning.train import parser
from ptuning.train.flags import GROUPS
from ptuning.train.parser import IGNORED, REFUSED, RENAMED, REPLACED
from ptuning.train.run_config import parse_arguments

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
