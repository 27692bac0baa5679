# Sourced first by every command: goes to the repository root, and finds the Python to use.
#     source "$(dirname "$0")/scripts/setup.sh"; show_help "$@"; choose_python run
# choose_python exports PYTHON: the one given, used as it is and never installed into; else a complete .venv; else
# python3, if it has every dependency in the ranges of pyproject.toml; else .venv, made from requirements.lock.
# Written for bash 3.2 and up (macOS).

caller=$PWD  # the folder the command was typed in
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."

# With --help among the words, print the script's head comment and its `setting` lines, and stop.
show_help() {
  local word
  for word in "$@"; do
    case $word in -h | --help) ;; *) continue ;; esac
    awk '
      NR == 1 { head = 1; next }
      head && /^#/ { sub(/^# ?/, ""); print; next }
      { head = 0; at = match($0, /(^| )setting --/) }
      at {
        if (split(substr($0, at), part, / *(;; *)?# /) < 2) next
        count = split(part[1], field, " ")
        defaults = count > 3 ? field[4] : "unset"
        if (count > 4) defaults = defaults " or " field[5]
        printf "  %-18s %-18s %s\n", field[3], defaults, part[2]
      }' "${0##*/}"
    exit 0
  done
}

# Stop because something is missing or failed.
die() {
  printf '%s\n' "$@" >&2
  exit 1
}

# Stop because a variable or an argument has an invalid value; status 2, as with main.py's flags.
refuse() {
  printf '%s\n' "$@" >&2
  exit 2
}

# Whether a path, or a pattern such as data/*.jsonl, stands for something.
is_there() { [ -e "$1" ] || compgen -G "${1//\*\*/*}" >/dev/null; }

# A path to read: relative to the folder the command was typed in if it exists there, else to the repository root.
input_path() {
  if [ "$caller" != "$PWD" ] && [ "${1#/}" = "$1" ] && is_there "$caller/$1"; then
    printf '%s/%s' "$caller" "$1"
  else
    printf '%s' "$1"
  fi
}

# A path to write: always relative to the folder the command was typed in.
output_path() {
  if [ "$caller" != "$PWD" ] && [ "${1#/}" = "$1" ]; then
    printf '%s/%s' "$caller" "$1"
  else
    printf '%s' "$1"
  fi
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local name
  for name in python3 python3.13 python3.14 python3.12 python3.11 python; do
    if is_new_enough "$name"; then
      printf '%s' "$name"
      return
    fi
  done
  die "Found no Python 3.11 or newer (tried python3, python3.11 to 3.14, python)." \
    "Install one, or name it: PYTHON=/path/to/python"
}

check_given_python() {
  PYTHON=$(input_path "$PYTHON")
  command -v "$PYTHON" >/dev/null || refuse "PYTHON=$PYTHON is not a command." \
    "Give the path of a Python 3.11 or newer, or leave PYTHON out."
  is_new_enough "$PYTHON" || refuse "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); 3.11 or newer is needed." \
    "Give another, or leave PYTHON out."
  "$PYTHON" scripts/environment.py check "$1"
}

# choose_python run needs the dependencies, choose_python dev the tools of `make check` as well.
choose_python() {
  local found
  if [ -n "${PYTHON:-}" ]; then
    check_given_python "$1"
  else
    found=$(find_python)
    PYTHON=$("$found" scripts/environment.py choose "$1")
  fi
  export PYTHON
}
