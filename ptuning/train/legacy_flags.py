"""Old command lines on a current transformers: flags that were renamed, and flags that mean
nothing any more.

The published scripts were written for transformers 4.27; the tables below are the difference of its
Seq2SeqTrainingArguments to those of transformers 5.
"""

from collections.abc import Sequence

# Old name -> today's; the value stays as it is.
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
# Old flag -> why it is accepted and ignored.
IGNORED = {
    "fp16_backend": "the frozen base needs no autocast",
    "half_precision_backend": "the frozen base needs no autocast",
    "fp16_opt_level": "the frozen base needs no autocast",
    "sharded_ddp": "fairscale is gone; a prefix is small enough for plain DDP",
    "fsdp_min_num_params": "use --fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "use --fsdp_config",
    "include_inputs_for_metrics": "scores come from the predictions file",
    "jit_mode_eval": "use --torch_compile",
    "torchdynamo": "use --torch_compile",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR instead",
    "mp_parameters": "SageMaker's model parallelism is not supported",
    "past_index": "ChatGLM has no such output",
    "push_to_hub_organization": "use --hub_model_id",
    "ray_scope": "there is no hyper-parameter search here",
    "tpu_metrics_debug": "TPUs are not supported",
    "tpu_num_cores": "TPUs are not supported",
    "use_ipex": "torch has those kernels itself",
    "use_legacy_prediction_loop": "there is one prediction loop",
    "use_mps_device": "Apple's GPU is found by itself",
    "xpu_backend": "torch finds it by itself",
}
FALSE_WORDS = ("false", "no", "0", "f", "n")


def translate_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line for today's parser, and one notice for each old flag in it.

    >>> translate_flags(["--no_cuda", "--tpu_num_cores", "8", "--seed=1"])[0]
    ['--use_cpu', '--seed=1']
    """
    translated: list[str] = []
    notices: list[str] = []
    ignoring = False  # inside the values of an ignored flag
    for position, word in enumerate(argv):
        if not word.startswith("--"):
            if not ignoring:
                translated.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        ignoring = name in IGNORED or name in REPLACED
        if name in RENAMED:
            notices.append(f"--{name} is called --{RENAMED[name]} now.")
            translated.append(f"--{RENAMED[name]}{equals}{value}")
        elif name in REPLACED:
            if not equals:
                value = "".join(argv[position + 1 : position + 2])
            _replace(name, value.lower() not in FALSE_WORDS, translated, notices)
        elif name in IGNORED:
            notices.append(_ignored(name))
        else:
            translated.append(word)
    return translated, notices


def _replace(name: str, is_on: bool, translated: list[str], notices: list[str]) -> None:
    flag, value = REPLACED[name]
    notices.append(f"--{name} is written --{flag} {value} now.")
    if is_on:
        translated += [f"--{flag}", value]


def _ignored(name: str) -> str:
    return f"--{name} has no meaning any more and is ignored ({IGNORED[name]})."


def translate_keys(values: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """Do the same for a JSON file of flags."""
    translated: dict[str, object] = {}
    notices = []
    for name, value in values.items():
        if name in RENAMED:
            notices.append(f"{name} is called {RENAMED[name]} now.")
            translated[RENAMED[name]] = value
        elif name in REPLACED:
            flag, new_value = REPLACED[name]
            notices.append(f"{name} is written {flag}: {new_value} now.")
            if value:
                translated[flag] = new_value
        elif name in IGNORED:
            notices.append(_ignored(name).removeprefix("--"))
        else:
            translated[name] = value
    return translated, notices
