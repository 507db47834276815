# Read by the launchers here, not run: the environment of a run's processes, in one place. No settings of a run.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -d $root/.venv ]] && export PATH="$root/.venv/bin:$PATH"

# One thread for each process unless said otherwise: processes that share cores slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# CPU binding of Slurm's tasks (srun --cpu-bind): each to cores of its own, so that none moves away from its memory and
# GPU. `none` where the cluster has no task plug-in for it; `verbose,cores` shows what it gave.
export MEGARL_CPU_BIND="${MEGARL_CPU_BIND:-cores}"

# NCCL. Uncomment what the cluster needs; `NCCL_DEBUG=INFO` says what it took.
# export NCCL_SOCKET_IFNAME=ib0        # the interface to meet over, where the first one does not reach other nodes
# export GLOO_SOCKET_IFNAME=ib0        # the same for gloo, which carries what is on the CPU
# export NCCL_IB_HCA=mlx5              # the InfiniBand adapters to use, where a node has others too
# export NCCL_DEBUG=WARN

# vLLM's sleep mode cannot free memory in expandable segments.
unset PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF

# The compiler of NVIDIA's wheels where there is no toolkit: vLLM compiles some kernels when it first starts.
for toolkit in "$root"/.venv/lib/python3.*/site-packages/nvidia/cu13; do
    if [[ -z ${CUDA_HOME:-} && -x $toolkit/bin/nvcc && ! -x /usr/local/cuda/bin/nvcc ]] && ! type -P nvcc >/dev/null; then
        export CUDA_HOME="$toolkit"
    fi
done
unset toolkit

# One queue of work to each GPU, so that Megatron's collectives begin in the order in which they were asked for.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
