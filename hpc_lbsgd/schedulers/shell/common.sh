# Blocks that a batch system's own file need not have.
#@ cores
#@ one
one=()
#@ teller
in_container=
#@ names
short() { echo "$1"; } # of a list of nodes
#@ each_node
#@ bundle
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
#@ unpacked
if [[ $bundle ]]; then
    unpack
    ((${#bare[@]} == 0)) || exit "$((code ? code : 1))"
    python=$ranks_python
fi
#@ ranks
ranks_line() { line=(); } # it has no launcher of its own
#@ stop
# shellcheck disable=SC2317 # called by the trap
ask_ranks() { kill -USR2 "${pid-}"; }
#@ clock
# it gives no signal before the limit: this script keeps time itself
{ sleep "$warn_after_s" & trap 'kill $!' TERM && wait $! && kill -USR2 $$; } </dev/null >/dev/null 2>&1 &
clock=$!
trap 'kill "$clock" 2>/dev/null || true' EXIT # else it would outlive the job
#@ nodes
answers() { true; } # it ends a job that loses a node, and runs it again
meanwhile() { :; }
alone() { :; }
