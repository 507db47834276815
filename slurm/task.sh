#!/usr/bin/env bash
# One task of a job, started by srun: task.sh LOGS COMMAND [ARGUMENT ...]
#
# Its output goes to LOGS/rank-N.log, rank 0's to the job's log too. The first task that fails leaves its exit code, rank
# and host in LOGS/first_failure; the others do not, as srun ends them thereupon, for no reason of their own.
logs=$1
rank=$SLURM_PROCID
shift
if [[ ! -d $logs ]]; then
    echo "megarl: $logs: must be a folder that $(hostname) sees too. Fix: set MEGARL_LOGS to a shared one." >&2
    exit 2
fi

# The file holds the job's earlier starts too.
echo "megarl: start $((${SLURM_RESTART_COUNT:-0} + 1)) on ${SLURMD_NODENAME:-$(hostname)}" >>"$logs/rank-$rank.log"
# Slurm gives a signal to each process of the step. The command answers it; what is around the command only waits.
trap '' USR1 TERM
if ((rank == 0)); then
    exec > >(exec tee -a "$logs/rank-0.log") 2>&1
    tee=$!
else
    exec >>"$logs/rank-$rank.log" 2>&1
fi
# No longer ignored, which the command would inherit.
trap : USR1 TERM

"$@"
code=$?

if ((code != 0)); then
    (set -o noclobber && echo "$code $rank ${SLURMD_NODENAME:-$(hostname)}" >"$logs/first_failure") 2>/dev/null
fi
exec >&- 2>&-
[[ -z ${tee:-} ]] || wait "$tee"
exit "$code"
