#!/usr/bin/env bash
# A page to talk to a trained prefix, to the base, or to both side by side:  bash web_demo.sh   opens 127.0.0.1:7860.
#     PREFIX=output/run bash web_demo.sh     this prefix, adapter or model; unset: the newest under output/
#     bash web_demo.sh --port 8080 --prefix adgen=output/run --prefix other=output/other      further flags: --help
#     bash web_demo.sh --host 0.0.0.0 --password SECRET       for other machines
# PREFIX is taken from your folder if it exists there, else from this one; paths in flags from this one.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")"
source scripts/setup.sh

if [ -n "${PREFIX:-}" ]; then
  PREFIX=$(input_path "${PREFIX%/}")
  [ -d "$PREFIX" ] || refuse "PREFIX=$PREFIX is no directory; give a run's output directory or one of its checkpoint-N."
  if [ -f "$PREFIX/tuning_config.json" ]; then  # an adapter or a whole model, which answers in the base's place
    set -- --model "$PREFIX" "$@"
  else
    set -- --prefix "prefix=$PREFIX" "$@"
  fi
fi
if [ -n "${MODEL:-}" ]; then set -- --model "$(input_path "$MODEL")" "$@"; fi

export GRADIO_ANALYTICS_ENABLED=False HF_HUB_DISABLE_TELEMETRY=1
given=${PYTHON:-}
choose_python run
if ! "$PYTHON" -c 'import importlib.metadata as m; m.version("gradio")' >/dev/null 2>&1; then
  case $PYTHON in
    */.venv/*) ;;
    *) given=$PYTHON ;;
  esac
  [ -z "$given" ] || die "$given lacks gradio; nothing is installed into a Python that is not .venv." \
    "Type: $given -m pip install -r requirements-web.lock"
  echo "Installing requirements-web.lock into .venv, once (250 MB)." >&2
  "$(find_python)" -m pip --python "$PYTHON" install --quiet --disable-pip-version-check -r requirements-web.lock >&2 ||
    die "That failed; the lines above say why. The same command tries again."
fi

exec "$PYTHON" -m ptuning web "$@"
