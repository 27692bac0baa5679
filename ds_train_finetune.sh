#!/usr/bin/env bash
# Fine-tune the whole model on every GPU of this machine with DeepSpeed ZeRO:  bash ds_train_finetune.sh
# Every value below can be given from outside; further flags go to main.py. Score it afterwards: bash evaluate.sh
#     MODEL=/path/to/chatglm-6b NUM_GPUS=4 PRECISION=bf16 bash ds_train_finetune.sh
# A path in a variable is taken from your folder if it exists there, else from this one; OUTPUT_DIR from yours.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")"
given_devices=${CUDA_VISIBLE_DEVICES-all}
source scripts/setup.sh
source scripts/settings.sh  # for one GPU, so what was given is put back
if [ "$given_devices" = all ]; then unset CUDA_VISIBLE_DEVICES; else export CUDA_VISIBLE_DEVICES=$given_devices; fi
choose_python run

"$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)' ||
  die "$PYTHON lacks DeepSpeed. Type: $PYTHON -m pip install deepspeed"
NUM_GPUS=${NUM_GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}  # processes, one per GPU
[ "$NUM_GPUS" -gt 0 ] || die "torch finds no CUDA device here; the whole model on a CPU: TUNING=full bash train.sh"

MODEL=$(model_path "${MODEL:-THUDM/chatglm-6b}")
DEEPSPEED=$(input_path "${DEEPSPEED:-deepspeed.json}")  # DeepSpeed's own settings
LR=${LR:-1e-4}                             # learning rate of the first step; falls linearly to 0
MAX_STEPS=${MAX_STEPS:-5000}               # optimiser steps
SAVE_STEPS=${SAVE_STEPS:-1000}             # steps between two checkpoints, of a whole model each
SAVE_TOTAL_LIMIT=${SAVE_TOTAL_LIMIT:-2}    # checkpoints kept
LOGGING_STEPS=${LOGGING_STEPS:-10}         # steps between two loss lines
BATCH_SIZE=${BATCH_SIZE:-4}                # rows per forward pass and GPU
ACCUMULATION=${ACCUMULATION:-1}            # forward passes per step
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64} # tokens of the prompt, with [gMASK] and <sop>
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64} # tokens of the answer
PROMPT_COLUMN=${PROMPT_COLUMN:-content}    # field of a row: what is asked
RESPONSE_COLUMN=${RESPONSE_COLUMN:-summary} # field of a row: the answer
PRECISION=${PRECISION:-fp16}               # fp16 as published; bf16 where the GPUs have it
give --history_column "${HISTORY_COLUMN:-}" # field of a row: earlier turns; empty: none
OUTPUT_DIR=$(output_path "${OUTPUT_DIR:-output/${NAME:-adgen-chatglm-6b}-ft-$LR}")

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS" main.py \
  --deepspeed "$DEEPSPEED" --tuning full --do_train \
  --train_file "$TRAIN_FILE" --prompt_column "$PROMPT_COLUMN" --response_column "$RESPONSE_COLUMN" \
  --max_source_length "$MAX_SOURCE_LENGTH" --max_target_length "$MAX_TARGET_LENGTH" \
  --model_name_or_path "$MODEL" --output_dir "$OUTPUT_DIR" --overwrite_output_dir \
  --per_device_train_batch_size "$BATCH_SIZE" --gradient_accumulation_steps "$ACCUMULATION" \
  --max_steps "$MAX_STEPS" --logging_steps "$LOGGING_STEPS" --save_steps "$SAVE_STEPS" \
  --save_total_limit "$SAVE_TOTAL_LIMIT" --learning_rate "$LR" "--$PRECISION" \
  ${given_flags[@]+"${given_flags[@]}"} "$@"
