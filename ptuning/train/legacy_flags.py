"""Flags of old command lines: renamed, replaced, without effect, or not supported.

The published scripts were written for transformers 4.27. The tables are the difference of its
Seq2SeqTrainingArguments, and of the published arguments.py, from today's flags.
"""

from typing import Any, NamedTuple

# Old name -> today's name; the value stays the same.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a share of all steps
}
# Old switch -> today's flag and value.
REPLACED = {
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "adafactor": ("optim", "adafactor"),
}
# Old flag -> why it has no effect.
IGNORED = {
    "forced_bos_token": "ChatGLM's answers begin with <sop>",
    "dataset_config_name": "hub datasets are not read",
    "fp16_backend": "the frozen base needs no autocast",
    "fp16_opt_level": "the frozen base needs no autocast",
    "fsdp_min_num_params": "use --fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "use --fsdp_config",
    "half_precision_backend": "the frozen base needs no autocast",
    "ignore_pad_token_for_loss": "padding never counts in the loss",
    "include_inputs_for_metrics": "scores are computed from the predictions",
    "jit_mode_eval": "use --torch_compile",
    "lang": "it had no effect in the published code either",
    "logging_dir": "set the variable TENSORBOARD_LOGGING_DIR instead",
    "mp_parameters": "SageMaker's model parallelism is not supported",
    "past_index": "ChatGLM has no such output",
    "preprocessing_num_workers": "tokenization uses all cores by itself",
    "push_to_hub_organization": "use --hub_model_id",
    "ray_scope": "there is no hyperparameter search here",
    "remove_unused_columns": "rows are token ids when the trainer gets them",
    "resize_position_embeddings": "rotary positions need no resizing",
    "sharded_ddp": "fairscale is gone; a prefix is small enough for plain DDP",
    "torchdynamo": "use --torch_compile",
    "tpu_metrics_debug": "TPUs are not supported",
    "tpu_num_cores": "TPUs are not supported",
    "use_fast_tokenizer": "there is only one tokenizer",
    "use_ipex": "PyTorch includes these kernels",
    "use_legacy_prediction_loop": "there is only one prediction loop",
    "use_mps_device": "Apple's GPU is found by itself",
    "xpu_backend": "PyTorch finds it by itself",
}
# Old flag -> what to do instead.
REFUSED = {
    "config_name": "the shape is read from config.json in --model_name_or_path; leave it out",
    "dataset_name": "hub datasets are not read; save the rows as a file and give --train_file",
}
FALSE_WORDS = ("false", "no", "n", "f", "0")
TRUE_WORDS = ("true", "yes", "y", "t", "1")


class Today(NamedTuple):
    """What an old flag means today; flag None: nothing. `notice` is printed at the start."""

    flag: str | None
    value: Any
    notice: str


def translate(name: str, value: Any) -> Today:
    """Translate a flag of RENAMED, REPLACED or IGNORED with its value as typed.

    >>> translate("no_cuda", True)
    Today(flag='use_cpu', value=True, notice='--no_cuda is called --use_cpu now.')
    >>> translate("tpu_num_cores", 8).notice
    '--tpu_num_cores is ignored: TPUs are not supported.'
    """
    if name in RENAMED:
        return Today(RENAMED[name], value, f"--{name} is called --{RENAMED[name]} now.")
    if name in REPLACED:
        flag, new_value = REPLACED[name]
        is_on = str(value).lower() not in FALSE_WORDS
        notice = f"--{name} is written --{flag} {new_value} now."
        return Today(flag if is_on else None, new_value, notice)
    return Today(None, None, f"--{name} is ignored: {IGNORED[name]}.")
