# Slurm's part of a job's script. A block is what follows a line `#@ NAME`.
#@ job
# of an array, this task alone: its last one has the array's own number, by which Slurm means all of them
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID-}}
job=${job:-${SLURM_JOB_ID:?not in a Slurm job; $usage}}
#@ place
task=${SLURM_ARRAY_TASK_ID-}
here=${SLURMD_NODENAME-}
restarts=${SLURM_RESTART_COUNT:-0}
#@ cores
cores=${SLURM_CPUS_PER_TASK:?} # a rank
#@ one
one=(srun --mpi=none --nodes=1 --ntasks=1 --cpus-per-task="$cores" "${srun_options[@]}") # a process, all cores
#@ teller
in_container=${srun_options[*]-} # what srun puts there is looked for in there
[[ ! $in_container ]] || teller=(srun --overlap --mpi=none --nodes=1 --ntasks=1 "${srun_options[@]}")
#@ hosts
mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
#@ names
each=${each:-$((${SLURM_NTASKS:?} / ${#nodes[@]}))} # ranks a node
short() { scontrol show hostlist "$1"; } # of a list of nodes
#@ renamed
by_another_name() { # nodes go by names that Slurm does not know: mpirun reaches them by ssh
    export OMPI_MCA_plm=rsh OMPI_MCA_ras=^slurm PRTE_MCA_plm=ssh PRTE_MCA_ras=^slurm HYDRA_BOOTSTRAP=ssh
}
#@ each_node
each_node() { # each_node COMMAND...: a process on each node
    local all
    all=$(IFS=, && echo "${nodes[*]}")
    timeout --kill-after=10 1800 srun --mpi=none --nodelist="$all" --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" \
        --ntasks-per-node=1 --gpus-per-node=0 --kill-on-bad-exit=0 "$@"
}
#@ ranks
ranks_line() { # `line`: what starts a process a rank, on the nodes of `used`
    line=(srun --mpi="$wire_up" --nodelist="$(list "${used[@]}")" --nodes="${#used[@]}" --ntasks="$ranks"
        --ntasks-per-node="$each" --cpus-per-task="$cores" --cpu-bind=cores --distribution=block:block
        --kill-on-bad-exit=1 --wait=120 "${srun_options[@]}")
    [[ ! ${goes_on-} ]] || export SLURM_OVERLAP=1 # what is left of the last step on a lost node does not hold this one up
}
#@ clock
#@ nodes
beside=(srun --overlap --mpi=none --nodes=1 --ntasks=1 --gpus-per-node=0) # a step beside the ranks
answers() { timeout --kill-after=5 30 "${beside[@]}" --nodelist="$1" true >/dev/null 2>&1; } # can anything be started there?
excluded() { "$@" scontrol show job -o "$job" | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p'; } # nodes, as a list
others() { # others STATES NODES: nodes in such a state (a pattern), but for these, one a line
    comm -23 <(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format="%N %t" |
        awk -v states="^($1)$" '$2 ~ states {print $1}' | sort -u) <(scontrol show hostnames "$2" | sort)
}
hear() { # a step of our own hears Slurm's signals in the place of mpirun's
    exec "${beside[@]}" --nodelist="$here" bash -c \
        'trap "kill -USR2 $0" TERM USR1 USR2; while :; do sleep 1; done' $$ 2>/dev/null
}
guard() { # a job that outlives nodes outlives this script's too, with nobody in it: another node queues it again then
    exec "${beside[@]}" --nodelist="${nodes[-1]}" bash -c 'while sleep 20; do
        [[ $(scontrol show node "$0" -o) != *State=DOWN* ]] || scontrol requeue "$1"; done' \
        "$here" "$job" 2>/dev/null
}
grow() { # where nodes are free, the job is queued again to get more of them
    while sleep "$grow_every_s"; do
        if others idle "$(excluded)" | grep -q .; then
            say "has ${#nodes[@]} of $most nodes, and some are free"
            kill -USR2 $$
        fi
    done
}
[[ $launcher == srun ]] || { hear & }
helpers=()
meanwhile() { # of this start
    if [[ $outlives && ${nodes[-1]} != "$here" ]]; then guard & helpers+=($!); fi
    if [[ $grow_every_s ]] && ((${#nodes[@]} < most)); then grow & helpers+=($!); fi
}
alone() {
    ((${#helpers[@]} == 0)) || kill "${helpers[@]}" 2>/dev/null || true
    helpers=()
}
#@ ask
ask() { # ask COMMAND...: of Slurm; again and again while its controller is away, for a quarter of an hour
    local pause=1 there=
    until timeout 60 "$@"; do
        if timeout 60 scontrol ping >/dev/null 2>&1; then
            [[ ! $there ]] || return 1 # it is there, and refuses
            there=yes
        else
            there=
            ((pause > 1)) || say "Slurm's controller does not answer; asking again"
            ((pause < 600)) || return 1
            sleep "$pause"
            pause=$((2 * pause))
        fi
    done
}
state() { ask squeue --noheader --jobs="$job" --states=all --format=%T; }
put_back() { ask scontrol requeue "$job"; }
#@ again
queue_again() { # queue_again WHY: this job, without the nodes that were dropped; does not return
    local left without
    without=$(list "${dropped[@]}")
    if [[ $without ]]; then
        without+=$(excluded ask | sed 's/^./,&/') || true
        left=$(others 'idle|alloc|mix|comp|plnd|resv' "$without" | wc -l) || left=0
        ((left == 0 || left >= needs)) || without= # it would wait for ever
    fi
    still_running "$1"
    put_back || {
        still_running "$1" # preempted in this moment, perhaps
        not_queued "$1"
    }
    say "$1; queued again${without:+ without $without}"
    # Slurm gives this script KillWait more (30 s by default), and may not take a change for a part of it
    for _ in {1..30}; do
        if [[ ! $without ]] || timeout 60 scontrol update JobId="$job" ExcNodeList="$without"; then break; fi
        sleep 1
    done
    exit 0
}
