# shellcheck shell=bash disable=SC2034
# Copy this to launch/tpu_vm/settings.sh, which git ignores, and fill it in. Every line is needed; nothing here is secret.

PROJECT=my-project
ZONE=us-west4-a                # gcloud compute tpus accelerator-types list --zone=ZONE: what a zone has
NAME=sqa                       # of the queued resource and its nodes: small letters, digits and dashes
ACCELERATOR=v5litepod-16       # v5litepod-N, v6e-N: N chips; v4-N, v5p-N: N/2 chips
RUNTIME=v2-alpha-tpuv5-lite    # v6e: v2-alpha-tpuv6e; v5p: v2-alpha-tpuv5; v4: tpu-ubuntu2204-base
SLICES=1                       # more than 1: so many slices, joined by the data-centre network
SPOT=true                      # true: far cheaper, may be taken away at any time; false: on demand
WORKDIR=gs://my-bucket/runs/sqa # of the run; a bucket in the zone's region costs nothing to read and write
EXTRA_FILES=()                 # what git does not track but the run needs, such as weights/student.gguf

POLL_SECONDS=30                # between two polls of the pod
WAIT_SECONDS=86400             # for the pod to come; the request stays in the queue after that
STOP_SECONDS=120               # for a worker to save before it is killed
PATIENCE=10                    # consecutive polls without an answer of the workers
MAX_RESTARTS=20                # after preemptions and failures
