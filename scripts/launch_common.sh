# shellcheck shell=bash
# Functions of the launchers, which source this file. Runs on bash 3.2 (macOS).

dry_run=false

die() {
  local line
  for line; do
    printf '%s: %s\n' "${0##*/}" "$line" >&2
  done
  exit 1
}

# Prints its arguments, quoted for a shell, on one line.
quoted() {
  local word name line='' quote="'" escaped="'\\''"
  for word; do
    name=''
    case ${word%%=*} in
      *[!A-Za-z0-9_.-]*) ;;
      --?*) name=${word%%=*}= ;; # --name="value", not "--name=value"
    esac
    [ "$name" != "$word=" ] || name='' # the word has no =
    word=${word#"$name"}
    case $word in
      '') [ -n "$name" ] || word="''" ;;
      *[!A-Za-z0-9_./:=@%+,-]*)
        case $word in
          *[\"\$\`\\!]*) word="'${word//$quote/$escaped}'" ;;
          *\'*) word="\"$word\"" ;;
          *) word="'$word'" ;;
        esac
        ;;
    esac
    line+="${line:+ }$name$word"
  done
  printf '%s\n' "$line"
}

# Prints a command, and runs it unless --dry_run was given.
run() {
  if [ "$dry_run" = true ]; then
    quoted "$@"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

need_tool() { # NAME HOW_TO_GET_IT
  [ "$dry_run" = true ] || command -v "$1" >/dev/null ||
    die "$1 is not on the PATH. $2" '--dry_run prints the commands without it.'
}

need_flags() { # NAME VALUE NAME VALUE...
  while [ $# -gt 0 ]; do
    [ -n "$2" ] || die "--$1=... is missing. See --help."
    shift 2
  done
}

refuse() {
  die "there is no $1. Flags are --NAME=VALUE, see --help." \
    'Flags of gkd_jax.main come last, after a --.'
}

check_run_arguments() {
  local argument
  [ $# -gt 0 ] || die 'there is nothing to run. Flags of gkd_jax.main come' \
    'last, after a --, as in: -- --gin_file=configs/cmudict_g2p/sft.gin ...'
  for argument; do
    case $argument in
      *_DIR=gs://* | *_DIR=[\'\"]gs://*)
        die "$argument: a run writes to a file system, not to a bucket." \
          'Mount the bucket and give the path of the folder, see --help.'
        ;;
    esac
  done
}

# Packs the current commit, without uncommitted changes.
archive_commit() { # FILE
  [ -z "$(git status --porcelain --untracked-files=no)" ] ||
    printf '%s: warning: uncommitted changes are not included.\n' \
      "${0##*/}" >&2
  run mkdir -p "$(dirname "$1")"
  run git archive --output="$1" HEAD
}
