# What the training and evaluation scripts share: settings, model, data, GPUs. Sourced after scripts/setup.sh.
# A setting is a variable before the command or a flag behind it; the flag wins.

NANO=ptuning/nano/weights  # the embedded model
given_flags=()             # what `setting` passes to main.py

# Numbers are checked before anything is installed; main.py checks those in flags. MAX_STEPS=-1 is transformers' "no limit".
for name in MAX_STEPS EPOCHS LR SAVE_STEPS EVAL_STEPS LOGGING_STEPS SAVE_TOTAL_LIMIT BATCH_SIZE ACCUMULATION \
  EVAL_BATCH_SIZE PRE_SEQ_LEN MAX_SOURCE_LENGTH MAX_TARGET_LENGTH NUM_GPUS; do
  case $name in
    EPOCHS | LR | SAVE_STEPS | EVAL_STEPS | LOGGING_STEPS)  # transformers takes *_STEPS below 1 as a part of the run
      number='^(0*[1-9][0-9]*([.][0-9]*)?|0*[.]0*[1-9][0-9]*)([eE][-+]?[0-9]+)?$' needed='a number above 0' ;;
    *) number='^[1-9][0-9]*$' needed='a whole number, 1 or more' ;;
  esac
  [[ -z ${!name:-} || ${!name} =~ $number || $name=${!name} == MAX_STEPS=-1 ]] ||
    refuse "$name is ${!name}; give $needed, or leave it out."
done

