#!/usr/bin/env bash
# Creates, uses and deletes a TPU pod from this machine, through gcloud.
# Usage: bash launch/tpu_vm/pod.sh COMMAND [--settings FILE] [--dry-run]
#   create              requests the pod and waits until it is active
#   push                copies the files that git tracks to every worker
#   setup               installs them there
#   run VERB ARGS...    runs `python -m sqa_jax.VERB ARGS` on every worker until it is done; creates, pushes and sets up what
#                       is missing, and again after a preemption; if the same run is going on, follows it
#   status              state of the pod and its workers
#   logs [WORKER [SLICE]]  follows a worker's log (default: 0 0)
#   stop                stops a run that is no longer followed, after it has saved; the pod stays
#   fetch [DIRECTORY]   copies the run's directory from the bucket (default: runs/NAME)
#   delete              deletes the pod; the bucket stays
#   --settings FILE     default: launch/tpu_vm/settings.sh, made from settings.example.sh
#   --dry-run           prints each command instead of running it
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=launch/environment.sh
. launch/environment.sh
settings=launch/tpu_vm/settings.sh dry_run='' words=()
# shellcheck source=launch/tpu_vm/cloud.sh
. launch/tpu_vm/cloud.sh
# shellcheck source=launch/tpu_vm/supervise.sh
. launch/tpu_vm/supervise.sh

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' launch/tpu_vm/pod.sh; }

while [ $# -gt 0 ]; do
  case $1 in
    --settings) settings=${2:?--settings needs a file}; shift 2 ;;
    --dry-run) dry_run=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) words+=("$1"); shift ;;
  esac
done
[ "${#words[@]}" -gt 0 ] || fail "name a command; see bash launch/tpu_vm/pod.sh --help"
set -- "${words[@]}"

[[ $settings == */* ]] || settings=./$settings
[ -e "$settings" ] || fail "$settings: not found; copy launch/tpu_vm/settings.example.sh there and fill it in"
needed=(PROJECT ZONE NAME ACCELERATOR RUNTIME SLICES SPOT WORKDIR EXTRA_FILES POLL_SECONDS WAIT_SECONDS STOP_SECONDS PATIENCE MAX_RESTARTS)
unset "${needed[@]}" # from the file, not from the environment
# shellcheck source=launch/tpu_vm/settings.example.sh
. "$settings"
for name in "${needed[@]}"; do
  declare -p "$name" >/dev/null 2>&1 || fail "$settings: $name is not set; settings.example.sh shows every setting"
done
[[ $WORKDIR =~ ^gs://[^/]+/.*[^/]$ ]] || fail "$settings: WORKDIR is '$WORKDIR'; it must be gs://BUCKET/FOLDER, as a pod's own disks go with it"
[[ $SPOT =~ ^(true|false)$ ]] || fail "$settings: SPOT is '$SPOT'; choose true or false"
for name in SLICES POLL_SECONDS WAIT_SECONDS STOP_SECONDS PATIENCE MAX_RESTARTS; do
  [[ ${!name} =~ ^[0-9]+$ ]] || fail "$settings: $name is '${!name}'; it must be a whole number"
done
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"

case $1 in
  create)
    check_bucket
    create || {
      why=$(tpus queued-resources describe "$NAME" --format='value(state.failedData.error.message)')
      fail "$NAME is $(pod_state)${why:+: $why}; delete it before it is created anew"
    }
    ;;
  push) { pack && send; } || refused "cannot copy to $NAME" ;;
  setup) setup || refused "cannot install on $NAME" ;;
  run)
    [ $# -gt 1 ] || fail "run needs a verb, such as: run train --config configs/scienceqa.py"
    case " $* " in *\ --workdir[=\ ]* | *\ --coordinator[=\ ]*) fail "run gives --coordinator and --workdir itself; WORKDIR is in $settings" ;; esac
    check_bucket
    trap 'echo "the run itself goes on: the same command follows it, stop ends it" >&2; exit 130' INT
    supervise "${@:2}" --workdir "$WORKDIR" --coordinator auto
    ;;
  status)
    state=$(answer=ACTIVE pod_state)
    say "$NAME is $state"
    [ "$state" != ACTIVE ] || on_workers "$worker status" || refused "cannot ask the workers"
    ;;
  logs)
    if [ "$SLICES" -eq 1 ]; then node=$NAME; else node=$NAME-${3:-0}; fi
    patiently ssh_to "$node" "${2:-0}" "tail -n 100 -F sqa_jax_run/log" || refused "cannot read the log"
    ;;
  stop) patiently on_workers "$worker stop $STOP_SECONDS" || refused "cannot stop the run" ;;
  fetch)
    directory=${2:-runs/$NAME}
    [ -n "$dry_run" ] || mkdir -p "$directory"
    call gcloud storage rsync --recursive "$WORKDIR" "$directory" || refused "cannot copy $WORKDIR"
    ;;
  delete)
    delete
    say "$NAME is gone; $WORKDIR stays, and costs until: gcloud storage rm --recursive $WORKDIR"
    ;;
  *) fail "unknown command $1; see bash launch/tpu_vm/pod.sh --help" ;;
esac
