# Read by setup.sh and gpu_bundle.sh, not run: Transformer Engine's extension for PyTorch. It is published as source alone
# and takes half an hour of two cores to compile, so its wheel is kept and found again.
#
#   MEGARL_CACHE=DIR   where compiled wheels are kept (in DIR/wheels); default: ~/.cache/megarl
#   MAX_JOBS=N         compilers side by side; default: one for each core and 4 GB of memory
#   CXX=...            the compiler; default: g++

EXTENSION=transformer-engine-torch

# The version of package $2 in lock $1, empty where it has none.
locked() { sed -nE "s/^$2={2,3}//p" "$1"; }

# The kind of modules that Python $1 loads: cp311-x86_64.
python_kind() {
    "$1" -c 'import platform, sys; print("cp{0.major}{0.minor}-{1}".format(sys.version_info, platform.machine()))'
}

# The folder for the extension of lock $1 under a Python of kind $2: named by all that it is compiled against, NVIDIA's
# wheels, which carry the headers, by a hash of their lines.
extension_folder() {
    local headers wheels="${MEGARL_CACHE:-$HOME/.cache/megarl}/wheels"
    headers="$(sed -n '/^nvidia-/p' "$1" | sha256sum | cut -c1-12)"
    echo "$wheels/$EXTENSION-$(locked "$1" $EXTENSION)-torch-$(locked "$1" torch)-$2-$headers"
}

# The wheel in folder $1; fails where there is none.
wheel_in() {
    local wheel
    for wheel in "$1"/*.whl; do
        [[ -f "$wheel" ]] && echo "$wheel" && return
    done
    return 1
}

# Whether this machine can compile an extension of Python $1; says what is missing.
can_compile() {
    local headers
    if ! type -P "${CXX:-g++}" >/dev/null; then
        echo "setup: $EXTENSION is compiled by ${CXX:-g++}, which is missing; on Debian and Ubuntu install g++" >&2
        return 1
    fi
    headers="$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
    if [[ ! -f "$headers/Python.h" ]]; then
        echo "setup: $EXTENSION is compiled with $headers/Python.h, which is missing; on Debian and Ubuntu install" \
            "python3-dev" >&2
        return 1
    fi
}

# Compilers side by side on $1 cores and $2 kB of memory: each takes up to 4 GB.
jobs_for() {
    local jobs=$(($1 < $2 / 4000000 ? $1 : $2 / 4000000))
    echo $((jobs > 0 ? jobs : 1))
}

# Compiles version $2 in the environment at $1, which holds all else of the lock, and puts the wheel into folder $3.
# No CUDA toolkit is needed: NVIDIA's wheels carry every header, and the extension has no kernels of its own.
# In a shell of its own, whose end, by a signal too, takes what is half made away.
compile_extension() (
    bin="$(cd "$1/bin" && pwd)"
    nvidia="$("$bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia"
    # nproc would count threads by these variables.
    cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)"
    memory="$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo)"
    mkdir -p "$3"
    # Made beside its place and moved there whole: a build that was stopped leaves no wheel.
    built="$(mktemp -d "$3/built.XXXXXX")"
    trap 'rm -rf "$built"' EXIT
    # A toolkit of the machine's is passed over: it may be of another version than the wheels, or there in part.
    # NVTE_PYTORCH_FORCE_BUILD: nothing is looked for on the network. No cache of pip's, which knows no torch.
    if ! env PATH="$bin:$PATH" CUDA_HOME="$nvidia/cu13" NVTE_PYTORCH_FORCE_BUILD=TRUE \
        CPATH="$nvidia/cu13/include:$nvidia/cudnn/include:$nvidia/nccl/include${CPATH:+:$CPATH}" \
        MAX_JOBS="${MAX_JOBS:-$(jobs_for "$cores" "$memory")}" \
        "$bin/python" -m pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$built" \
        "$EXTENSION==$2" >"$built/log" 2>&1; then
        tail -n 40 "$built/log" >&2
        exit 1
    fi
    mv "$(wheel_in "$built")" "$3/"
)
