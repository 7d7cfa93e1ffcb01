#!/usr/bin/env bash
# A run on a pod of Cloud TPUs, from making it to deleting it.
#
#   bash launch/tpu_pod.sh create --name=hope --zone=us-west4-a --type=v5litepod-64 --spot
#   bash launch/tpu_pod.sh copy   --name=hope --zone=us-west4-a
#   bash launch/tpu_pod.sh run    --name=hope --zone=us-west4-a -- \
#       --experiment=quickstart --row=hope --workdir=/mnt/shared/runs/hope
#   bash launch/tpu_pod.sh follow --name=hope --zone=us-west4-a
#   bash launch/tpu_pod.sh resume --name=hope --zone=us-west4-a -- (the arguments of run)
#   bash launch/tpu_pod.sh keep   (all flags of create) -- (the arguments of run)
#   bash launch/tpu_pod.sh delete --name=hope --zone=us-west4-a
#
# What follows -- goes to launch.train on every worker, with --coordinator=auto; the
# workdir must be a folder that all workers see. `copy` sends the files that git knows,
# as they are now. `resume` goes on from the newest checkpoint. `keep` looks every
# --every seconds whether the pod is there, and makes, fills and resumes it when it is
# not: for spot machines, which are taken away. It ends with `delete`, given in the same
# folder. --dry_run prints the commands, quoted, and runs none. Needs gcloud.
set -euo pipefail
CDPATH='' cd -- "${0%"${0##*/}"}.." # the root of the repository

usage() {
  local line
  while read -r line && [[ $line == '#'* ]]; do echo "${line#\#}"; done \
    < <(tail -n +2 launch/tpu_pod.sh)
}
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

action="${1:-}"
case "$action" in
  create | copy | run | follow | resume | keep | delete) shift ;;
  *) usage && exit 1 ;;
esac

name='' zone='' type='' version=tpu-ubuntu2204-base every=60 spot='' dry=''
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --every=*) every="${1#*=}" ;;
    --spot) spot=--spot ;;
    --dry_run) dry=yes ;;
    --) shift && break ;;
    *) fail "$(printf '%q is no flag; arguments of the program follow --' "$1")" ;;
  esac
  shift
done

# Names of Google Cloud; what else a shell or gcloud might read in them is refused.
check() {
  local LC_ALL=C # elsewhere a-z may hold capitals
  local pattern='^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'
  [[ "$2" =~ $pattern ]] ||
    fail "$(printf -- '--%s=%q must be small letters, digits and -, a letter first' "$1" "$2")"
}
check name "$name"
check zone "$zone"
check version "$version"
case "$action" in create | keep) check type "$type" ;; esac
[[ "$every" =~ ^[1-9][0-9]{0,4}$ ]] || fail "$(printf -- '--every=%q must be seconds' "$every")"
case "$action" in
  run | resume | keep) (($#)) || fail "give the arguments of launch.train after --" ;;
  *) (($# == 0)) || fail "$(printf '%s takes no arguments, got %q' "$action" "$1")" ;;
esac
[[ -n "$dry" ]] || command -v gcloud >/dev/null || fail 'no gcloud: install the Google Cloud CLI'

do_it() {
  if [[ -n "$dry" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu=(gcloud compute tpus tpu-vm)
here=("$name" "--zone=$zone")
tmp=/tmp
if [[ -z "$dry" ]]; then
  tmp="$(mktemp -d)"
  trap 'rm -rf "$tmp"' EXIT
fi
kept="runs/.keep-$zone-$name" # there while `keep` is to go on

on_all() { do_it "${tpu[@]}" ssh "${here[@]}" --worker=all "--command=$1"; }

create() {
  do_it "${tpu[@]}" create "${here[@]}" "--accelerator-type=$type" \
    "--version=$version" ${spot:+"$spot"}
}

# Its steps are chained: where `keep` tries something, bash does not stop at errors.
copy() {
  local archive=hope_jax.tgz python=hope_jax/.venv/bin/python known=''
  if [[ -z "$dry" ]]; then # what is not committed is a commit that nothing names
    known="$(git -c user.name=hope_jax -c user.email=hope_jax stash create)" || return
  fi
  do_it git archive --format=tgz "--output=$tmp/$archive" "${known:-HEAD}" &&
    do_it "${tpu[@]}" scp "$tmp/$archive" "$name:$archive" "--zone=$zone" --worker=all &&
    on_all "rm -rf hope_jax && mkdir hope_jax && tar -xzf $archive -C hope_jax && \
python3 -m venv hope_jax/.venv && $python -m pip install -q './hope_jax[tpu]'"
}

# In the background of every worker, so that it outlives this connection: which ends once
# nothing holds its output. What can fail at once is not in the background.
start() {
  local program
  program="$(printf ' %q' .venv/bin/python -m launch.train "$@" --coordinator=auto)"
  on_all "cd hope_jax && test -x .venv/bin/python && \
{ nohup$program >>../train.log 2>&1 </dev/null & }"
}

# The state of the pod: as gcloud says it, absent, or unknown where it cannot say.
pod_state() {
  if "${tpu[@]}" describe "${here[@]}" '--format=value(state)' 2>"$tmp/errors"; then
    return
  elif [[ "$(<"$tmp/errors")" == *NOT_FOUND* ]]; then
    echo absent
  else
    echo "$(<"$tmp/errors")" >&2
    echo unknown
  fi
}

# Whether a program runs on every worker; the brackets keep it from finding itself.
runs() { on_all "pgrep -f '[l]aunch.train' >/dev/null" 2>/dev/null; }

# What is left of a start that not all workers made ends first, and saves.
fill() {
  on_all "! pkill -f '[l]aunch.train' || sleep 30" && copy && start "$@" --resume
}

keep() {
  local state filled=''
  if [[ -n "$dry" ]]; then
    create && copy && start "$@" --resume
    return
  fi
  mkdir -p "${kept%/*}" && touch "$kept"
  while [[ -e "$kept" ]]; do
    state="$(pod_state)"
    if [[ "$state" == PREEMPTED || "$state" == TERMINATED ]]; then # it has to go first
      if delete_pod; then state=absent; fi
    fi
    # What fails now, there being no such machine free, is tried again.
    if [[ "$state" == absent ]]; then
      if create; then state=READY filled=''; fi
      [[ -e "$kept" ]] || delete_pod || true # deleted while it was made
    fi
    if [[ "$state" != READY ]]; then
      filled=''
      echo "$name is $state: looking again in $every s"
    elif [[ -z "$filled" && -e "$kept" ]]; then
      if runs || fill "$@"; then filled=yes; fi
    fi
    sleep "$every"
  done
  echo "$name was deleted: no longer kept"
}

delete_pod() { do_it "${tpu[@]}" delete "${here[@]}" --quiet; }

delete() {
  [[ -n "$dry" ]] || rm -f "$kept"
  delete_pod
}

case "$action" in
  run) start "$@" ;;
  resume) start "$@" --resume ;;
  keep) keep "$@" ;;
  follow) do_it "${tpu[@]}" ssh "${here[@]}" --worker=0 '--command=tail -n 50 -F train.log' ;;
  *) "$action" ;;
esac
