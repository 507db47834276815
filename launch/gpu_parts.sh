# Read by gpu_check.sh, not run: a part of the check, with its limit and what became of it.

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q GPU; }

# part NAME SECONDS COMMAND...: runs the command for so long at most: it is asked to end a twentieth earlier, and killed
# then. Its output goes to NAME.out and NAME.log among the results, a line "name, outcome, seconds" to parts.tsv. Always
# succeeds: the next part runs whatever became of this one.
part() {
    local name=$1 limit=$2 started=$EPOCHREALTIME outcome=ok rc=0 asked grace
    shift 2
    [[ " ${MEGARL_GPU_PARTS:-$name} " == *" $name "* ]] || return 0
    echo "gpu_check: $name (at most $limit s)" >&2
    if [[ "$(type -t "$1")" == function ]]; then
        # timeout runs programs alone.
        export -f "$1"
        set -- bash -c '"$@"' bash "$@"
    fi
    read -r asked grace < <(awk -v s="$limit" 'BEGIN { printf "%.2f %.2f\n", 0.95 * s, 0.05 * s }')
    timeout --kill-after="$grace" "$asked" "$@" >"$MEGARL_GPU_RESULTS/$name.out" 2>"$MEGARL_GPU_RESULTS/$name.log" || rc=$?
    case $rc in
        0) ;;
        124 | 137) outcome="not done in $limit s" ;;
        *)
            outcome="failed ($rc)"
            tail -n 15 "$MEGARL_GPU_RESULTS/$name".{out,log} >&2
            ;;
    esac
    _noted "$name" "$outcome" "$started"
}

# As part, for a command that is nothing without a GPU.
gpu_part() {
    if has_gpu; then
        part "$@"
    elif [[ " ${MEGARL_GPU_PARTS:-$1} " == *" $1 "* ]]; then
        _noted "$1" "no GPU" "$EPOCHREALTIME"
    fi
}

_noted() {
    local seconds
    seconds="$(awk -v a="$3" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')"
    printf '%s\t%s\t%s\n' "$1" "$2" "$seconds" >>"$MEGARL_GPU_RESULTS/parts.tsv"
}

# Makes .venv of the bundle in folder $1, without a network. The parts' checksums are compared first.
install_bundle() {
    source launch/extension.sh
    local work kind
    (cd "$1" && sha256sum --check --quiet bundle.sha256) || return
    kind="$(cat "$1/bundle.python")"
    if [[ "$(python_kind "${PYTHON:-python3}")" != "$kind" ]]; then
        echo "gpu_check: the bundle in $1 is for $kind: set PYTHON to such a Python" >&2
        return 1
    fi
    work="$(mktemp -d)" || return
    cat "$1"/bundle.tar.* | tar -xf - -C "$work" &&
        MEGARL_LOCK=gpu PIP_NO_INDEX=1 PIP_FIND_LINKS="$work/wheels" PIP_CONFIG_FILE=/dev/null \
            MEGARL_CACHE="$work/cache" bash launch/setup.sh
    local rc=$?
    rm -rf "$work"
    return $rc
}
