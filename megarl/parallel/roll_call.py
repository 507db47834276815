"""The store that ranks meet at, and the roll call there: all are waited for a bounded time, and the missing are named.

Before it, a rank knows nothing of the others; after it, every rank of the world has been there once.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from megarl.config.wording import name_ranks
from megarl.errors import Interrupted, MegarlError, Refusal
from megarl.parallel import terminal
from megarl.parallel.place import Place, slurm_hosts

#: Seconds of waiting after which the missing are named on the terminal, and between two such lines.
FIRST_WORD, NEXT_WORD = 10.0, 30.0

#: Seconds that the host of the store stays for the others to hear why the run ends.
FAREWELL = 5.0

#: Seconds in which the name of rank 0's host must have become known, as it may late where hosts start together.
NAME_LIMIT = 30.0

#: Attempts at which the ranks of this process's world met; a store may outlive one.
_attempts = itertools.count()


def meet(place: Place, limit: float) -> PrefixStore:
    """The store that the ranks share, once each of them has come to it. `limit` is in seconds.

    Raises `Interrupted` alike on all ranks that came, naming those that did not, or where rank 0 cannot be reached;
    `Refusal` where two processes have the same rank, rank 0's port is taken, or its host's name is not known here.
    """
    deadline = time.monotonic() + limit
    store = PrefixStore(_job(), connect(place, limit))
    try:
        call(store, place.rank, place.size, f"{limit:g} s (health.join_limit)", deadline)
    except RuntimeError as error:
        # The store went away: its host ended.
        raise Interrupted(
            f"rank {place.rank} of {place.size} on {socket.gethostname()} lost the connection to "
            f"{place.address}:{place.port} while the ranks were gathering ({cause_of(error)}): see what ended "
            "there, then start again with resume=auto"
        ) from None
    return store


def _job() -> str:
    """What tells this world's keys from those of an earlier one, or of another job at the same port."""
    return f"megarl/{launch_key()}/{next(_attempts)}"


def launch_key() -> str:
    """What tells this launch from others that had the same store: of another job, or before a launcher's restart."""
    names = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return "/".join(os.environ.get(name, "") for name in names)


def connect(place: Place, limit: float) -> Store:
    """The store at the place's address: torchrun's own where it has one, else one that rank 0 opens.

    Raises as `meet` where it cannot be reached.
    """
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    opens = hosted and place.rank == 0
    deadline = time.monotonic() + limit
    _resolve(place, min(limit, NAME_LIMIT))
    cause = None if opens else _knock(place, deadline)
    if cause is None:
        found = _open(place, opens, hosted, max(1.0, deadline - time.monotonic()))
        if isinstance(found, Store):
            return found
        cause = found
    host = socket.gethostname()
    if opens:
        raise Refusal(
            f"MASTER_PORT={place.port}",
            f"must be free for rank 0 on {host} ({cause})",
            "set MASTER_PORT to a free port, the same on all hosts",
        )
    whom = "rank 0" if hosted else "the first host's torchrun"
    raise Interrupted(
        f"rank {place.rank} of {place.size} on {host} could not reach {whom} at {place.address}:{place.port} within "
        f"{limit:g} s (health.join_limit; {cause}): see that it was started and that no firewall is between, "
        "correct MASTER_ADDR and MASTER_PORT if they are wrong, and start again with resume=auto"
    )


def _resolve(place: Place, limit: float) -> None:
    """Wait until this host knows the name of rank 0's, which torch would ask for again and again with a stack each."""
    deadline = time.monotonic() + limit
    while True:
        try:
            socket.getaddrinfo(place.address or "", None)
            return
        except OSError as error:
            cause = error.strerror or str(error)
        except UnicodeError:
            cause = "it can be no name"
        if time.monotonic() >= deadline:
            host = socket.gethostname()
            raise Refusal(
                f"MASTER_ADDR={place.address}, rank 0's host",
                f"must be a name or an address that {host} knows, and was not within {limit:g} s ({cause})",
                "correct it, or have the host's name resolved (/etc/hosts, DNS)",
            )
        time.sleep(0.2)


def _open(place: Place, opens: bool, hosted: bool, seconds: float) -> Store | str:
    """The store, opened here or connected to; the reason why not, where that fails or takes longer than `seconds`."""
    found: list[Store | str] = []

    def work() -> None:
        try:
            store = TCPStore(
                place.address or "",
                int(place.port or 0),
                place.size,
                is_master=opens,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=hosted,
                master_listen_fd=None if place.listener is None else place.listener.detach(),
                use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
            )
            found.append(store)
        except RuntimeError as error:
            found.append(cause_of(error))

    # Where something else listens at the port and says nothing, torch waits without a limit.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds + 1.0)
    return found[0] if found else "what listens there does not answer"


