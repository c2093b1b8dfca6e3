# The part of Flux in a job's script. A block is what follows a line `#@ NAME`.
#@ job
# the script runs in an instance of its own: only its attributes tell of the job that it is
job=$(flux getattr jobid 2>/dev/null) || { echo "not in a job of Flux; $usage" >&2 && exit 2; }
job=$(flux job id "$job") # in decimals
export HPC_LBSGD_FLUX_JOB=$job
#@ place
# shellcheck disable=SC2034 # some of them are not asked for
task='' here='' restarts='' # Flux tells none of them
#@ one
one=(flux run --nodes=1 --ntasks=1 --cores-per-task="$cores")
#@ hosts
mapfile -t nodes < <(flux hostlist --local --expand --delimiter='\n')
#@ names
short() { flux hostlist "$1"; }
#@ renamed
by_another_name() { export OMPI_MCA_plm=rsh OMPI_MCA_ras=^flux PRTE_MCA_plm=ssh PRTE_MCA_ras=^flux HYDRA_BOOTSTRAP=ssh; }
#@ each_node
each_node() { # each_node COMMAND...: a process on each node
    timeout --kill-after=10 1800 flux run --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" -o exit-timeout=none "$@"
}
#@ ranks
ranks_line() { # `line`: what starts a process a rank, on the nodes of `used`; each sees all GPUs of its node, for NCCL
    line=(flux run --nodes="${#used[@]}" --ntasks="$ranks" --cores-per-task="$cores" --requires="hosts:$(list "${used[@]}")"
        -o gpu-affinity=off -o exit-timeout=120s)
}
#@ stop
# shellcheck disable=SC2317 # called by the trap
ask_ranks() { # of `flux run` the signal would be the end
    if [[ $launcher == flux ]]; then flux job killall --force --signal=USR2; else kill -USR2 "${pid-}"; fi
}
#@ nodes
answers() { timeout --kill-after=5 30 flux run --nodes=1 --ntasks=1 --requires="hosts:$1" true >/dev/null 2>&1; }
meanwhile() { :; }
alone() { :; }
#@ ask
state() {
    local found
    found=$(timeout 60 flux --parent jobs --suppress-header --format='{state}' "$job") || return 1
    if [[ $found == RUN ]]; then echo RUNNING; else echo "being ended"; fi
}
#@ again
queue_again() { # queue_again WHY: nothing queues a job again, so its successor is submitted to where it came from
    local next without=()
    ((${#dropped[@]} == 0)) || without=(--requires="-hosts:$(list "${dropped[@]}")")
    still_running "$1"
    next=$(timeout 60 "${again[0]:-false}" --parent batch --dependency="afterany:$job" "${without[@]}" "${again[@]:2}") ||
        not_queued "$1"
    next=$(flux job id "$next")
    record "$next"
    tell own --run "$run" --pass-to "$next"
    say "$1; queued again as $next${dropped[0]+ without $(list "${dropped[@]}")}"
    exit 0
}
