#!/usr/bin/env bash
# Score what was trained again:  bash evaluate.sh   the newest under output/;  PREFIX=output/.../checkpoint-1000 names one.
# A prefix, a LoRA adapter or a whole model: main.py finds out which it is.
# Every value below can be given from outside; further flags go to main.py.
# A path in a variable is taken from your folder if it exists there, else from this one; OUTPUT_DIR from yours.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")"
source scripts/setup.sh
source scripts/settings.sh

if [ -n "${PREFIX:-}" ]; then
  PREFIX=$(input_path "${PREFIX%/}")
  [ ! -f "$PREFIX" ] || refuse "PREFIX=$PREFIX is a file; give the folder it lies in: PREFIX=$(dirname "$PREFIX")"
  [ -d "$PREFIX" ] || refuse "PREFIX=$PREFIX is no directory; give a run's output directory or one of its checkpoint-N."
else
  # ls fails where a pattern matches nothing; what it found is still printed.
  newest=$(ls -t output/*/{prefix,tuning}_config.json output/*/checkpoint-*/{prefix,tuning}_config.json 2>/dev/null |
    head -n 1) || true
  [ -n "$newest" ] || die "There is no prefix under $PWD/output yet. Type: bash train.sh" \
    "or name one: PREFIX=/path/to/prefix bash evaluate.sh"
  PREFIX=${newest%/*}
  echo "Newest: $PREFIX" >&2
fi
about=
for name in prefix_config.json tuning_config.json adapter_config.json; do
  if [ -z "$about" ] && [ -f "$PREFIX/$name" ]; then about=$PREFIX/$name; fi
done
if [ -z "${MODEL:-}" ] && [ -z "$about" ]; then
  refuse "$PREFIX has no prefix_config.json to name the base model (the published code writes none)." \
    "Name it: MODEL=THUDM/chatglm-6b PREFIX=$PREFIX bash evaluate.sh"
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
        "give another prefix, PREFIX=..., or name the base, MODEL=...\n")
    sys.exit(2)' "$about")
  [ -n "$MODEL" ] || refuse "$about names no base model; add MODEL=... before the command."
fi
if [ -z "$about" ]; then
  MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64}       # the published lengths, for a published checkpoint
  MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64}
fi
# Empty: what it was trained with, which it remembers.
give --max_source_length "${MAX_SOURCE_LENGTH:-}"  # tokens of the prompt, with [gMASK] and <sop>
give --max_target_length "${MAX_TARGET_LENGTH:-}"  # tokens of the answer
give --prompt_column "${PROMPT_COLUMN:-}"          # field of a row: what is asked
give --response_column "${RESPONSE_COLUMN:-}"      # field of a row: the answer
give --history_column "${HISTORY_COLUMN:-}"        # field of a row: earlier turns
give --per_device_eval_batch_size "${EVAL_BATCH_SIZE:-}" # rows scored at a time; empty: up to 64
give --quantization_bit "${QUANTIZATION_BIT:-}"    # 4 or 8; empty: the base as it is stored
if [ -n "${OUTPUT_DIR:-}" ]; then OUTPUT_DIR=$(output_path "$OUTPUT_DIR"); else OUTPUT_DIR=$PREFIX; fi

exec "$PYTHON" "${start[@]}" \
  --do_eval --do_predict \
  --validation_file "$DEV_FILE" --test_file "$DEV_FILE" \
  --model_name_or_path "$(model_path "$MODEL")" --ptuning_checkpoint "$PREFIX" \
  --output_dir "$OUTPUT_DIR" \
  --predict_with_generate \
  ${given_flags[@]+"${given_flags[@]}"} "$@"
