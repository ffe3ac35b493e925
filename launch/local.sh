#!/usr/bin/env bash
# Trains on this machine, on all of its devices:  launch/local.sh ARGUMENTS OF TRAIN
#
# Training that SIGTERM stopped saved its last step and ended with status 143: it is started again and goes on
# from there.  Every other status ends this script with the same one, and so does a signal to the script itself.
set -uo pipefail
set -m # the program has a process group of its own, and Ctrl-C reaches it once, from here
: "${RESTARTS:=100}" "${PYTHON:=python}"
readonly SAVED=143

told='' program=''
# shellcheck disable=SC2317  # by the traps
pass_on() {
    told=$1
    [ -z "$program" ] || kill -s "$1" "$program" 2>/dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

for ((start = 0; start <= RESTARTS; start++)); do
    "$PYTHON" -m minigpt5_jax.train "$@" &
    program=$!
    while true; do # a signal ends `wait` before the program has ended
        wait "$program"
        status=$?
        kill -0 "$program" 2>/dev/null || break
    done
    if [ "$status" -ne "$SAVED" ] || [ -n "$told" ]; then
        exit "$status"
    fi
    echo "launch: stopped by SIGTERM and saved; going on" >&2
done
echo "launch: stopped by SIGTERM $((RESTARTS + 1)) times; RESTARTS=$RESTARTS allows no more" >&2
exit "$SAVED"
