# Read by the templates here, not run: what their jobs share. `home` is the repository. What the environment may set,
# which sbatch hands on:
#
#   MEGARL_HOME=DIR          the repository, for jobs that are submitted from elsewhere
#   MEGARL_LOGS=DIR          where the ranks' logs go, seen by all nodes; default: logs/JOB in the job's working folder
#   MEGARL_MAX_RESTARTS=N    how often a job may start again; default: 20
#   MEGARL_ARRAY_KEY=KEY     the setting that is an array task's index, and part of its run's name; default: seed.
#                            Set, but empty: the caller gives each task its settings
#   MEGARL_SRUN="OPTIONS"    further options of srun
#   MEGARL_PYXIS=IMAGE       container by enroot and pyxis, as srun's --container-image takes it
#   MEGARL_APPTAINER=IMAGE   container by apptainer: a .sif file
#   MEGARL_MOUNTS=A:A,B:B    folders that the container sees, besides the repository, the working folder and the logs
#
# CPU binding, threads and NCCL are in launch/environment.sh.

set -uo pipefail
source "$home/launch/environment.sh"
home=$root
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# Python's output in a file is otherwise late, and lost with a process that is killed.
export PYTHONUNBUFFERED=1

say() { echo "megarl: $*" >&2; }

# refuse VALUE RULE FIX
refuse() {
    say "$1: $2. Fix: $3."
    exit 2
}

# Fewer tasks would leave GPUs idle that are paid for, more would share one.
require_one_task_per_gpu() {
    local gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_TASKS_PER_NODE%%[(,]*}
    ((gpus == 0 || gpus == tasks)) ||
        refuse "$tasks task(s) on a node with $gpus GPU(s)" "must be one per GPU" "sbatch --ntasks-per-node=$gpus"
}

# set_array_overrides CONFIG [key=value ...]: sets `array_overrides`, which make this task of an array a run of its own.
set_array_overrides() {
    local key=${MEGARL_ARRAY_KEY-seed} index=${SLURM_ARRAY_TASK_ID:-} name
    array_overrides=()
    [[ -n $key && -n $index ]] || return 0
    name=$(run_name "$@")
    [[ -n $name ]] || refuse "$1" "has no name that the array's runs could be called after" "add name=NAME"
    array_overrides=("$key=$index" "name=$name-${key##*.}$index")
}

