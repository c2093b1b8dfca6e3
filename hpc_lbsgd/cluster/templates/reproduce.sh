#!/usr/bin/env bash
# Reproduces a paper's table on one node: resources and life-cycle, nothing else.
#
#   @submit@ goyal-table2a --scale full
#
# A signal before the time limit stops the runs under way at a safe point; the job is queued again and goes on.
#
# ---- the site's part: `hpc-lbsgd submit` writes it from a site file; by hand, edit it or give options to the command
# ---- end of the site's part

usage="usage: @submit@ EXPERIMENT [--scale ...]"
#@ job
: "${1:?$usage}"
say() { echo "@script@: job $job: $*" >&2; }

"${wrap[@]}" "$python" -m hpc_lbsgd.cli reproduce "$@" &
pid=$!
trap 'kill -TERM "$pid" 2>/dev/null || true' USR1 USR2 TERM
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a trap ends `wait` early
code=0
wait "$pid" || code=$?

#@ ask
if ((code == 75)) && [[ $(state) == RUNNING ]]; then # stopped at a safe point, and nobody cancelled the job
    trap '' USR1 USR2 TERM
    put_back && exit 0
fi
exit "$code"
