#!/usr/bin/env bash
# Measures sums over all ranks of the nodes it gets, by size and algorithm: resources and life-cycle, nothing else.
#
#   @submit@ [--largest 1GB] [--algorithms A,B] [--plot FILE]
#
# ---- the site's part: `hpc-lbsgd submit` writes it from a site file; by hand, edit it or give options to the command
# ---- end of the site's part

usage="usage: @submit@ [OPTIONS of hpc-lbsgd bench allreduce]"
#@ job
#@ cores
#@ hosts
#@ names
#@ each_node
#@ bundle
#@ unpacked
echo "@script@: job $job on ${#nodes[@]} nodes" >&2

# The benchmark starts the ranks itself, once a contender and round: by mpirun, which finds the job's nodes, or by srun.
if [[ $launcher == srun ]]; then
    if [[ ${srun_options[*]}${wrap[*]} ]]; then
        echo "@script@: not in a container: the benchmark starts srun, which is not in there" >&2
        exit 2
    fi
    export HPC_LBSGD_SRUN="srun --mpi=$wire_up --cpus-per-task=$cores --cpu-bind=cores"
    HPC_LBSGD_SRUN+=" --distribution=block:block --kill-on-bad-exit=1"
fi
exec "$python" -m hpc_lbsgd.cli bench allreduce --ranks "$((each * ${#nodes[@]}))" --node-size "$each" "$@"
