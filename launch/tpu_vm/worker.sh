#!/usr/bin/env bash
# Commands of pod.sh for one worker, in the clone that it pushed there.
# Usage: worker.sh setup | start VERB ARGUMENTS... | status | tail | stop SECONDS
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

run=$HOME/sqa_jax_run # beside the clone, which a push replaces
mkdir -p "$run"

# The run's processes hold this lock, so it is free as soon as the last of them has ended, for whatever reason.
running() { ! flock --nonblock "$run/lock" true; }

setup() {
  # TPU VM images have a Python that is too old and lacks venv; uv installs a newer one.
  [ -x "$VENV/bin/python" ] || {
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --seed --python 3.12 "$VENV"
  } || fail "cannot make $VENV"
  PYTHON=$VENV/bin/python prepare_environment tpu --editable '.[tpu,gcs]'
}

start() {
  exec 9>>"$run/lock"
  if ! flock --wait 0.2 9; then
    [ "$*" = "$(cat "$run/command")" ] && return # a command that a broken connection sent twice
    echo "error: another run is going on: $(cat "$run/command"); follow it with the same arguments, or stop it first" >&2
    exit 2
  fi
  rm -f "$run/exit"
  echo "$*" >"$run/command"
  echo "== $(date '+%F %T') $*" >>"$run/log"
  # A new session outlives the connection. A signal to its group reaches the verb, which saves and exits; the shell
  # around it survives, and records the exit code.
  # shellcheck disable=SC2016
  setsid bash -c 'trap : TERM; exit=$1; shift; "$@"; echo $? >"$exit"' run "$run/exit" \
    "$VENV/bin/python" -m "sqa_jax.$1" "${@:2}" </dev/null >>"$run/log" 2>&1 &
  echo $! >"$run/pid"
}

status() {
  local last
  [ -e "$run/command" ] || { echo "$HOSTNAME idle"; return; }
  last=$(tail -c 1000 "$run/log" | tr '\r' '\n' | grep . | tail -n 1 | cut -c 1-160) || true
  if running; then echo "$HOSTNAME running $last"; else echo "$HOSTNAME ended $(cat "$run/exit" 2>/dev/null || echo killed) $last"; fi
}

stop() {
  running || return 0
  kill -TERM -- "-$(cat "$run/pid")" || true
  flock --wait "$1" "$run/lock" true || {
    pkill -KILL --session "$(cat "$run/pid")"
    flock --wait 30 "$run/lock" true # until the system has released the chips
  }
}

case $1 in
  setup | start | status | stop) "$@" ;;
  tail) tail -n 20 "$run/log" | sed "s/^/$HOSTNAME: /" ;;
  *) fail "unknown argument $1" ;;
esac