# take_flags FLAG=VARIABLE ... -- "$@": set each variable from its flag (--flag value or --flag=value, the last one counts).
# `words` keeps what goes to main.py unchanged; typed_FLAG is the value of any flag that was typed, `true` for a bare one.
take_flags() {
  local variables=' ' flag='^--[A-Za-z0-9_-]+(=|$)' name value
  while [ "$1" != -- ]; do variables+="$1 " && shift; done
  words=()
  while shift && [ $# -gt 0 ]; do
    value='' name=${1%%=*}
    name=${name//-/_} && name=${name#__}
    if [[ $1 == *=* ]]; then value=${1#*=}; elif [[ $# -gt 1 && $2 != --* ]]; then value=$2; fi
    if [[ $1 =~ $flag ]]; then printf -v "typed_$name" %s "${value:-true}"; fi
    if [[ $1 == --* && -n $value && $variables == *" $name="* ]]; then
      name=${variables#*" $name="}
      printf -v "${name%% *}" %s "$value"
      [[ $1 == *=* ]] || shift
      [[ $# -eq 1 || $2 == -* || ${name%% *} != *_FILE ]] ||
        refuse "$2 is one file too many here; for several, quote a pattern, ${name%% *}='data/*.jsonl', or type python main.py with all flags"
    else
      words+=("$1")
    fi
  done
}

# A setting in the words it was typed in: said VARIABLE FLAG prints VARIABLE=value or --flag value.
said() {
  local typed=typed_$2
  if [ -n "${!typed:-}" ]; then printf -- '--%s %s' "$2" "${!1}"; else printf '%s=%s' "$1" "${!1}"; fi
}

# setting --flag VARIABLE [DEFAULT [DEFAULT WITHOUT NANO]]: set the variable where it is empty, and pass the flag to main.py
# unless there is no value. A default of 16/NUM_GPUS is divided and rounded up. --help prints these lines.
setting() {
  local default=${3:-} gpus=${NUM_GPUS:-1}
  [ "${MODEL:-}" = "$NANO" ] || default=${4:-$default}
  if [[ $default == */NUM_GPUS ]]; then default=$(((${default%/*} + gpus - 1) / gpus)); fi
  [ -n "${!2:-}" ] || printf -v "$2" %s "$default"
  [ -z "${!2}" ] || given_flags+=("$1" "${!2}")
}

# A run ends after MAX_STEPS or after EPOCHS: a flag beats a variable, and --max_steps beats --num_train_epochs.
steps_or_epochs() {
  if [ "${MAX_STEPS:-}" = -1 ]; then MAX_STEPS='' EPOCHS=${EPOCHS:-3}; fi  # transformers' "no limit"
  [ -n "${MAX_STEPS:-}" ] && [ -n "${EPOCHS:-}" ] || return 0
  [ -n "${typed_max_steps:-}${typed_num_train_epochs:-}" ] ||
    refuse "MAX_STEPS=$MAX_STEPS and EPOCHS=$EPOCHS are both set; a run ends after one of them, so leave one out."
  if [ -n "${typed_max_steps:-}" ]; then EPOCHS=''; else MAX_STEPS=''; fi
}

# TUNING and PRESET, checked; a checkpoint to start from says what it is.
choose_tuning() {
  checkpoint=${typed_init_from:-${typed_ptuning_checkpoint:-}}
  if [ -z "${TUNING:-}" ] && [ -f "$checkpoint/adapter_config.json" ]; then TUNING=lora; fi
  if [ -z "${TUNING:-}" ] && [ -f "$checkpoint/tuning_config.json" ]; then TUNING=full; fi
  case ${TUNING:=ptuning} in
    ptuning | lora | full) ;;
    *) refuse "$(said TUNING tuning): use ptuning (a prefix), lora (an adapter) or full (the whole model)." ;;
  esac
  case ${PRESET:=} in
    '' | task | gentle | lima) ;;
    *) refuse "$(said PRESET preset): use task (the best score on the task), gentle (keeps more of the base) or lima (few, curated rows)." ;;
  esac
}

# MODEL as given: `nano`, the folder of a whole model, or else a hub id.
resolve_model() {
  local given path='^[./]|/.*/|/$'
  given=$(said MODEL model_name_or_path)
  MODEL=$(input_path "$MODEL")
  if [ "$MODEL" = nano ] || [ "$MODEL" -ef "$NANO" ]; then MODEL=$NANO && return; fi
  if [ -d "$MODEL" ]; then
    [ -f "$MODEL/config.json" ] && ls "$MODEL" | grep -E '[.](safetensors|bin)$' >/dev/null ||
      refuse "$given: that folder lacks config.json or weights (*.safetensors, *.bin); give the folder of a whole model."
  elif [ -e "$MODEL" ] || [[ $MODEL =~ $path ]]; then
    refuse "$given is not a folder; give a model's folder, a hub id (THUDM/chatglm-6b) or nano."
  fi
}

# resolve_data TRAIN_FILE DEV_FILE: files as given, else ADGEN if it was put there, else the sample (AdvertiseGen/README.md).
resolve_data() {
  local name path flag data=AdvertiseGen/sample
  if [ -f AdvertiseGen/train.json ] && [ -f AdvertiseGen/dev.json ]; then data=AdvertiseGen; fi
  for name in "$@"; do
    if [ "$name" = TRAIN_FILE ]; then flag=train_file path=$data/train.json; else flag=validation_file path=$data/dev.json; fi
    if [ -n "${!name:-}" ]; then
      path=$(input_path "${!name}")
      is_there "$path" || refuse "$(said "$name" "$flag"): no such file, looked up in $(printf '%s\n' "$caller" "$PWD" | uniq | paste -s -d, -)."
      [ ! -d "$path" ] || refuse "$(said "$name" "$flag") is a folder; give one of its files."
    elif [ "$name" = TRAIN_FILE ]; then
      echo "Data: $path" >&2
    fi
    printf -v "$name" %s "$path"
  done
}

# NAME, else the data's name and the model's.
run_name() {
  local data=adgen model=chatglm-6b
  case $TRAIN_FILE in AdvertiseGen/train.json | AdvertiseGen/sample/train.json) ;; *) data=$(data_name "$TRAIN_FILE") ;; esac
  if [ "$MODEL" = "$NANO" ]; then model=nano; fi
  printf %s "${NAME:-${data:-data}-$model}"
}

# What rows are called: the file's stem, else its folder's name; empty where both are words such as train and data.
data_name() {
  local path=$1 name
  if [ "${path#/}" = "$path" ]; then path=$PWD/$path; fi
  name=${path##*/} && name=${name%.gz}
  for name in "${name%.*}" "$(basename "${path%/*}")"; do
    case $(printf %s "$name" | tr '[:upper:]' '[:lower:]') in
      train | training | trainset | data | dataset | train[-_]data | train[-_]set | training[-_]data | training[-_]set) ;;
      *)
        name=$(printf %s "$name" | LC_ALL=C tr -cs 'A-Za-z0-9._\200-\377-' -)
        name=${name#[-.]} && name=${name%-}
        if [ -n "$name" ]; then printf %s "$name" && return; fi
        ;;
    esac
  done
}

# How to start main.py: on one GPU, or with one process for each of NUM_GPUS (docs/multi-gpu.md).
choose_gpus() {
  start=(main.py)
  if [ "${NUM_GPUS:-1}" -gt 1 ]; then
    start=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS" main.py)
  else
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
  fi
}
