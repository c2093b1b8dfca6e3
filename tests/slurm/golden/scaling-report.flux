#!/usr/bin/env bash
# Measures how a recipe scales, on the nodes it gets: resources and life-cycle, nothing else.
#
#   flux batch scaling.flux RECIPE [--out DIR] [--set KEY=VALUE ...]
#   flux batch scaling.flux --report DIR
#
# Jobs of different sizes may run in any order or side by side: each adds its part to DIR and renews the report there.
#
# ---- the site's part: `hpc-lbsgd submit` writes it from a site file; by hand, edit it or give options to the command
# flux: --job-name=resnet.report
# flux: --queue=gpu
# flux: --setattr=bank=proj1
# flux: --nodes=1
# flux: --nslots=1
# flux: --cores-per-slot=32
# flux: --time-limit=93784s
set -euo pipefail
set +eu # what sites define uses unset variables
# shellcheck source=/dev/null
command -v module >/dev/null || . /etc/profile # a job's shell is no login shell
set -e
module load gcc/12
set -u
python=/opt/env/python
launcher=flux
mpi=openmpi
host_suffix=
wrap=()
each=8
cores=32
bundle=
# ---- end of the site's part

usage="usage: flux batch scaling.flux RECIPE [--out DIR] [--set KEY=VALUE ...] | --report DIR"
# the script runs in an instance of its own: only its attributes tell of the job that it is
job=$(flux getattr jobid 2>/dev/null) || { echo "not in a job of Flux; $usage" >&2 && exit 2; }
job=$(flux job id "$job") # in decimals
export HPC_LBSGD_FLUX_JOB=$job
one=(flux run --nodes=1 --ntasks=1 --cores-per-task="$cores")
: "${1:?$usage}"
words=(-m hpc_lbsgd.cli bench scaling "$@")
echo "scaling.flux: job $job on $(hostname)" >&2

if [[ $1 == --report* ]]; then
    exec "${one[@]}" "${wrap[@]}" "$python" "${words[@]}"
fi
mapfile -t nodes < <(flux hostlist --local --expand --delimiter='\n')
short() { flux hostlist "$1"; }
each_node() { # each_node COMMAND...: a process on each node
    timeout --kill-after=10 1800 flux run --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" -o exit-timeout=none "$@"
}
ranks_python='' # where a bundle has it, on each node's own disk
ready=() bare=() # nodes that have it, and that could not unpack it
# shellcheck disable=SC2016 # for the shells there
there='command -v "$0" >/dev/null || { echo "$(hostname): no $(readlink -m "$0"), to which $0 links" >&2; exit 2; }'
there+='; exec "$0" "$@"'
unpack() {
    local node how path found fresh=0 begun=$SECONDS
    for _ in 1 2; do # again where some nodes have it as it was, and some as it was packed anew meanwhile
        code=0
        found=$(each_node bash -c "$there" "$python" -m hpc_lbsgd.cli stage-bundle "$bundle") || code=$?
        (($(awk '/^[^ ]+ (unpacked|there) / {$1 = $2 = ""; print}' <<<"$found" | sort -u | wc -l) > 1)) || break
    done
    while read -r node how path; do
        [[ $how == unpacked || $how == there ]] || continue
        ready+=("${node%%.*}")
        [[ $how == there ]] || fresh=$((fresh + 1))
        if [[ ${ranks_python:=$path} != "$path" ]]; then
            echo "stage_dir is not the same folder on all nodes: $path on $node, and $ranks_python" >&2
            code=2 fresh=0 ready=()
            break
        fi
    done <<<"$found"
    for node in "${nodes[@]}"; do
        [[ " ${ready[*]-} " == *" ${node%%.*} "* ]] || bare+=("$node")
    done
    echo "$bundle: unpacked on $fresh nodes, there before on $((${#ready[@]} - fresh)), in $((SECONDS - begun)) s" >&2
    export PYTHONSAFEPATH=1 # the program is the packed one, also where another lies in this folder
    [[ ! -x $ranks_python ]] || without_another
}
without_another() { # nor in one that PYTHONPATH names
    local folder kept=
    while IFS= read -rd: folder; do
        [[ ! $folder || -e $folder/hpc_lbsgd/__init__.py ]] || kept+=${kept:+:}$folder
    done <<<"${PYTHONPATH-}:"
    export PYTHONPATH=$kept
}
if [[ $bundle ]]; then
    unpack
    ((${#bare[@]} == 0)) || exit "$((code ? code : 1))"
    python=$ranks_python
fi
by_another_name() { export OMPI_MCA_plm=rsh OMPI_MCA_ras=^flux PRTE_MCA_plm=ssh PRTE_MCA_ras=^flux HYDRA_BOOTSTRAP=ssh; }
list() { (IFS=, && echo "$*"); }
ranks_line() { # `line`: what starts a process a rank, on the nodes of `used`; each sees all GPUs of its node, for NCCL
    line=(flux run --nodes="${#used[@]}" --ntasks="$ranks" --cores-per-task="$cores" --requires="hosts:$(list "${used[@]}")"
        -o gpu-affinity=off -o exit-timeout=120s)
}
if [[ $launcher != mpirun ]]; then # every task is a rank
    # shellcheck disable=SC2034 # asked for in ranks_line
    used=("${nodes[@]}") ranks=$((each * ${#nodes[@]}))
    ranks_line
    exec "${line[@]}" "${wrap[@]}" "$python" "${words[@]}"
fi
hosts=(--hosts "$(list "${nodes[@]/%/$host_suffix:$each}")")
[[ ! $host_suffix ]] || by_another_name
exec "$python" "${words[@]}" --nodes "${#nodes[@]}" --ranks-per-node "$each" --mpi "$mpi" "${hosts[@]}"
