#!/usr/bin/env bash
# Train a prefix (P-Tuning v2), score it against the untouched base model and print a table:  bash train.sh
#     MODEL=THUDM/chatglm-6b PRE_SEQ_LEN=64 bash train.sh --seed 7
#     TUNING=lora bash train.sh                       # a LoRA adapter instead of a prefix (docs/tuning.md)
#     NUM_GPUS=4 bash train.sh                        # as many rows per step, on four GPUs (docs/multi-gpu.md)
# The same command resumes a run that was interrupted. Settings are variables before the command; flags of main.py behind
# it win over them, and python main.py --help lists those. A path in a variable is looked up in your folder,
# then in the repository; OUTPUT_DIR is in your folder.
#
#   MODEL              a folder, a hub id or nano, the embedded model; unset: THUDM/chatglm-6b with a CUDA device, else nano
#   TUNING             what is trained: ptuning (a prefix, the default), lora (an adapter) or full (the whole model)
#   PRESET             task (best score on the task), gentle (keeps more of the base, docs/forgetting.md) or lima (few, curated rows)
#   TRAIN_FILE         rows to train on, a file or a pattern; unset: AdvertiseGen/train.json if it is there, else the sample in AdvertiseGen/sample
#   DEV_FILE           rows to score on; needed with TRAIN_FILE
#   NAME               name of the run; unset: the data's and the model's, such as adgen-nano
#   OUTPUT_DIR         folder of the run; unset, in the repository: output/NAME-pt-PRE_SEQ_LEN-LR, -lora-LR or -ft-LR
#   EPOCHS             passes over the training rows, instead of MAX_STEPS
#   NUM_GPUS           GPUs to use, one process each; unset: one
#   PYTHON             the Python to use; unset: .venv, made on the first run
# Defaults, where there are two: for nano, or for any other model.
set -euo pipefail
source "$(dirname "$0")/scripts/setup.sh"
show_help "$@"
source scripts/settings.sh
take_flags model_name_or_path=MODEL tuning=TUNING preset=PRESET pre_seq_len=PRE_SEQ_LEN learning_rate=LR output_dir=OUTPUT_DIR \
  max_steps=MAX_STEPS num_train_epochs=EPOCHS train_file=TRAIN_FILE validation_file=DEV_FILE -- "$@"
steps_or_epochs
choose_tuning
if [ -n "${TRAIN_FILE:-}" ] && [ -z "${DEV_FILE:-}" ]; then
  refuse "$(said TRAIN_FILE train_file) without DEV_FILE; name the rows to score on too: DEV_FILE=... bash train.sh"
fi
[ -z "${MODEL:-}" ] || resolve_model
resolve_data TRAIN_FILE DEV_FILE
choose_gpus
choose_python run

if [ -z "${MODEL:-}" ]; then
  case ${typed_use_cpu:-${typed_no_cuda:-false}} in
    [Ff]alse | [Nn]o | [FfNn0]) found=$("$PYTHON" scripts/environment.py cuda) ;;
    *) found="0 ${typed_use_cpu:+--use_cpu}${typed_no_cuda:+--no_cuda}" ;;
  esac
  MODEL=THUDM/chatglm-6b
  if [ "${found%% *}" = 0 ]; then
    MODEL=$NANO
    echo "${found#* }: training the embedded nano model." \
      "For ChatGLM-6B type: MODEL=THUDM/chatglm-6b bash train.sh (a hub id or a directory)" >&2
  fi
fi

case $TUNING-$PRESET in
  ptuning-gentle) setting --learning_rate LR 1e-3 ;;     # a prefix with PRESET=gentle
  ptuning-*) setting --learning_rate LR 2e-2 ;;          # a prefix: learning rate of the first step, then linear decay to 0
  lora-*) setting --learning_rate LR 1e-2 2e-4 ;;        # an adapter
  full-*) setting --learning_rate LR 1e-3 1e-4 ;;        # the whole model
esac
if [ "$TUNING" = ptuning ] && [ -z "$checkpoint" ]; then
  setting --pre_seq_len PRE_SEQ_LEN 128                  # prefix length in tokens, not a text length
else
  setting --pre_seq_len PRE_SEQ_LEN
fi
if [ -z "${EPOCHS:-}" ] && [ "$PRESET${MAX_STEPS:-}" != lima ]; then  # the preset sets 15 epochs
  setting --max_steps MAX_STEPS 400 3000                 # optimiser steps
fi
setting --num_train_epochs EPOCHS
setting --per_device_train_batch_size BATCH_SIZE 16/NUM_GPUS 1      # rows per forward pass and GPU
setting --gradient_accumulation_steps ACCUMULATION 1 16/NUM_GPUS    # forward passes per step
if [ "$PRESET" = lima ]; then                            # the preset does both after each epoch
  setting --save_steps SAVE_STEPS
  setting --eval_steps EVAL_STEPS
else
  setting --save_steps SAVE_STEPS 200 1000               # steps between two checkpoints
  setting --eval_steps EVAL_STEPS 100 1000               # steps between two validation losses
  given_flags+=(--eval_strategy steps)
fi
setting --logging_steps LOGGING_STEPS 10                 # steps between two loss lines
setting --max_source_length MAX_SOURCE_LENGTH 64         # tokens of the prompt, including [gMASK] and <sop>
setting --max_target_length MAX_TARGET_LENGTH 64         # tokens of the answer
setting --prompt_column PROMPT_COLUMN                    # field of the prompt; unset: found, as --format says
setting --response_column RESPONSE_COLUMN                # field of the answer; unset: found
setting --history_column HISTORY_COLUMN                  # field of earlier turns; unset: found
setting --per_device_eval_batch_size EVAL_BATCH_SIZE     # rows scored at a time; unset: up to 64
setting --quantization_bit QUANTIZATION_BIT              # 4 or 8: quantise the frozen base
setting --preset PRESET
if [ "$TUNING" != ptuning ]; then setting --tuning TUNING; fi

if [ -n "${OUTPUT_DIR:-}" ]; then
  OUTPUT_DIR=$(output_path "$OUTPUT_DIR")
else
  length=$PRE_SEQ_LEN
  if [ -z "$length" ] && [ -f "$checkpoint/prefix_config.json" ]; then
    length=$(sed -n 's/.*"prefix_length": *\([0-9]*\).*/\1/p' "$checkpoint/prefix_config.json")
  fi
  case $TUNING in ptuning) kind=pt${length:+-$length} ;; lora) kind=lora ;; full) kind=ft ;; esac
  OUTPUT_DIR=output/$(run_name)-$kind-$LR
fi

exec "$PYTHON" "${start[@]}" \
  --do_train --do_eval --do_predict --predict_with_generate \
  --train_file "$TRAIN_FILE" --validation_file "$DEV_FILE" --test_file "$DEV_FILE" \
  --model_name_or_path "$MODEL" --output_dir "$OUTPUT_DIR" \
  "${given_flags[@]}" ${words[@]+"${words[@]}"}
