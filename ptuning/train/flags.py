"""Every flag of main.py: name, type, default, and a help text with units.

Declarations only: `parser` parses them, `run_config` merges and checks them. Names are the
published ones. transformers' other training flags are accepted too and passed to its Trainer. This
module imports neither torch nor transformers.
"""

from dataclasses import dataclass, field
from typing import Any

# The evaluation batch, in rows, when none is given. Up to many rows a decoding step takes as long
# as reading the weights does: on a CPU 64 rows are about ten times as fast as one
# (docs/performance.md). But each row has its own KV cache: 64 rows of 128 tokens take 7.5 GB in
# ChatGLM-6B in float32.
MOST_ROWS, LEAST_ROWS = 64, 8


class UsageError(ValueError):
    """A run that cannot start as asked: what was given, what is needed and what to type."""


def flag(default: Any, help_text: str, **more: Any) -> Any:
    """Declare one flag; `more` may hold argparse's `nargs` and `const`."""
    return field(default=default, metadata={"help": help_text, **more})


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The base model, and what is tuned in it."""

    model_name_or_path: str = flag("", "Base model: a directory, a hub id, or nano (embedded).")
    tuning: str | None = flag(
        None,
        "What to train: ptuning (a prefix), lora (an adapter) or full (all weights). Default: the "
        "kind of --ptuning_checkpoint; ptuning with --pre_seq_len; full with --deepspeed.",
    )
    ptuning_checkpoint: str | None = flag(
        None,
        "What to evaluate or to start training from: the directory of a prefix, an adapter or a "
        "fully tuned model, or a prefix's pytorch_model.bin or .safetensors file.",
    )
    init_from: str | None = flag(
        None,
        "Start a new training run from the weights of an earlier one, with a fresh optimizer and "
        "schedule. Takes what --ptuning_checkpoint takes.",
    )
    pre_seq_len: int | None = flag(None, "Number of prefix tokens. Default: the checkpoint's.")
    prefix_projection: bool | None = flag(
        None, "Train the prefix through a two-layer MLP. Default: as in the checkpoint, else false."
    )
    preset: str | None = flag(
        None,
        "Matching defaults: task (--learning_rate 2e-2) for the best task score, gentle "
        "(--learning_rate 1e-3 --prefix_init_std 1e-3) to preserve more of the base's abilities, "
        "lima for about 1,000 curated rows: 15 epochs, AdamW betas 0.9 and 0.95, weight decay 0.1, "
        "--learning_rate 2e-2 with linear decay to a tenth and no warm-up, a checkpoint per epoch "
        "(LIMA's --layer_dropout 0.3 is not included). Flags that are typed override them. "
        "Default: none.",
    )
    prefix_init_std: float | None = flag(
        None,
        "Standard deviation of a new prefix's entries. Near 0 the prefix hardly changes the base "
        "at the start. Default: 1, as published.",
    )
    lora_rank: int | None = flag(None, "Rank of a new LoRA adapter. Default: 8.")
    lora_alpha: float | None = flag(None, "LoRA's update is scaled by alpha / rank. Default: 16.")
    lora_dropout: float | None = flag(
        None, "Dropout probability on LoRA's input in training, from 0 to below 1. Default: 0.1."
    )
    lora_target_modules: str | None = flag(
        None,
        "Linear layers that get LoRA, comma-separated: query_key_value, dense, dense_h_to_4h, "
        "dense_4h_to_h. Default: query_key_value.",
    )
    layer_dropout: float = flag(
        0.0,
        "Residual dropout in training, from 0 to below 1: the probability at the top layer, rising "
        "linearly from 0 at the bottom. LIMA: 0.3, or 0.2 for small models.",
    )
    quantization_bit: int | None = flag(
        None, "Bits per weight of the frozen base, 4 or 8. Default: as stored in the checkpoint."
    )
    quantization_backend: str = flag(
        "auto", "Kernels for quantised weights: auto, torch, triton or cpm_kernels."
    )
    quantize_embeddings: bool = flag(
        False, "Store the word embedding, and the output head tied to it, in int8 as well."
    )
    tokenizer_name: str | None = flag(None, "Tokenizer directory or hub id. Default: the base's.")
    cache_dir: str | None = flag(None, "Directory of hub downloads. Default: transformers' cache.")
    model_revision: str = flag("main", "Branch, tag or commit of a hub model.")
    use_auth_token: bool = flag(False, "Use the token of `hf auth login` for a private hub model.")


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Data files, their columns, lengths, and how answers are generated."""

    train_file: tuple[str, ...] | None = flag(
        None,
        "Training rows: .json (an array, or one object per line), .jsonl, .csv, .tsv or .parquet, "
        "also .gz. Several files, or a pattern such as 'data/*.jsonl', are concatenated.",
    )
    validation_file: tuple[str, ...] | None = flag(
        None, "Rows for the validation loss; also answered and scored if --test_file is unset."
    )
    test_file: tuple[str, ...] | None = flag(
        None, "Rows to answer with --do_predict; those with a reference answer are scored."
    )
    format: str = flag(
        "auto",
        "Layout of a row: columns (a prompt and an answer), alpaca, sharegpt, messages, history, "
        "lima, or auto, which detects it from the columns and prints what it found.",
    )
    prompt_column: str | None = flag(
        None, "Column of the prompt. Default: the checkpoint's, else detected (--format)."
    )
    input_column: str | None = flag(
        None, "Column appended to the prompt on a new line. Default: as --prompt_column."
    )
    response_column: str | None = flag(
        None, "Column of the answer. Default: the checkpoint's, else detected (--format)."
    )
    history_column: str | None = flag(
        None, "Column of the earlier [question, answer] turns. Default: as --prompt_column."
    )
    turns: str = flag("all", "Answers of a conversation to use: all (one row each) or last.")
    allow_repeated_prompts: bool = flag(
        False, "Train even if prompts repeat only because a column is unused."
    )
    source_prefix: str = flag("", "Text put before every prompt.")
    max_source_length: int = flag(
        1024,
        "Longest prompt in tokens, including [gMASK] and <sop>; the rest is cut. With a "
        "checkpoint, its own value is the default.",
    )
    max_target_length: int = flag(
        128, "Longest answer in tokens; the rest is cut. A checkpoint's own value is the default."
    )
    val_max_target_length: int | None = flag(
        None, "Longest generated answer in tokens. Default: --max_target_length."
    )
    recipe: str = flag(
        "corrected",
        "corrected, or published to treat empty histories, long prompts, truncated answers and "
        "sampled scores as the published code did.",
    )
    mix: str | None = flag(
        None,
        "Mix general rows into the training rows: FILE:RATIO, where RATIO is their share of an "
        "epoch, or FILE:RATIO:PROMPT,RESPONSE to name their columns too. FILE takes the formats "
        "of --train_file. Default: none.",
    )
    max_train_samples: int | None = flag(None, "Use only the first N training rows. Default: all.")
    max_eval_samples: int | None = flag(None, "Use only the first N validation rows. Default: all.")
    max_predict_samples: int | None = flag(None, "Answer only the first N rows. Default: all.")
    num_beams: int | None = flag(None, "Beams when generating answers. Default: 1 (greedy).")
    compare_base: bool = flag(
        True, "Also answer with the untouched base, and report its scores next to the tuned ones."
    )
    measure_retention: bool | None = flag(
        None,
        "With --do_predict: measure how much the answers to general prompts differ from the "
        "base's. Default: as --compare_base.",
    )
    general_prompts: str | None = flag(
        None,
        "File of the prompts for --measure_retention, in a column prompt. Default: "
        "general_prompts.json in the base's directory, else the 40 prompts of this package.",
    )
    overwrite_cache: bool = flag(False, "Tokenize again even if the token cache has the rows.")
    token_cache_dir: str | None = flag(
        None, "Directory of the token cache. Default: $PTUNING_CACHE, else ~/.cache/ptuning/tokens."
    )
    pad_to_max_length: bool = flag(
        False, "Pad to max_source_length + max_target_length tokens. Slower; for comparisons."
    )


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """Output, stopping, and memory."""

    output_dir: str = flag("", "Directory for checkpoints, predictions and the report.")
    overwrite_output_dir: bool = flag(False, "Start over in output_dir, deleting its checkpoints.")
    resume_from_checkpoint: str | None = flag(
        None,
        "Resume training: auto (the newest complete checkpoint in output_dir, if any), true (the "
        "same, but there must be one) or a checkpoint-N directory. Default: resume if the same "
        "command was interrupted.",
    )
    per_device_eval_batch_size: int | None = flag(
        None,
        f"Rows per batch in validation and answering, per device. Default: {MOST_ROWS}, or fewer "
        f"if memory is short, but at least {LEAST_ROWS}.",
    )
    early_stopping_patience: int | None = flag(
        None, "Stop after N validations in a row without a better loss. Default: never."
    )
    max_bad_steps: int = flag(
        5,
        "Stop after N steps in a row whose loss or gradient is not finite or exactly 0; such steps "
        "are skipped. 0 never stops.",
    )
    gradient_checkpointing: str = flag(
        "auto",
        "Recompute activations in the backward pass to save memory: auto (in as many layers as "
        "memory requires), true (in all) or false (in none).",
        nargs="?",
        const="true",
    )
    checkpoint_layers: int | None = flag(
        None, "Number of layers to checkpoint. Default: auto's choice; all layers with true."
    )
    gpu_memory: float | None = flag(
        None,
        "GPU memory limit in GB (10**9 bytes), within which checkpointed layers, loss chunks and "
        "the evaluation batch are chosen. python -m ptuning plan accepts it without such a GPU. "
        "Default: the free memory.",
    )
    torch_compile: bool | None = flag(
        None, "Compile the layers. Default: on CUDA in bfloat16, in runs long enough to gain."
    )
    report_to: str = flag(
        "none", "Where to log besides the terminal: none, tensorboard, wandb, swanlab, mlflow, ..."
    )
    save_total_limit: int | None = flag(None, "Keep only the newest N checkpoints. Default: all.")


