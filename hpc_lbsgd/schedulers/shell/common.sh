# Blocks that a batch system's own file need not have.
#@ cores
#@ one
one=()
#@ teller
in_container=
#@ names
short() { echo "$1"; } # of a list of nodes
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
