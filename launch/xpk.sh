#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that xpk made:  launch/xpk.sh ARGUMENTS OF TRAIN
#
# Variables: PROJECT, ZONE, CLUSTER, NAME, TYPE, IMAGE; SLICES (1), STORAGE (a volume that xpk knows; the workdir
# lies in it), RESTARTS (100).  xpk submits a JobSet and returns; the cluster starts it again as often as RESTARTS
# says when it was stopped and has saved (status 143), or when a machine was lost (xpk: every status from 127).
set -euo pipefail
: "${SLICES:=1}" "${STORAGE:=}" "${RESTARTS:=100}"

need() {
    if [ -z "${!1:-}" ]; then
        echo "error: $1 is not set: $1=$2 launch/xpk.sh ...  ($3)" >&2
        exit 2
    fi
}

need PROJECT my-project 'the Google Cloud project that pays'
need ZONE us-west4-a 'the zone of the cluster'
need CLUSTER my-cluster 'as in xpk cluster create'
need NAME stage1 'a name for the workload, of your choice'
need TYPE v5litepod-16 'the slice, as xpk calls it'
need IMAGE my-image:latest 'an image with the package: docker build --target tpu'

# The program takes the place of the shell that xpk starts it in, so that it gets the signals itself.
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
    --tpu-type="$TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" ${STORAGE:+--storage="$STORAGE"} \
    --max-restarts="$RESTARTS" --restart-on-exit-codes=143 --termination-grace-period-seconds=300 \
    --env=COORDINATOR_ADDRESS=auto --command="exec python -m minigpt5_jax.train$(printf ' %q' "$@")"
