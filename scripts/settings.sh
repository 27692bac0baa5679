# What train.sh and evaluate.sh share: the model's name, the data, the GPU. Sourced after scripts/setup.sh.

NANO=ptuning/nano/weights  # the embedded model

# `nano` is the embedded model; a directory is taken as seen from here or there; anything else is a hub id.
model_path() {
  local path
  if [ "$1" = nano ]; then path=$NANO; else path=$(input_path "$1"); fi
  if [ "$path" -ef "$NANO" ]; then path=$NANO; fi
  printf '%s' "$path"
}

# The real data if it was put there (AdvertiseGen/README.md), else the sample written for this project.
data=AdvertiseGen/sample
if [ -f AdvertiseGen/train.json ] && [ -f AdvertiseGen/dev.json ]; then data=AdvertiseGen; fi
TRAIN_FILE=$(input_path "${TRAIN_FILE:-$data/train.json}")
DEV_FILE=$(input_path "${DEV_FILE:-$data/dev.json}")

# Flags that are left out where their value is empty, so that main.py's own default holds.
given_flags=()
give() {
  if [ -n "$2" ]; then given_flags+=("$1" "$2"); fi
}

# One GPU as published, or NUM_GPUS of this machine with one process each (docs/multi-gpu.md).
start=(main.py)
case ${NUM_GPUS:-1} in
  0* | *[!0-9]*) refuse "NUM_GPUS is $NUM_GPUS; give the number of GPUs to use, 1 or more, or leave it out." ;;
esac
if [ "${NUM_GPUS:-1}" -gt 1 ]; then
  start=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS" main.py)
else
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
fi
# So many of a step's rows or forward passes for each process, rounded up.
per_process() { printf %s $((($1 + ${NUM_GPUS:-1} - 1) / ${NUM_GPUS:-1})); }
