#!/usr/bin/env bash
# Trains a recipe: resources and life-cycle, nothing else.
#
#   @submit@ RECIPE [--run DIR] [--resume] [--set KEY=VALUE ...]
#
# A signal before the time limit, or at preemption, asks all ranks to stop after the same step; the job is queued again
# and goes on in the same run folder. A node that is lost, or hangs: the ranks start again without it, in this job where
# `least` nodes are left, else in the job that is queued again. A failure that a rank explains: the end.
#
# ---- the site's part: `hpc-lbsgd submit` writes it from a site file; by hand, edit it or give options to the command
# ---- end of the site's part

usage="usage: @submit@ RECIPE [--run DIR] [--resume] [--set KEY=VALUE ...]"
#@ job
#@ place
#@ cores
say() { echo "@script@: job $job${chain:+, stage $chain}: $*" >&2; }

recipe=${1:?$usage}
shift
name=${recipe##*/}
run=runs/${name%.y*ml}-$job
options=()
settings=()
resume=--resume-if-exists
while (($#)); do
    case $1 in
        --run) run=${2:?--run wants a folder}; shift ;;
        --run=*) run=${1#--run=} ;;
        --resume | --resume-if-exists) resume=$1 ;;
        --set) settings+=("$1" "${2:?--set wants KEY=VALUE}"); shift ;;
        *) options+=("$1") ;;
    esac
    shift
done
if [[ $array_key ]]; then # a task of an array: a value and a run folder of its own
    value=${array_values[task]}
    settings+=(--set "$array_key=$value")
    run+=/$array_key=$value
fi
[[ $run != -* ]] || run=./$run # no command takes it for an option
teller=()
#@ teller
[[ $in_container ]] || command -v "${wrap[0]:-$python}" >/dev/null || { say "no ${wrap[0]:-$python} on $(hostname)"; exit 2; }

# ---- one owner a run folder: this job, with its restarts and its ranks. Nothing in it is touched before
tell() { timeout 300 "${teller[@]}" "${wrap[@]}" "$python" -m hpc_lbsgd.cli "$@"; }
HPC_LBSGD_OWNER=$(tell own --run "$run") || {
    code=$?
    say "did not get $run, and changed nothing in it"
    exit "$code"
}
export HPC_LBSGD_OWNER
leave() { # leave CODE: this job is over
    tell own --run "$run" --release "$1" || true
    exit "$1"
}

