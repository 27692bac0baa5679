#!/usr/bin/env bash
# Train on conversations:  TRAIN_FILE=chat/train.json DEV_FILE=chat/dev.json bash train_chat.sh
# Rows as in {"prompt": "...", "response": "...", "history": [["question", "answer"], ...]}, or whole conversations:
# ShareGPT, OpenAI messages, rows of history alone (docs/data.md). The log names the format that was found.
# This is train.sh with the defaults below; everything else is as in bash train.sh --help.
#
#   TRAIN_FILE         conversations to train on
#   DEV_FILE           conversations to score on
set -euo pipefail
source "$(dirname "$0")/scripts/setup.sh"
show_help "$@"
source scripts/settings.sh
take_flags train_file=TRAIN_FILE validation_file=DEV_FILE tuning=TUNING preset=PRESET -- "$@"
if [ -z "${TRAIN_FILE:-}" ] || [ -z "${DEV_FILE:-}" ]; then
  refuse "train_chat.sh needs your data; type: TRAIN_FILE=chat/train.json DEV_FILE=chat/dev.json bash train_chat.sh" \
    'Rows such as {"prompt": "...", "response": "...", "history": [["question", "answer"], ...]} or {"messages": [...]}'
fi
choose_tuning
if [ -z "$(data_name "$(input_path "$TRAIN_FILE")")" ]; then
  setting -- NAME chat                                 # where neither the file nor its folder has a name of its own
fi
if [ "$TUNING-$PRESET" = ptuning- ]; then
  setting -- LR 1e-2                                   # learning rate of a prefix; otherwise as in train.sh
fi
setting -- MAX_SOURCE_LENGTH 256                       # tokens of history and prompt
setting -- MAX_TARGET_LENGTH 256                       # tokens of the answer
export NAME LR MAX_SOURCE_LENGTH MAX_TARGET_LENGTH
cd "$caller"
exec bash "$OLDPWD/train.sh" "$@"
