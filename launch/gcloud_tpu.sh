#!/usr/bin/env bash
# Trains on a Cloud TPU slice: a queued resource, the same program on every worker, again after a preemption.
#
#   launch/gcloud_tpu.sh create                    ask for the TPU, wait until it is there, install on every worker
#   launch/gcloud_tpu.sh run ARGUMENTS OF TRAIN    train on every worker, to the end
#   launch/gcloud_tpu.sh delete                    give the TPU back
#
# Variables: PROJECT, ZONE, NAME; of what is created TYPE, RUNTIME, SPOT=1 (may be preempted), PREPARE (a command
# for each new worker, such as the mount of what they share); RESTARTS (100).  `run` takes them all, because it
# creates the TPU again when it was taken away.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${RESTARTS:=100}" "${POLL_SECONDS:=30}" "${SETTLE_SECONDS:=60}" "${SPOT:=}" "${PREPARE:=true}"
readonly SAVED=143

fail() {
    echo "error: $1" >&2
    exit 2
}

need() {
    [ -n "${!1:-}" ] || fail "$1 is not set: $1=$2 launch/gcloud_tpu.sh ...  ($3)"
}

queue() {
    local verb=$1
    shift
    gcloud compute tpus queued-resources "$verb" "$NAME" --project="$PROJECT" --zone="$ZONE" "$@"
}

state() { # a queue is waited in for days, in which one call may fail
    local attempt now
    for attempt in 1 2 3; do
        now=$(queue describe --format='value(state.state)') && echo "$now" && return
        [ "$attempt" -eq 3 ] || sleep "$POLL_SECONDS"
    done
    return 1
}

on_every_worker() {
    gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

wait_until_active() {
    local now last=''
    while true; do
        now=$(state) || return 1
        [ "$now" = "$last" ] || echo "launch: $NAME is $now" >&2
        last=$now
        case $now in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED) return 1 ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

install() { # the package as of the last commit; what is not committed does not travel
    local archive
    archive=$(mktemp -d)/minigpt5_jax.tar.gz
    git archive --format=tar.gz --output="$archive" HEAD configs minigpt5_jax pyproject.toml setup.py README.md
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:" --project="$PROJECT" --zone="$ZONE" --worker=all
    rm -r "$(dirname "$archive")"
    on_every_worker "set -e; mkdir -p minigpt5_jax; tar -xzf minigpt5_jax.tar.gz -C minigpt5_jax; cd minigpt5_jax; \
python3 -m pip install --user --quiet uv; [ -d .venv ] || python3 -m uv venv --quiet --python 3.11 .venv; \
python3 -m uv pip install --quiet -e '.[tpu,metrics]'; $PREPARE"
}

create() {
    need TYPE v5litepod-16 'the slice, as Cloud TPU calls it'
    need RUNTIME v2-alpha-tpuv5-lite 'its software, which follows from the type: launch/README.md'
    queue create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
    wait_until_active || fail "the TPU did not come: gcloud compute tpus queued-resources describe $NAME says why"
    install
}

delete() { # with its node, where it still has one
    queue delete --force --quiet
}

run() {
    local status now restart words
    words=$(printf ' %q' "$@")
    for ((restart = 0; restart <= RESTARTS; restart++)); do
        now=$(state)
        if [ "$now" != ACTIVE ]; then
            delete
            create
        fi
        status=0
        on_every_worker "cd minigpt5_jax && COORDINATOR_ADDRESS=auto exec .venv/bin/python -m minigpt5_jax.train$words" ||
            status=$?
        [ "$status" -ne 0 ] || return 0
        if [ "$status" -ne "$SAVED" ]; then
            sleep "$SETTLE_SECONDS" # a preemption shows in the state a little later
            [ "$(state)" != ACTIVE ] || return "$status"
        fi
        echo "launch: interrupted with status $status; going on from the last checkpoint" >&2
    done
    echo "launch: interrupted $((RESTARTS + 1)) times; RESTARTS=$RESTARTS allows no more" >&2
    return "$status"
}

need PROJECT my-project 'the Google Cloud project that pays'
need ZONE us-west4-a 'a zone that has the type'
need NAME stage1 'a name for the TPU, of your choice'
case ${1:-} in
    create | delete) "$1" ;;
    run) shift && run "$@" ;;
    *) fail 'the first argument is create, run or delete' ;;
esac