# ---- its nodes: ranks run on the first `most` of them, the others are spare
#@ hosts
((${#nodes[@]})) || { say "its nodes are not known" && leave 1; }
#@ names
#@ renamed
# shellcheck disable=SC2034 # not every batch system asks
outlives=${least:+yes} # the job does
most=${most:-${#nodes[@]}}
least=${least:-$most}
# shellcheck disable=SC2034 # not every batch system asks
needs=$((least == most ? ${#nodes[@]} : least)) # nodes with which it starts again
dropped=() # those that get no ranks any more
list() { (IFS=, && echo "$*"); }
drop() { # drop NODE...: what of them was among the nodes is in `new` then
    local node left=()
    new=()
    for node in "${nodes[@]}"; do
        if [[ " $* " == *" ${node%%.*} "* ]]; then new+=("$node"); else left+=("$node"); fi
    done
    ((${#left[@]})) || new=() # all of them: that says nothing about any
    ((${#new[@]} == 0)) || { nodes=("${left[@]}") && dropped+=("${new[@]}"); }
}

# ---- a start of the ranks
read -r reached idle whose before < <(cat "$run/restarts" 2>/dev/null || echo - 0 - 0) # as the last start left them
restarts=${restarts:-$([[ $whose != "$job" ]] && echo 0 || echo "$before")}
record() { echo "$reached $idle $1 $((restarts + 1))" >"$run/restarts"; } # of which job, and what start the next is
count() { # restarts that come no further are counted: a fault that repeats must not eat the allocation
    local now
    mkdir -p "$run"
    rm -f "$run/status.json"
    now=$(cat "$run/checkpoints/LATEST" 2>/dev/null || echo none)
    if ((restarts)) && [[ $now == "$reached" ]]; then idle=$((idle + 1)); else idle=0; fi
    reached=$now
    record "$job"
    if ((idle > max_restarts)); then
        say "gave up after $max_restarts restarts without a new checkpoint (the newest: $reached) in $run"
        leave 1
    fi
}

#@ each_node
#@ bundle
#@ ranks

if [[ $launcher == mpirun && $host_suffix ]]; then
    by_another_name
elif [[ $launcher == mpirun ]] && env --block-signal=TERM true 2>/dev/null; then # coreutils 8.31
    # what a system asks of a job's steps (preemption, a signal) would end mpirun's daemons, and the ranks so
    export PRTE_MCA_prte_launch_agent="env --block-signal=TERM,USR1,USR2 prted"
    export OMPI_MCA_orte_launch_agent="env --block-signal=TERM,USR1,USR2 orted"
fi

start() { # a run that is there is never started anew, also where a rank does not see it
    used=("${nodes[@]:0:most}")
    ranks=$((each * ${#used[@]}))
    count
    say "start $((restarts + 1)) on $(short "$(list "${used[@]}")"), $ranks ranks, newest checkpoint: $reached"
    [[ ! -e $run/recipe.yaml ]] || resume=--resume
    export HPC_LBSGD_SPARE_NODES=$((${#nodes[@]} - ${#used[@]}))
    local line words=(train "$recipe" "${settings[@]}" "${options[@]}" --run "$run" "$resume")
    if [[ $launcher != mpirun ]]; then
        ranks_line
        line+=("${wrap[@]}" "${ranks_python:-$python}" -m hpc_lbsgd.cli "${words[@]}")
    else
        line=("${ranks_python:-$python}" -m hpc_lbsgd.cli launch --np "$ranks" --mpi "$mpi"
            --hosts "$(list "${used[@]/%/$host_suffix:$each}")" -- "${words[@]}")
    fi
    "${line[@]}" &
    pid=$!
}

# ---- what is asked of it meanwhile
asked=
#@ stop
# shellcheck disable=SC2317 # called by the trap
stop() {
    say "asked to stop at a safe point"
    asked=yes
    ask_ranks 2>/dev/null || touch -- "$run/stop" 2>/dev/null || true # they look there as well
}
trap stop USR1 USR2 TERM
#@ clock

#@ nodes

# ---- how it ended, and what follows
#@ ask

still_running() { # or ends: where it is queued again already, the run stays ours; where it was cancelled, that is known
    local now
    now=$(state) || now=unknown
    [[ $now == RUNNING || $now == unknown ]] || { say "$1; is $now: not queued again by this script" && exit 75; }
}
not_queued() { # not_queued WHY
    local flag=
    [[ -e $run/recipe.yaml ]] && flag=--resume
    say "$1; could not be queued again; submit it with ${flag:+$flag }--run $(printf %q "$run")"
    leave 75
}
#@ again
requeue() { trap '' USR1 USR2 TERM && queue_again "$1"; } # requeue WHY; the batch system may end this script meanwhile
not_asked() { [[ ! $asked ]] || requeue "stopped before the first step"; } # or ends: there were no ranks to ask

silent_nodes() { # those on which nothing can be started any more
    local node
    for node in "${nodes[@]}"; do
        { answers "$node" || echo "${node%%.*}"; } &
    done
}

if [[ $bundle ]]; then # what ranks import is unpacked on their nodes; one that cannot is left out
    unpack
    not_asked
    if ((${#ready[@]} == 0)); then mapfile -t bare < <(silent_nodes); fi # one that is gone stops all
    drop "${bare[@]}"
    if ((${#ready[@]} == 0 && ${#new[@]} == 0)); then
        say "no node could unpack $bundle; the cause is above"
        leave "$code"
    fi
    if ((${#ready[@]} == 0 || ${#nodes[@]} < least)) || [[ $launcher == mpirun && ! -x $ranks_python ]]; then
        count
        requeue "could not unpack $bundle: $(list "${new[@]}")"
    fi
    [[ ! ${new[*]-} ]] || say "could not unpack $bundle: $(list "${new[@]}"); goes on with ${#nodes[@]} nodes"
    [[ ! -x $ranks_python ]] || python=$ranks_python
fi

if [[ $preflight ]] && ((${#nodes[@]} > 1 && restarts <= max_restarts)); then # before the first step: bad nodes are left out
    used=("${nodes[@]}") ranks=$((each * ${#nodes[@]})) line=()
    [[ $launcher == mpirun ]] || ranks_line
    slow=$(HPC_LBSGD_SRUN="${line[*]}" tell slow-nodes "$recipe" "${settings[@]}" --ranks-per-node "$each" \
        --hosts "$(list "${nodes[@]/%/$host_suffix}")") || slow=$(silent_nodes)
    # shellcheck disable=SC2086 # names of nodes, one a word
    drop $slow
    if ((${#new[@]} && ${#nodes[@]} < least)); then requeue "bad before the first step: $(list "${new[@]}")"; fi
    [[ ! ${new[*]-} ]] || say "bad before the first step: $(list "${new[@]}"); goes on with ${#nodes[@]} nodes"
fi

says() { grep -q "\"$1\": *$2" "$run/status.json" 2>/dev/null; } # says KEY VALUE: status.json does

not_asked
while :; do
    start
    meanwhile
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a trap ends `wait` early
    code=0 crashed=
    wait "$pid" || code=$?
    alone
    if ((code == 0)) && says status '"done"'; then
        say "done: $run"
        leave 0
    fi
    # shellcheck disable=SC2046 # names of nodes, one a word
    drop $(tell suspects "$run") # by what ranks left on record
    named=("${new[@]}") goes_on=
    if says status '"stopped"'; then
        why="stopped at a safe point"
        [[ ! ${named[*]-} ]] || why+=", $(list "${named[@]}") slow"
        ((${#named[@]} == 0 || ${#nodes[@]} < most)) || goes_on=yes # there is one to take its place
    else
        ((code)) || code=1
        mapfile -t silent < <(silent_nodes)
        # this script's own node is alive: where it seems silent, it is the question that went wrong
        if [[ $here && " ${silent[*]-} " == *" ${here%%.*} "* ]]; then silent=(); fi
        drop "${silent[@]}"
        # `launch` writes crashed where no rank said why. A job that has run before may fail to start its ranks by bad
        # luck. srun: 255 is a wrong option
        if ((code == 2)); then # the request is wrong, on any node that is there
            crashed=
        elif says status '"failed"'; then
            if says crashed true || { ((restarts)) && says crashed; }; then crashed=yes; fi
        elif ((restarts || (code > 2 && code != 126 && code != 127 && code != 255))); then
            crashed=yes
        fi
        if ((${#new[@]})) || [[ $crashed && ${named[*]-} ]]; then
            why="lost $(list "${named[@]}" "${new[@]}")"
            ((${#nodes[@]} < least)) || goes_on=yes
        elif [[ $crashed ]]; then
            why="ended with $code and no rank said why (killed, out of memory, hardware)"
        else
            break
        fi
    fi
    [[ $goes_on && ! $asked ]] || requeue "$why"
    say "$why; goes on with ${#nodes[@]} nodes"
    restarts=$((restarts + 1))
done
say "failed with $code, not queued again; the cause is above${chain:+. The later stages of the chain are cancelled}"
leave "$code"