# run_name CONFIG [key=value ...]: the run's name from the settings, else from the file, else from that file's base.
run_name() {
    local file=$1 setting name= base
    for setting in "${@:2}"; do
        [[ $setting != name=* ]] || name=${setting#name=}
    done
    while [[ -z $name && -f $file ]]; do
        name=$(top_level name "$file")
        base=$(top_level base "$file")
        [[ -n $base ]] || break
        [[ $base == /* ]] && file=$base || file=$(dirname "$file")/$base
    done
    echo "$name"
}

# top_level KEY FILE: the value of a key of a YAML file's first level, without comment and quotes.
top_level() {
    sed -nE "s/^$1:[[:space:]]*//p" "$2" | head -n 1 |
        sed -E "s/(^|[[:space:]]+)#.*//; s/[[:space:]]+\$//; s/^[\"'](.*)[\"']\$/\1/"
}

# Where the ranks meet: the job's first node, which runs this script and rank 0, by the address that Slurm itself uses.
set_meeting_point() {
    MASTER_ADDR=$(scontrol show node "${SLURMD_NODENAME:-}" 2>/dev/null | grep -oP 'NodeAddr=\K\S+' | head -n 1)
    export MASTER_ADDR=${MASTER_ADDR:-$(hostname)}
    # Jobs that share a node have different numbers, and mostly different ports; below the range of ephemeral ports.
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
    while (: >"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do
        MASTER_PORT=$((20000 + (MASTER_PORT - 19999) % 12000))
    done
    export MASTER_PORT
}

# run_tasks MPI COMMAND [ARGUMENT ...]: runs the command as each task, and ends the job as the outcome asks for.
run_tasks() {
    local mpi=$1
    shift
    # --wait=0: ranks may end at different times, one with an export for example. --export: also where the site or the
    # user has sbatch start jobs with an empty environment.
    local -a options=(--mpi="$mpi" --kill-on-bad-exit=1 --wait=0 --export=ALL) container=()
    # Neighbouring tasks on neighbouring cores, as GPUs of neighbouring numbers hang on the same socket.
    options+=(--cpu-bind="$MEGARL_CPU_BIND" --distribution=block:block)
    # srun does not take it over from sbatch.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    logs=$(realpath -m "${MEGARL_LOGS:-logs/$job}")
    mkdir -p "$logs" || refuse "$logs" "cannot be made" "submit from a shared folder, or set MEGARL_LOGS to one"
    rm -f "$logs/first_failure"
    # Both see these folders under their own names. Only Python's packages come from the image.
    local mounts=$home:$home,$PWD:$PWD,$logs:$logs${MEGARL_MOUNTS:+,$MEGARL_MOUNTS}
    [[ -z ${MEGARL_PYXIS:-}${MEGARL_APPTAINER:-} ]] || export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
    if [[ -n ${MEGARL_PYXIS:-} ]]; then
        options+=(--container-image="$MEGARL_PYXIS" --container-mounts="$mounts" --container-workdir="$PWD")
    elif [[ -n ${MEGARL_APPTAINER:-} ]]; then
        container=(apptainer exec --bind "$mounts" --pwd "$PWD")
        ((${SLURM_GPUS_ON_NODE:-0} == 0)) || container+=(--nv)
        container+=("$MEGARL_APPTAINER")
    fi
    set_meeting_point
    say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: $*; each rank's output in $logs"

    # A shell without a trap would be ended at once by what ends the job, and could not say how the tasks ended.
    trap : TERM
    srun "${options[@]}" ${MEGARL_SRUN:-} bash "$home/slurm/task.sh" "$logs" "${container[@]}" "$@"
    end_job $?
}

# job_state: the job's state and the reason for it; nothing where Slurm's controller is too busy to say, time after time.
job_state() {
    local attempt
    for attempt in 1 2 3 4; do
        squeue --noheader --jobs="$job" --format="%T %r" 2>/dev/null | grep . && return
        sleep 5
    done
}

# is_near_end: whether the job's time is as good as over, where Slurm says when it is.
is_near_end() {
    local ends=${SLURM_JOB_END_TIME:-}
    [[ $ends =~ ^[0-9]+$ ]] && ((ends - $(date +%s) < 600))
}

# end_job CODE: ends the job with srun's exit code; one that is worth another start goes back into the queue. `starts_over`
# is set where a job keeps nothing: at its time limit it would end again and again.
end_job() {
    local code=$1 cause rank host state restarts=${SLURM_RESTART_COUNT:-0} most=${MEGARL_MAX_RESTARTS:-20}
    ((code != 0)) || exit 0
    if read -r cause rank host 2>/dev/null <"$logs/first_failure"; then
        say "rank $rank on $host ended first, with exit code $cause"
        # Rank 0's output is above.
        ((rank == 0)) || tail -n 20 "$logs/rank-$rank.log" | sed "s/^/rank $rank: /" >&2
    else
        # No task lived to say so.
        cause=$code
        say "the tasks ended with exit code $cause"
    fi
    # 75: megarl says that nothing is lost and the same command goes on. From 128 on: a signal ended the process.
    ((cause == 75 || cause >= 128)) || exit "$cause"
    # Where Slurm ended it, for a preemption or by scancel, Slurm also knows whether it starts again.
    state=$(job_state)
    if [[ -n $state && $state != RUNNING* && $state != *TimeLimit ]]; then
        say "job $job is being ended by Slurm or its user, and not started again from here"
    elif [[ -n ${starts_over:-} ]] && { [[ $state == *TimeLimit ]] || is_near_end; }; then
        say "job $job reached its time limit, and would start from the beginning. Fix: submit it with a longer --time"
    elif ((restarts >= most)); then
        say "job $job started again $restarts times, its limit. Fix: see why, then submit it again; it goes on"
    elif scontrol requeue "$job"; then
        say "job $job goes back into the queue, for restart $((restarts + 1)) of at most $most"
    else
        say "job $job cannot go back into the queue. Fix: submit it again; it goes on"
    fi
    exit "$cause"
}
