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
