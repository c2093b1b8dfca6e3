# LSF's part of a job's script. A block is what follows a line `#@ NAME`.
#@ job
job=${LSB_JOBID:?not in a job of LSF; $usage}
((${LSB_JOBINDEX:-0} == 0)) || job+="[$LSB_JOBINDEX]"
#@ place
# shellcheck disable=SC2034 # some of them are not asked for
task=$((${LSB_JOBINDEX:-0} - 1)) here='' restarts='' # of an array, from 0 on; LSF tells of no restart
#@ hosts
mapfile -t nodes < <(awk '!seen[$0]++' "${LSB_DJOB_HOSTFILE:?}") # it has a line a slot
#@ renamed
by_another_name() { export OMPI_MCA_plm=rsh OMPI_MCA_ras=^lsf PRTE_MCA_plm=ssh PRTE_MCA_ras=^lsf HYDRA_BOOTSTRAP=ssh; }
#@ clock
#@ ask
killed=
trap 'killed=yes; kill -TERM $$' INT # bkill sends INT first, then TERM; nothing else sends INT
state() {
    local found
    [[ ! $killed ]] || { echo "being ended" && return; }
    found=$(timeout 60 bjobs -noheader -o stat "$job") || return 1
    if [[ $found == RUN ]]; then echo RUNNING; else echo "$found"; fi
}
#@ again
queue_again() { # queue_again WHY: under the same number
    still_running "$1"
    say "$1; queued again"
    trap - INT TERM # so does brequeue end it
    timeout 60 brequeue "$job" >&2 || not_queued "$1"
    sleep 300
    exit 75
}
