# shellcheck shell=bash
# Sourced by pod.sh: all gcloud calls, the pod's state, its creation and deletion.

errors=$(mktemp) # stderr of the last command
trap 'rm -f "$errors"' EXIT
exec 3>&1 # where a dry run prints, also inside $(...)
worker='bash sqa_jax/launch/tpu_vm/worker.sh'

say() { [ -n "$dry_run" ] || echo "$(date '+%F %T') $*" >&2; }
pause() { [ -n "$dry_run" ] || sleep "$1"; }

# Quotes its arguments for a shell.
quote() {
  local word line=''
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line$word "
  done
  echo "${line% }"
}

# Runs a command; a dry run prints it instead and continues as if its output were $answer.
call() {
  if [ -n "$dry_run" ]; then
    quote "$@" >&3
    [ -z "${answer:-}" ] || echo "$answer"
  else
    "$@" 2>"$errors"
  fi
}

tpus() { call gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }

# gcloud's reason for the failure of the last call, in one line.
reason() { grep -m 1 -i error "$errors" || tail -n 1 "$errors"; }

# Exits with one line: what failed, why, and what may help.
refused() {
  local why advice
  why=$(reason)
  case $why in
    *[Qq]uota* | *RESOURCE_EXHAUSTED*) advice="ask for more at https://console.cloud.google.com/iam-admin/quotas, or choose another ZONE, ACCELERATOR or SPOT" ;;
    *PERMISSION_DENIED* | *403* | *account* | *credentials*) advice="use an account that may do this: gcloud auth login" ;;
    *ccelerator*) advice="gcloud compute tpus accelerator-types list --zone=$ZONE lists what there is" ;;
    *untime*) advice="gcloud compute tpus versions list --zone=$ZONE lists what there is" ;;
    *) advice="look at ${settings:?}" ;;
  esac
  fail "$*: $why; $advice"
}

nodes() {
  if [ "$SLICES" -eq 1 ]; then echo "$NAME"; else seq -f "$NAME-%g" 0 $((SLICES - 1)); fi
}

ssh_to() {
  tpus tpu-vm ssh "$1" --worker="$2" --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=20 --command="$3"
}

# Runs a command on every worker. 255: a connection could not be made, or broke.
on_workers() {
  local node
  for node in $(nodes); do ssh_to "$node" all "$1" || return; done
}

# Retries a command after a broken connection; the command must be idempotent.
patiently() {
  local try=1 code
  until "$@"; do
    code=$?
    [ "$code" -eq 255 ] && [ "$try" -lt "$PATIENCE" ] || return "$code"
    say "a connection broke ($(reason)); try $((try += 1)) of $PATIENCE"
    pause $((POLL_SECONDS * try))
  done
}

# A resource's state as gcloud reports it; ABSENT if it does not exist, UNKNOWN if gcloud fails.
state_of() {
  tpus "$@" || { grep -q NOT_FOUND "$errors" && echo ABSENT; } || echo UNKNOWN
}

# ACTIVE if the request is active and all its nodes are ready, else the first other state.
pod_state() {
  local state node
  state=$(state_of queued-resources describe "$NAME" --format='value(state.state)')
  if [ "$state" = ACTIVE ]; then
    for node in $(nodes); do
      state=$(answer=READY state_of tpu-vm describe "$node" --format='value(state)')
      case $state in
        READY) state=ACTIVE ;;
        ABSENT) state=DELETED && break ;;
        *) break ;;
      esac
    done
  fi
  echo "$state"
}

# Whether a pod in this state does not recover by itself.
lost() {
  case $1 in
    ABSENT | FAILED | SUSPENDING | SUSPENDED | DELETING | DELETED | PREEMPTED | TERMINATED | STOPPING | STOPPED) return 0 ;;
    *) return 1 ;;
  esac
}

# Fails before anything is paid for if the bucket cannot be written.
check_bucket() {
  { call gcloud storage cp launch/tpu_vm/pod.sh "$WORKDIR.probe" && call gcloud storage rm "$WORKDIR.probe"; } >/dev/null ||
    fail "cannot write to $WORKDIR: $(reason); make the bucket, or ask for roles/storage.objectAdmin and roles/storage.legacyBucketReader on it"
}

# Requests the pod unless it is requested already, and waits for it. Returns 3 if it was not created.
create() {
  local state seen='' deadline=$((SECONDS + WAIT_SECONDS)) request=(--accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME")
  if [ "$SLICES" -eq 1 ]; then request+=(--node-id="$NAME"); else request+=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  [ "$SPOT" = false ] || request+=(--spot)
  state=$(answer=ABSENT pod_state)
  if [ "$state" = UNKNOWN ]; then refused "cannot look for $NAME"; fi
  if [ "$state" = ABSENT ]; then
    tpus queued-resources create "$NAME" "${request[@]}" >/dev/null || refused "cannot ask for $NAME ($ACCELERATOR in $ZONE)"
    state=$(answer=ACTIVE pod_state)
  fi
  while [ "$state" != ACTIVE ]; do
    ! lost "$state" || return 3
    [ "$SECONDS" -lt "$deadline" ] || fail "$NAME is still $state after $WAIT_SECONDS s; it stays in the queue: create waits on, delete gives it up"
    [ "$state" = "$seen" ] || say "$NAME is $state"
    seen=$state
    pause "$POLL_SECONDS"
    state=$(pod_state)
  done
  say "$NAME is ACTIVE, and costs until it is deleted"
}

delete() {
  tpus queued-resources delete "$NAME" --force >/dev/null || grep -q NOT_FOUND "$errors" || refused "cannot delete $NAME; it may still cost"
}

# Packs the files that git tracks, with their local changes.
pack() {
  local command
  archive=runs/$NAME.tgz
  command=(tar -czf "$archive" --null --files-from=-)
  [ "${#EXTRA_FILES[@]}" -eq 0 ] || command+=("${EXTRA_FILES[@]}")
  if [ -n "$dry_run" ]; then
    echo "mkdir -p runs && git ls-files -z | $(quote "${command[@]}")" >&3
  else
    mkdir -p runs
    git ls-files -z | "${command[@]}" || fail "cannot pack the clone: git rm what you deleted, and look at EXTRA_FILES in $settings"
  fi
}

# Replaces the clone on every worker by the packed files; .venv and datasets stay.
send() {
  local node
  for node in $(nodes); do
    patiently tpus tpu-vm scp "$archive" "$node:sqa_jax.tgz" --worker=all --scp-flag=-oConnectTimeout=20 || return
  done
  patiently on_workers "mkdir -p sqa_jax && find sqa_jax -mindepth 1 -maxdepth 1 ! -name .venv ! -name datasets -exec rm -rf {} + && tar -xzf sqa_jax.tgz -C sqa_jax"
}

setup() { patiently on_workers "$worker setup"; }
