#!/usr/bin/env bash
# Measures how a recipe scales, on the nodes it gets: resources and life-cycle, nothing else.
#
#   @submit@ RECIPE [--out DIR] [--set KEY=VALUE ...]
#   @submit@ --report DIR
#
# Jobs of different sizes may run in any order or side by side: each adds its part to DIR and renews the report there.
#
# ---- the site's part: `hpc-lbsgd submit` writes it from a site file; by hand, edit it or give options to the command
# ---- end of the site's part

usage="usage: @submit@ RECIPE [--out DIR] [--set KEY=VALUE ...] | --report DIR"
#@ job
#@ cores
#@ one
: "${1:?$usage}"
words=(-m hpc_lbsgd.cli bench scaling "$@")
echo "@script@: job $job on $(hostname)" >&2

if [[ $1 == --report* ]]; then
    exec "${one[@]}" "${wrap[@]}" "$python" "${words[@]}"
fi
#@ hosts
#@ names
#@ each_node
#@ bundle
#@ unpacked
#@ renamed
list() { (IFS=, && echo "$*"); }
#@ ranks
if [[ $launcher != mpirun ]]; then # every task is a rank
    # shellcheck disable=SC2034 # asked for in ranks_line
    used=("${nodes[@]}") ranks=$((each * ${#nodes[@]}))
    ranks_line
    exec "${line[@]}" "${wrap[@]}" "$python" "${words[@]}"
fi
hosts=(--hosts "$(list "${nodes[@]/%/$host_suffix:$each}")")
[[ ! $host_suffix ]] || by_another_name
exec "$python" "${words[@]}" --nodes "${#nodes[@]}" --ranks-per-node "$each" --mpi "$mpi" "${hosts[@]}"
