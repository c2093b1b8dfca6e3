#!/usr/bin/env bash
# Prepares data on one node with all its cores: resources and life-cycle, nothing else.
#
#   @submit@ index data/imagenet/train
#
# ---- the site's part: `hpc-lbsgd submit` writes it from a site file; by hand, edit it or give options to the command
# ---- end of the site's part

usage="usage: @submit@ fetch NAME | index DIR ..."
#@ job
#@ cores
#@ one
: "${1:?$usage}"
echo "@script@: job $job on $(hostname)" >&2

# An index is written whole or not at all, so a job that was cut short is simply run again.
exec "${one[@]}" "${wrap[@]}" "$python" -m hpc_lbsgd.cli data "$@"
