#!/usr/bin/env bash
# Train a prefix on conversations of your own:  TRAIN_FILE=chat/train.json DEV_FILE=chat/dev.json bash train_chat.sh
# A row: {"prompt": "...", "response": "...", "history": [["question", "answer"], ...]}. The rest is as in train.sh.
set -euo pipefail

if [ -z "${TRAIN_FILE:-}" ] || [ -z "${DEV_FILE:-}" ]; then
  echo "train_chat.sh needs your data; type: TRAIN_FILE=chat/train.json DEV_FILE=chat/dev.json bash $0" >&2
  echo 'One JSON object per line: {"prompt": "...", "response": "...", "history": [["question", "answer"], ...]}' >&2
  exit 2
fi
export TRAIN_FILE DEV_FILE
export NAME=${NAME:-chat}
case "${PRESET:-}$*" in                              # learning rate at step 0; a preset has its own
  gentle* | task* | *--preset*) ;;
  *) export LR=${LR:-1e-2} ;;
esac
export MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-256}   # tokens of history and prompt
export MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-256}   # tokens of the answer
export PROMPT_COLUMN=${PROMPT_COLUMN:-prompt}
export RESPONSE_COLUMN=${RESPONSE_COLUMN:-response}
export HISTORY_COLUMN=${HISTORY_COLUMN:-history}
exec bash "$(dirname "$0")/train.sh" "$@"
