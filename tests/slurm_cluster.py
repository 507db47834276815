"""A real Slurm on this host, for tests: a controller, two nodes that run jobs, and sixteen nodes of GPUs on paper.

All of it (configuration, munge's key and socket, states, logs) lies in a temporary folder, on ports that were free.
A keeper, this file run as a program, starts the daemons and ends them with all that they started, also when the tests
that asked for it were killed. By hand, `python tests/slurm_cluster.py` gives a cluster until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ports import free_ports

#: Daemons live where an ordinary user's PATH often does not look.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
GPU_NODES = "g[01-16]"
#: Seconds for the daemons to come up.
PATIENCE = 60.0

CONFIGURATION = """\
ClusterName=megarl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that was put back into the queue waits until its old credentials are void.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
# The nodes share this host's cores, and claim as many as the tests need.
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
PrivateData=cloud
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that is up."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment under which Slurm's commands speak to this cluster, and no launcher's variables are left."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MASTER_", "OMPI_"))}
        for name in ("RANK", "WORLD_SIZE"):
            kept.pop(name, None)
        # Both nodes are one host, in whose shared memory Open MPI's ranks of the same number on a node would collide.
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH, "OMPI_MCA_btl": "tcp,self"}

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands to its end."""
        return subprocess.run(
            command, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=120
        )

    def ask(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a command that must succeed prints."""
        finished = self.call(*command, cwd=cwd, **environment)
        assert finished.returncode == 0, f"{' '.join(command)}: {finished.stdout}{finished.stderr}"
        return finished.stdout.strip()

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """`sbatch ARGUMENTS` in `cwd`; the job's number."""
        return self.ask("sbatch", "--parsable", *arguments, cwd=cwd, **environment)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job or of one task of an array (`12_3`)."""
        text = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0]))

    def wait(self, job: str, *states: str, seconds: float = 180.0) -> dict[str, str]:
        """Wait for a job to come into one of the states, COMPLETED if none is named. Fails with the job's log."""
        wanted = states or ("COMPLETED",)
        deadline = time.monotonic() + seconds
        while (found := self.job(job))["JobState"] not in wanted:
            over = found["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not over and time.monotonic() < deadline, f"job {job} is {found['JobState']}:\n{self.log(job)}"
            time.sleep(0.25)
        return found

    def wait_until(self, reached: Callable[[], object], job: str, what: str, seconds: float = 60.0) -> None:
        """Wait for something that a job does while it runs. Fails with the job's log."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"not in {seconds:.0f} s: {what}\n{self.log(job)}"
            time.sleep(0.1)

    def cancel_all(self) -> None:
        """Cancel every job, and wait until the nodes are empty."""
        # An array's task has a number of its own, which scancel does not know.
        for job in self.ask("squeue", "--noheader", "--array", "--format=%i").split():
            self.ask("scancel", job)
        deadline = time.monotonic() + 60.0
        while left := self.ask("squeue", "--noheader"):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def log(self, job: str) -> str:
        """What a job has said so far."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text(errors="replace") if file.is_file() else f"no log {file}"


def missing() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster of its own for the time of the block."""
    # Not in pytest's folder: munge wants a path that all may search, and a socket's name must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    # In a session of its own, the keeper outlives a Ctrl-C that is meant for the tests, and cleans up after them.
    with subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as keeper:
        try:
            assert keeper.stdout is not None
            said = keeper.stdout.readline().strip()
            if said != "ready":
                raise RuntimeError(f"the Slurm cluster did not start: {said}")
            yield Cluster(folder)
        finally:
            keeper.terminate()


def keep(folder: Path, *, by_hand: bool = False) -> None:
    """The keeper: start the daemons, say `ready`, and end everything at SIGTERM or when the parent is gone."""
    parent = os.getppid()
    # Steps of jobs leave their daemon; as the keeper's children they cannot get lost.
    ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    cluster = Cluster(folder)
    try:
        _write(folder)
        _start_daemons(cluster)
        print(f"export SLURM_CONF={folder}/slurm.conf" if by_hand else "ready", flush=True)
        while by_hand or os.getppid() == parent:
            _reap()
            time.sleep(0.2)
    except RuntimeError as error:
        print(str(error).replace("\n", " | "), flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while children := _children():
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            _reap()
            time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path) -> None:
    """The configuration and munge's key."""
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    ports = free_ports(1 + len(NODES))
    lines = [CONFIGURATION.format(host=host, user=user, folder=folder, controller_port=ports[0])]
    here = f"NodeHostname={host} NodeAddr=127.0.0.1"
    for node, port in zip(NODES, ports[1:], strict=True):
        lines.append(f"NodeName={node} {here} Port={port} CPUs=2 State=UNKNOWN")
        for kind in ("spool", "tmp"):
            (folder / f"{kind}.{node}").mkdir()
    # No daemon ever answers for these.
    lines.append(f"NodeName={GPU_NODES} NodeAddr=127.0.0.1 CPUs=96 RealMemory=1000000 Gres=gpu:8 State=CLOUD")
    lines.append(f"PartitionName=cpu Nodes={','.join(NODES)} Default=YES MaxTime=60 PriorityTier=1")
    lines.append(f"PartitionName=urgent Nodes={','.join(NODES)} MaxTime=60 PriorityTier=2 PreemptMode=OFF")
    lines.append(f"PartitionName=gpu Nodes={GPU_NODES} MaxTime=2-0")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))


def _start_daemons(cluster: Cluster) -> None:
    """Start munge, the controller and the nodes' daemons, and wait until the nodes take jobs."""
    folder = cluster.folder
    paths = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    _daemon(cluster, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *paths)
    _until((folder / "munge.socket").exists, folder, "munged made no socket")
    _daemon(cluster, "slurmctld", "-D", "-i")
    for node in NODES:
        _daemon(cluster, "slurmd", "-D", "-N", node)

    def idle() -> bool:
        return cluster.call("sinfo", "-h", "-p", "cpu", "-o", "%T").stdout.split() == ["idle"]

    _until(idle, folder, "the nodes do not come up")


def _daemon(cluster: Cluster, *command: str) -> None:
    """Start a daemon in the foreground; what it says before it has a log goes beside its files."""
    with open(cluster.folder / "start.log", "ab") as output:
        subprocess.Popen(
            command,
            cwd=cluster.folder,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _until(reached: Callable[[], bool], folder: Path, else_say: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        if time.monotonic() > deadline:
            logs = {file.name: file.read_text(errors="replace")[-1500:] for file in folder.glob("*.log")}
            raise RuntimeError(f"{else_say} in {PATIENCE:.0f} s: {logs}")
        time.sleep(0.1)


def _children() -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The command's name, in brackets, may hold spaces.
            fields = status.read_text().rpartition(")")[2].split()
            if fields[1] == str(os.getpid()):
                found.append(int(status.parent.name))
    return found


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    else:
        own = Path(tempfile.mkdtemp(prefix="slurm-"))
        own.chmod(0o755)
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        keep(own, by_hand=True)