@dataclass(frozen=True, kw_only=True)
class TrainerArguments:
    """Flags of transformers that other parts of a run read as well."""

    do_train: bool = flag(False, "Train on --train_file.")
    do_eval: bool = flag(False, "Compute the loss on --validation_file.")
    do_predict: bool = flag(False, "Answer and score the rows of --test_file.")
    per_device_train_batch_size: int = flag(8, "Rows per forward pass, per device.")
    gradient_accumulation_steps: int = flag(1, "Forward passes per optimizer step.")
    learning_rate: float = flag(5e-5, "Peak learning rate.")
    lr_scheduler_type: str = flag("linear", "Learning-rate schedule.")
    num_train_epochs: float = flag(3.0, "Epochs to train; --max_steps overrides it.")
    max_steps: int = flag(-1, "Optimizer steps to train; -1 uses --num_train_epochs.")
    eval_strategy: str = flag("no", "When to compute the validation loss: no, steps or epoch.")
    load_best_model_at_end: bool = flag(
        False, "Finish with the checkpoint that has the lowest validation loss."
    )
    seed: int = flag(42, "Seed of row order, dropout and new weights.")
    use_cpu: bool = flag(False, "Run on the CPU even if there is a GPU.")
    bf16: bool = flag(False, "bfloat16 for the frozen base, or mixed precision with --tuning full.")
    fp16: bool = flag(False, "float16 for the frozen base, or mixed precision with --tuning full.")
    deepspeed: str | None = flag(None, "DeepSpeed configuration, a JSON file. Default: none.")
    fsdp: str | None = flag(
        None, "Shard the model with PyTorch FSDP, e.g. full_shard. Default: off."
    )
    generation_max_length: int | None = flag(
        None, "Limit of prompt plus answer in tokens. Default: no limit."
    )
    generation_num_beams: int | None = flag(None, "As --num_beams, which overrides it.")
    disable_tqdm: bool = flag(False, "Print plain lines, without a progress bar.")
    push_to_hub: bool = flag(False, "Upload the checkpoints to the Hugging Face hub.")
    activation_checkpointing: str | None = flag(
        None, "transformers' newer name of --gradient_checkpointing.", nargs="?", const="true"
    )
    activation_checkpointing_kwargs: str | None = flag(
        None, "transformers' newer name of --gradient_checkpointing_kwargs."
    )
    gradient_checkpointing_kwargs: str | None = flag(
        None, "Options of torch.utils.checkpoint, a JSON object. Default: this toolkit's own."
    )
    torch_compile_backend: str | None = flag(None, "Backend of --torch_compile. Default: inductor.")
    torch_compile_mode: str | None = flag(
        None, "Mode of --torch_compile, e.g. max-autotune. Default: default."
    )


GROUPS = (ModelArguments, DataArguments, TrainingArguments, TrainerArguments)
