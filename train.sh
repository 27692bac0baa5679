#!/usr/bin/env bash
# Train a prefix, score it against the untouched base, end with a table:  bash train.sh
# TUNING=lora bash train.sh trains a LoRA adapter, TUNING=full the whole model (docs/tuning.md).
# Every value below can be given from outside; further flags go to main.py:
#     MODEL=THUDM/chatglm-6b PRE_SEQ_LEN=64 bash train.sh --seed 7
#     bash train.sh --resume_from_checkpoint auto     # go on after Ctrl-C
#     NUM_GPUS=4 bash train.sh                        # as many rows a step, on four GPUs
# A path in a variable is taken from your folder if it exists there, else from this one; OUTPUT_DIR from yours.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")"
source scripts/setup.sh
if [ -n "${TRAIN_FILE:-}" ] && [ -z "${DEV_FILE:-}" ]; then
  refuse "TRAIN_FILE is given without DEV_FILE; give the rows to score on too: DEV_FILE=... TRAIN_FILE=... bash $0"
fi
source scripts/settings.sh
choose_python run

if [ -n "${MODEL:-}" ]; then
  MODEL=$(model_path "$MODEL")
else
  device=$("$PYTHON" -c '
import torch
print("cuda" if torch.cuda.is_available() else f"No CUDA device for torch {torch.__version__}")')
  if [ "$device" = cuda ]; then
    MODEL=THUDM/chatglm-6b
  else
    MODEL=$NANO
    echo "$device: training the embedded nano model." \
      "For ChatGLM-6B type: MODEL=THUDM/chatglm-6b bash train.sh (a hub id or a directory)" >&2
  fi
fi

TUNING=${TUNING:-ptuning}                  # what is trained: ptuning, lora or full
case $TUNING in
  ptuning | lora | full) ;;
  *) refuse "TUNING is $TUNING; use ptuning (a prefix), lora (an adapter) or full (the whole model)." ;;
esac
PRESET=${PRESET:-}                         # task or gentle (docs/forgetting.md); empty: the rates below
previous=
for word in "$@"; do                       # --preset NAME behind the command means the same
  if [ "$previous" = --preset ]; then PRESET=$word; fi
  case $word in --preset=*) PRESET=${word#*=} ;; esac
  previous=$word
done
case $PRESET in
  '' | task) prefix_rate=2e-2 ;;
  gentle) prefix_rate=1e-3 ;;
  *) refuse "PRESET is $PRESET; use task (the best score on the task) or gentle (keeps more of the base)." ;;
esac
# Learning rate of the first step, falling linearly to 0: for a prefix, for an adapter, for the whole model.
rate() {
  case $TUNING in ptuning) printf %s "$1" ;; lora) printf %s "$2" ;; full) printf %s "$3" ;; esac
}

if [ "$MODEL" = "$NANO" ]; then
  NAME=${NAME:-adgen-nano}                 # the run's name, under output/
  PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}          # prefix length in tokens; not a text length
  LR=${LR:-$(rate "$prefix_rate" 1e-2 1e-3)}
  MAX_STEPS=${MAX_STEPS:-400}              # optimiser steps
  SAVE_STEPS=${SAVE_STEPS:-200}            # steps between two checkpoints
  EVAL_STEPS=${EVAL_STEPS:-100}            # steps between two validation losses
  BATCH_SIZE=${BATCH_SIZE:-$(per_process 16)} # rows per forward pass
  ACCUMULATION=${ACCUMULATION:-1}          # forward passes per step
else
  NAME=${NAME:-adgen-chatglm-6b}           # from here on the published settings
  PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}
  LR=${LR:-$(rate "$prefix_rate" 2e-4 1e-4)} # published for a prefix and for the whole model
  MAX_STEPS=${MAX_STEPS:-3000}
  SAVE_STEPS=${SAVE_STEPS:-1000}
  EVAL_STEPS=${EVAL_STEPS:-1000}
  BATCH_SIZE=${BATCH_SIZE:-1}
  ACCUMULATION=${ACCUMULATION:-$(per_process 16)}
fi
LOGGING_STEPS=${LOGGING_STEPS:-10}         # steps between two loss lines
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64} # tokens of the prompt, with [gMASK] and <sop>
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64} # tokens of the answer
PROMPT_COLUMN=${PROMPT_COLUMN:-content}    # field of a row: what is asked
RESPONSE_COLUMN=${RESPONSE_COLUMN:-summary} # field of a row: the answer
give --history_column "${HISTORY_COLUMN:-}"     # field of a row: earlier turns; empty: none
give --per_device_eval_batch_size "${EVAL_BATCH_SIZE:-}" # rows scored at a time; empty: up to 64
give --preset "$PRESET"
give --quantization_bit "${QUANTIZATION_BIT:-}" # 4 or 8; empty: the base as it is stored
if [ -n "${OUTPUT_DIR:-}" ]; then
  OUTPUT_DIR=$(output_path "$OUTPUT_DIR")
else
  case $TUNING in
    ptuning) OUTPUT_DIR=output/$NAME-pt-$PRE_SEQ_LEN-$LR ;;
    lora) OUTPUT_DIR=output/$NAME-lora-$LR ;;
    full) OUTPUT_DIR=output/$NAME-ft-$LR ;;
  esac
fi
tuning=(--tuning "$TUNING")
if [ "$TUNING" = ptuning ]; then tuning=(--pre_seq_len "$PRE_SEQ_LEN"); fi

exec "$PYTHON" "${start[@]}" \
  --do_train --do_eval --do_predict \
  --train_file "$TRAIN_FILE" --validation_file "$DEV_FILE" --test_file "$DEV_FILE" \
  --prompt_column "$PROMPT_COLUMN" --response_column "$RESPONSE_COLUMN" \
  --max_source_length "$MAX_SOURCE_LENGTH" --max_target_length "$MAX_TARGET_LENGTH" \
  --model_name_or_path "$MODEL" "${tuning[@]}" \
  --output_dir "$OUTPUT_DIR" --overwrite_output_dir \
  --per_device_train_batch_size "$BATCH_SIZE" --gradient_accumulation_steps "$ACCUMULATION" \
  --predict_with_generate \
  --max_steps "$MAX_STEPS" --logging_steps "$LOGGING_STEPS" --save_steps "$SAVE_STEPS" \
  --eval_strategy steps --eval_steps "$EVAL_STEPS" \
  --learning_rate "$LR" \
  ${given_flags[@]+"${given_flags[@]}"} "$@"