def _knock(place: Place, deadline: float) -> str | None:
    """Wait until something listens at the place's address; the reason why not, if the time runs out.

    torch's own attempts would print its stack for each.
    """
    speak = time.monotonic() + FIRST_WORD
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            socket.create_connection((place.address or "", int(place.port or 0)), timeout=min(left, 10.0)).close()
            return None
        except OSError as error:
            cause = error.strerror or str(error)
        now = time.monotonic()
        if now >= deadline:
            return cause
        if now >= speak and place.local_rank == 0:
            terminal.say(f"rank {place.rank} waits for rank 0 at {place.address}:{place.port} ({cause})")
            speak = now + NEXT_WORD
        time.sleep(min(0.2, deadline - now))


def call(store: Store, rank: int, size: int, limit: str, deadline: float) -> None:
    """Return when all `size` ranks have come to this call, which has the store's prefix for itself.

    `deadline` is a time of `time.monotonic`, `limit` how a sentence names what lies before it. Raises `Interrupted`
    alike on all ranks that came, naming those that did not; `Refusal` where two processes have the same rank;
    `RuntimeError` where the store is gone.
    """
    own = f"{socket.gethostname()} {os.getpid()}"
    other = store.compare_set(_here(rank), "", own).decode()
    if other != own:
        _publish(store, _twice(rank, other, own))
    nth = store.add("come", 1)
    if nth == size:
        store.compare_set("end", "", "all")
    speak, pause = time.monotonic() + FIRST_WORD, 0.01
    while not store.check(["end"]):
        now = time.monotonic()
        if now >= deadline:
            _publish(store, Interrupted(_absence(store, size, limit)))
        elif now >= speak:
            # One voice: rank 0's, whose output is looked at first; while it is missing, that of whoever came first.
            if rank == 0 or (nth == 1 and not store.check([_here(0)])):
                missing = [other for other in range(size) if not store.check([_here(other)])]
                terminal.say(f"waiting for {name_ranks(missing)} of {size} to come{_empty_hosts(store, size)}")
            speak = now + NEXT_WORD
        time.sleep(min(pause, max(0.0, deadline - now)))
        pause = min(0.5, 1.5 * pause)
    verdict = store.get("end").decode()
    if verdict != "all":
        _wait_for_listeners(store, rank)
        raise _as_error(verdict)


def _publish(store: Store, error: MegarlError) -> None:
    """End the roll call with this error on every rank, unless it has ended."""
    parts = [error.value, error.rule, error.fix] if isinstance(error, Refusal) else [str(error)]
    store.compare_set("end", "", json.dumps(parts))


def _as_error(verdict: str) -> MegarlError:
    parts = json.loads(verdict)
    return Refusal(*parts) if len(parts) == 3 else Interrupted(*parts)


def _wait_for_listeners(store: Store, rank: int) -> None:
    """Keep the store, where this rank may be its host, until the ranks that came have read how the roll call ended."""
    store.add("heard", 1)
    until = time.monotonic() + FAREWELL
    while rank == 0 and store.add("heard", 0) < store.add("come", 0) and time.monotonic() < until:
        time.sleep(0.02)


def _twice(rank: int, other: str, own: str) -> Refusal:
    (host, process), (own_host, own_process) = other.split(), own.split()
    return Refusal(
        f"rank {rank} twice, process {process} on {host} and process {own_process} on {own_host}",
        "each rank must be one process",
        "give each host a number of its own (torchrun --node-rank), each process its own RANK, and each run its own "
        "MASTER_PORT",
    )


def _absence(store: Store, size: int, limit: str) -> str:
    by_host = _present(store, size)
    present = {rank for ranks in by_host.values() for rank in ranks}
    missing = [rank for rank in range(size) if rank not in present]
    there = ", ".join(f"{name_ranks(ranks)} on {host}" for host, ranks in by_host.items())
    return (
        f"{name_ranks(missing)} of {size} did not come within {limit}{_empty_hosts(store, size)}; "
        f"there came {there}: see the log and the host of what is missing, then start again with resume=auto"
    )


def _present(store: Store, size: int) -> dict[str, list[int]]:
    """The ranks that came, by host."""
    by_host: dict[str, list[int]] = {}
    for rank in range(size):
        if store.check([_here(rank)]):
            by_host.setdefault(store.get(_here(rank)).decode().split()[0], []).append(rank)
    return by_host


def _empty_hosts(store: Store, size: int) -> str:
    """The hosts of a Slurm step that no rank came from, as a clause."""
    seen = {host.split(".")[0] for host in _present(store, size)}
    empty = [host for host in slurm_hosts(os.environ) if host.split(".")[0] not in seen]
    return f", none from {', '.join(empty)}" if empty else ""


def _here(rank: int) -> str:
    return f"here/{rank}"


def cause_of(error: BaseException) -> str:
    """The first sentence of an error of torch's, whose further ones are stacks and advice, without its full stop."""
    return str(error).splitlines()[0].split(". ")[0].rstrip(". ")
