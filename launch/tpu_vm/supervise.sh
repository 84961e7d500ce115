# shellcheck shell=bash
# Sourced by pod.sh: runs a verb on all workers until it is done, through broken connections, failures and preemptions.

# The lines of worker.sh's status.
is_running='^[^ ]+ running'
is_well='^[^ ]+ (running|ended 0)( |$)'

# Runs VERB ARGUMENTS... to its end; after a restart it resumes from the checkpoint in WORKDIR.
supervise() {
  local restarts=0 code why state
  pack # once: a restart uses the same code
  while :; do
    code=0 why=''
    { create && start "$@" && follow; } || { code=$? why=$(reason); }
    state=ACTIVE
    case $code in 0 | 2) ;; *) state=$(pod_state) ;; esac
    ! lost "$state" || code=lost
    case $code in
      0)
        ! finished "$1" || break
        why="it was stopped, and has saved"
        ;;
      1) why="a worker failed" ;;
      2) exit 2 ;;
      lost)
        why="$NAME is lost ($state)"
        delete
        ;;
      *) fail "$NAME is not followed any more: ${why:-some workers are silent}; the run itself may go on, the same command follows it" ;;
    esac
    [ "$restarts" -lt "$MAX_RESTARTS" ] ||
      fail "$why, after $MAX_RESTARTS restarts; the same command goes on from the checkpoint in $WORKDIR; $NAME costs until it is deleted"
    say "$why; restart $((restarts += 1)) of $MAX_RESTARTS"
    pause "$POLL_SECONDS"
  done
  say "$1 is done: $WORKDIR; $NAME costs until it is deleted"
}

# Starts the verb on all workers, unless it is running. Returns 2 if another run is going on, 3 if workers do not answer.
start() {
  local lines code=0
  lines=$(patiently on_workers "[ ! -e sqa_jax ] || ${worker:?} status") || return 3
  if ! grep -qE "$is_running" <<<"$lines" || grep -qvE "$is_running" <<<"$lines"; then
    # The remaining workers of a run whose other workers have ended would wait for them forever.
    ! grep -qE "$is_running" <<<"$lines" || patiently on_workers "$worker stop $STOP_SECONDS" || return 3
    { send && setup; } || return 3
  fi
  patiently on_workers "$worker start $(quote "$@")" || code=$?
  case $code in
    0) ;;
    2) reason >&2 && return 2 ;;
    *) return 3 ;;
  esac
}

# Follows the run to its end. Returns 0 if every worker exited with 0, 1 or 2 if one did not, 3 if workers do not answer.
follow() {
  local lines news='' node count workers=0 missed=0
  for node in $(nodes); do
    count=$(answer=1 tpus tpu-vm describe "$node" --format='value(networkEndpoints.len())') || return 3
    workers=$((workers + count))
  done
  while :; do
    pause "$POLL_SECONDS"
    if lines=$(answer='worker ended 0' on_workers "$worker status") && [ "$(grep -c . <<<"$lines")" -eq "$workers" ]; then
      missed=0
      [ "$news" = "$(head -n 1 <<<"$lines")" ] || say "$(grep -cE "$is_running" <<<"$lines") of $workers running; $(head -n 1 <<<"$lines")"
      news=$(head -n 1 <<<"$lines")
      if grep -qvE "$is_well" <<<"$lines"; then
        failure "$lines"
        return
      fi
      grep -qE "$is_running" <<<"$lines" || return 0
    else
      [ $((missed += 1)) -lt "$PATIENCE" ] && ! lost "$(pod_state)" || return 3
      say "the workers do not answer ($missed of $PATIENCE); the run itself goes on"
      pause $((POLL_SECONDS * missed))
    fi
  done
}

# Stops the other workers, shows the end of the failed one's log, and returns 2 for a mistake of the user, else 1.
failure() {
  local failed mistake
  failed=$(grep -m 1 -vE "$is_well" <<<"$1")
  patiently on_workers "$worker stop $STOP_SECONDS" || return 3
  # A process that exits for a mistake ends the others, one of which may have been noticed first.
  mistake=$(patiently on_workers "$worker status" | grep -m 1 -E '^[^ ]+ ended 2( |$)') && failed=$mistake
  patiently on_workers "$worker tail" | grep "^${failed%% *}: " >&2
  echo "error: worker $(cut -d ' ' -f 1,2,3 <<<"$failed"); the last lines of its log are above" >&2
  [ -z "$mistake" ] || return 2
  return 1
}

# Whether a verb whose processes exited with 0 is finished: training that is stopped saves and exits with 0, too.
finished() {
  [ "$1" != train ] || call gcloud storage ls "$WORKDIR/train.json" >/dev/null
}
