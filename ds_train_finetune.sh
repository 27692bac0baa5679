#!/usr/bin/env bash
# Fine-tune the whole model with DeepSpeed ZeRO on every GPU of this machine:  bash ds_train_finetune.sh
#     MODEL=/path/to/chatglm-6b NUM_GPUS=4 PRECISION=bf16 bash ds_train_finetune.sh
#     bash evaluate.sh                                # score it afterwards
# The same command resumes a run that was interrupted. Settings are variables before the command; flags of main.py behind
# it win over them, and python main.py --help lists those. A path in a variable is looked up in your folder,
# then in the repository; OUTPUT_DIR is in your folder.
#
#   MODEL, TRAIN_FILE, NAME, OUTPUT_DIR, EPOCHS, PYTHON       as in bash train.sh --help; MODEL unset: THUDM/chatglm-6b
#   NUM_GPUS           GPUs to use, one process each; unset: all
#   PRECISION          fp16 (as published, the default) or bf16
#   DEEPSPEED          DeepSpeed's own settings; unset: deepspeed.json
set -euo pipefail
source "$(dirname "$0")/scripts/setup.sh"
show_help "$@"
source scripts/settings.sh
take_flags model_name_or_path=MODEL learning_rate=LR output_dir=OUTPUT_DIR max_steps=MAX_STEPS num_train_epochs=EPOCHS \
  train_file=TRAIN_FILE deepspeed=DEEPSPEED -- "$@"
steps_or_epochs
MODEL=${MODEL:-THUDM/chatglm-6b}
resolve_model
resolve_data TRAIN_FILE
DEEPSPEED=$(input_path "${DEEPSPEED:-deepspeed.json}")
choose_python run

"$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)' ||
  die "$PYTHON lacks DeepSpeed. Type: $PYTHON -m pip install deepspeed"
if [ -z "${NUM_GPUS:-}" ]; then
  found=$("$PYTHON" scripts/environment.py cuda)
  NUM_GPUS=${found%% *}
  [ "$NUM_GPUS" -gt 0 ] || die "${found#* }. The whole model on a CPU: TUNING=full bash train.sh"
fi

setting --learning_rate LR 1e-4                          # learning rate of the first step, then linear decay to 0
if [ -z "${EPOCHS:-}" ]; then
  setting --max_steps MAX_STEPS 5000                     # optimiser steps
fi
setting --num_train_epochs EPOCHS
setting --per_device_train_batch_size BATCH_SIZE 4       # rows per forward pass and GPU
setting --gradient_accumulation_steps ACCUMULATION 1     # forward passes per step
setting --save_steps SAVE_STEPS 1000                     # steps between two checkpoints, each a whole model
setting --save_total_limit SAVE_TOTAL_LIMIT 2            # checkpoints kept
setting --logging_steps LOGGING_STEPS 10                 # steps between two loss lines
setting --max_source_length MAX_SOURCE_LENGTH 64         # tokens of the prompt, including [gMASK] and <sop>
setting --max_target_length MAX_TARGET_LENGTH 64         # tokens of the answer
setting --prompt_column PROMPT_COLUMN                    # field of the prompt; unset: found, as --format says
setting --response_column RESPONSE_COLUMN                # field of the answer; unset: found
setting --history_column HISTORY_COLUMN                  # field of earlier turns; unset: found
if [ -z "${typed_fp16:-}${typed_bf16:-}" ]; then words=("--${PRECISION:-fp16}" ${words[@]+"${words[@]}"}); fi
if [ -n "${OUTPUT_DIR:-}" ]; then OUTPUT_DIR=$(output_path "$OUTPUT_DIR"); else OUTPUT_DIR=output/$(run_name)-ft-$LR; fi

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS" main.py \
  --deepspeed "$DEEPSPEED" --tuning full --do_train \
  --train_file "$TRAIN_FILE" --model_name_or_path "$MODEL" --output_dir "$OUTPUT_DIR" \
  "${given_flags[@]}" ${words[@]+"${words[@]}"}
