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
# workdir must be a folder that all workers see. `resume` goes on from the newest
# checkpoint. `keep` looks every --every seconds whether the pod is there, and makes,
# fills and resumes it when it is not: for spot machines, which are taken away.
# --dry_run prints the commands, quoted, and runs none. Needs gcloud.
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
  local pattern='^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'
  [[ "$2" =~ $pattern ]] ||
    fail "$(printf -- '--%s=%q must be small letters, digits and -, a letter first' "$1" "$2")"
}
check name "$name"
check zone "$zone"
check version "$version"
case "$action" in create | keep) check type "$type" ;; esac
[[ "$every" =~ ^[1-9][0-9]{0,4}$ ]] || fail "$(printf -- '--every=%q must be seconds' "$every")"

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

on_all() { do_it "${tpu[@]}" ssh "${here[@]}" --worker=all "--command=$1"; }

create() {
  do_it "${tpu[@]}" create "${here[@]}" "--accelerator-type=$type" \
    "--version=$version" ${spot:+"$spot"}
}

# The files that git knows, as they are now.
copy() {
  local archive=/tmp/hope_jax.tgz python=hope_jax/.venv/bin/python
  do_it git archive --format=tgz "--output=$archive" HEAD
  do_it "${tpu[@]}" scp "$archive" "$name:$archive" "--zone=$zone" --worker=all
  on_all "rm -rf hope_jax && mkdir hope_jax && tar -xzf $archive -C hope_jax && \
python3 -m venv hope_jax/.venv && $python -m pip install -q './hope_jax[tpu]'"
}

# In the background of every worker, so that it outlives this connection.
start() {
  local program
  program="$(printf ' %q' .venv/bin/python -m launch.train "$@" --coordinator=auto)"
  on_all "cd hope_jax && nohup$program >>../train.log 2>&1 </dev/null &"
}

keep() {
  local state
  while true; do
    state=absent
    if [[ -z "$dry" ]]; then
      state="$("${tpu[@]}" describe "${here[@]}" '--format=value(state)' 2>/dev/null ||
        echo absent)"
    fi
    if [[ "$state" != READY ]]; then
      [[ "$state" == absent ]] || delete
      # What fails now, there being no such machine free, is tried again.
      create && copy && start "$@" --resume || true
    fi
    [[ -z "$dry" ]] || return 0
    sleep "$every"
  done
}

delete() { do_it "${tpu[@]}" delete "${here[@]}" --quiet; }

case "$action" in
  run) start "$@" ;;
  resume) start "$@" --resume ;;
  keep) keep "$@" ;;
  follow) do_it "${tpu[@]}" ssh "${here[@]}" --worker=0 '--command=tail -n 50 -F train.log' ;;
  *) "$action" ;;
esac
