# The part of PBS in a job's script. A block is what follows a line `#@ NAME`.
#@ job
job=${PBS_JOBID:?not in a job of PBS; $usage}
cd "${PBS_O_WORKDIR:?}" # a job begins in the home folder
#@ place
# shellcheck disable=SC2034 # some of them are not asked for
task='' here='' restarts='' # PBS tells none of them
#@ hosts
mapfile -t nodes < <(awk '!seen[$0]++' "${PBS_NODEFILE:?}") # it has a line a rank
#@ renamed
by_another_name() { export OMPI_MCA_plm=rsh OMPI_MCA_ras=^tm PRTE_MCA_plm=ssh PRTE_MCA_ras=^pbs HYDRA_BOOTSTRAP=ssh; }
#@ ask
killed=
trap 'killed=yes; stop' TERM # qdel sends it, and leaves the state R until the job is over
state() {
    local found
    [[ ! $killed ]] || { echo "being ended" && return; }
    found=$(timeout 60 qstat -f "$job") || return 1
    if grep -q '^ *job_state = R$' <<<"$found"; then echo RUNNING; else echo "being ended"; fi
}
#@ again
queue_again() { # queue_again WHY: qrerun is an operator's, so this job's successor is submitted
    local next
    still_running "$1"
    next=$(timeout 60 "${again[0]:-false}" -W "depend=afterany:$job" "${again[@]:1}") || not_queued "$1"
    record "$next"
    tell own --run "$run" --pass-to "$next"
    say "$1; queued again as $next"
    exit 0
}
