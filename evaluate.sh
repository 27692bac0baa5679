#!/usr/bin/env bash
# Score a prefix, a LoRA adapter or a whole model again:  bash evaluate.sh     # the newest under output/
#     PREFIX=output/RUN/checkpoint-1000 bash evaluate.sh
#     MODEL=THUDM/chatglm-6b PREFIX=/path/to/checkpoint-3000 bash evaluate.sh   # one from the published code
# Settings are variables before the command; flags of main.py behind it win over them, and python main.py --help
# lists those. A path in a variable is looked up in your folder, then in the repository; OUTPUT_DIR is in your folder.
#
#   PREFIX             folder of a run or one of its checkpoint-N; unset: the newest under output/
#   MODEL              the base model: a folder, a hub id or nano; unset: the one it was trained on
#   DEV_FILE           rows to answer, and to score where they have an answer; unset: AdvertiseGen/dev.json if it is there,
#                      else the sample in AdvertiseGen/sample
#   OUTPUT_DIR         folder for answers and scores; unset: PREFIX
#   NUM_GPUS           GPUs to use, one process each; unset: one
#   PYTHON             the Python to use; unset: .venv, made on the first run
# Unset below, except EVAL_BATCH_SIZE and QUANTIZATION_BIT: the value it was trained with, which is stored with it.
set -euo pipefail
source "$(dirname "$0")/scripts/setup.sh"
show_help "$@"
source scripts/settings.sh
take_flags model_name_or_path=MODEL ptuning_checkpoint=PREFIX output_dir=OUTPUT_DIR validation_file=DEV_FILE -- "$@"
resolve_data DEV_FILE
[ -z "${MODEL:-}" ] || resolve_model
choose_gpus

if [ -n "${PREFIX:-}" ]; then
  given=$(said PREFIX ptuning_checkpoint)
  PREFIX=$(input_path "${PREFIX%/}")
  [ ! -f "$PREFIX" ] || refuse "$given is a file; give the folder it is in: $(dirname "$PREFIX")"
  [ -d "$PREFIX" ] || refuse "$given is not a folder; give the folder of a run or one of its checkpoint-N."
else
  # ls fails where a pattern matches nothing, but still prints what it found.
  newest=$(ls -t output/*/{prefix,tuning}_config.json output/*/checkpoint-*/{prefix,tuning}_config.json 2>/dev/null |
    head -n 1) || true
  [ -n "$newest" ] || die "There is no prefix under $PWD/output yet. Type: bash train.sh" \
    "or give one: PREFIX=/path/to/prefix bash evaluate.sh"
  PREFIX=${newest%/*}
  echo "Newest: $PREFIX" >&2
fi
about=
for name in prefix_config.json tuning_config.json adapter_config.json; do
  if [ -z "$about" ] && [ -f "$PREFIX/$name" ]; then about=$PREFIX/$name; fi
done
if [ -z "${MODEL:-}" ] && [ -z "$about" ]; then
  refuse "$PREFIX has no prefix_config.json that names the base model (the published code writes none)." \
    "Give it: MODEL=THUDM/chatglm-6b PREFIX=$PREFIX bash evaluate.sh"
fi

choose_python run
if [ -z "${MODEL:-}" ]; then
  MODEL=$("$PYTHON" -c '
import json, sys
try:
    with open(sys.argv[1], encoding="utf-8") as file:
        sys.stdout.write(json.load(file).get("base_model_name_or_path") or "")
except (ValueError, AttributeError) as error:
    sys.stderr.write(f"evaluate.sh: {sys.argv[1]} is damaged ({error}); "
        "give another prefix, PREFIX=..., or the base, MODEL=...\n")
    sys.exit(2)' "$about")
  MODEL=$(input_path "$MODEL")
  [ -n "$MODEL" ] || refuse "$about names no base model; add MODEL=... before the command."
fi
if [ -z "$about" ]; then                               # a checkpoint of the published code: the published lengths
  MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64}
  MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64}
fi
setting --max_source_length MAX_SOURCE_LENGTH          # tokens of the prompt, including [gMASK] and <sop>
setting --max_target_length MAX_TARGET_LENGTH          # tokens of the answer
setting --prompt_column PROMPT_COLUMN                  # field of the prompt
setting --response_column RESPONSE_COLUMN              # field of the answer
setting --history_column HISTORY_COLUMN                # field of earlier turns
setting --per_device_eval_batch_size EVAL_BATCH_SIZE   # rows scored at a time; unset: up to 64
setting --quantization_bit QUANTIZATION_BIT            # 4 or 8: quantise the base
if [ -n "${OUTPUT_DIR:-}" ]; then OUTPUT_DIR=$(output_path "$OUTPUT_DIR"); else OUTPUT_DIR=$PREFIX; fi

exec "$PYTHON" "${start[@]}" \
  --do_eval --do_predict --predict_with_generate \
  --validation_file "$DEV_FILE" --test_file "$DEV_FILE" \
  --model_name_or_path "$MODEL" --ptuning_checkpoint "$PREFIX" --output_dir "$OUTPUT_DIR" \
  ${given_flags[@]+"${given_flags[@]}"} ${words[@]+"${words[@]}"}
