"""Whether a run may start on these ranks: pure judgement over what each found out about itself, its host and its links.

What must be equal is compared with the majority; what must keep a bound, with the bound. Each finding names ranks,
hosts, the value, the rule and the fix.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megarl.config.cluster import GIB
from megarl.config.health import PreflightSettings
from megarl.config.wording import name_ranks
from megarl.errors import Refusal

MIB = 1 << 20

#: Links of a kind from which on their median says what is usual; of fewer the fastest does.
MANY_LINKS = 5


@dataclass(frozen=True, slots=True)
class Gpu:
    """A rank's GPU; `identity` tells it from all others; memory in bytes, free and in all."""

    name: str
    identity: str
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What a rank knows before the run starts.

    `node` numbers its host, of which `host` is the name. `versions` is by package, None where it is not installed.
    `clock`: seconds that its host's clock is ahead of rank 0's, and by how much that may be wrong; None where another
    rank of the host measured it. `directory`: the run's, whole; `directory_problem`: why rank 0 cannot write there;
    `sees_directory`: whether the file that rank 0 wrote there is seen, None where another rank of the host looked.
    `disk_free`, `shared_memory_free`: bytes, None where not known.
    """

    rank: int
    host: str
    node: int
    versions: Mapping[str, str | None]
    config_hash: str
    directory: str
    directory_problem: str | None = None
    sees_directory: bool | None = None
    clock: tuple[float, float] | None = None
    disk_free: int | None = None
    shared_memory_free: int | None = None
    gpu: Gpu | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """What rank `target` receives from rank `source`, in GB (1e9 bytes) per second."""

    source: int
    target: int
    gb_per_second: float


def broken_rules(facts: Sequence[RankFacts], settings: PreflightSettings) -> Iterator[Refusal]:
    """Yield what forbids a start, the most telling first. `facts` are in rank order."""
    yield from _versions(facts)
    yield from _differing(
        facts,
        "configuration",
        lambda fact: fact.config_hash,
        "all ranks must run the same configuration",
        lambda hosts: "start all ranks with the same file and the same key=value arguments",
    )
    yield from _directory(facts, settings)
    yield from _clock(facts, settings)
    yield from _gpus(facts, settings)


def slow_links(links: Sequence[Link], facts: Sequence[RankFacts], settings: PreflightSettings) -> Iterator[Refusal]:
    """Yield the links that are too slow, by host where more than one of a host's is. `facts` are in rank order."""
    for kind in ("between", "within"):
        same = [link for link in links if _kind(link, facts) == kind]
        if not same or (kind == "within" and facts[0].gpu is None):
            # Within a host, on the CPU, a link is as fast as the cores are free at the moment.
            continue
        speeds = [link.gb_per_second for link in same]
        usual = statistics.median_high(speeds) if len(same) >= MANY_LINKS else max(speeds)
        slow = [link for link in same if link.gb_per_second < settings.slow_link_share * usual]
        where = "between hosts" if kind == "between" else "within hosts"
        rule = (
            f"below {settings.slow_link_share:.0%} of the {usual:.3g} GB/s that is usual {where} "
            "(health.preflight.slow_link_share)"
        )
        yield from _by_host(slow, facts, rule)


def _by_host(slow: Sequence[Link], facts: Sequence[RankFacts], rule: str) -> Iterator[Refusal]:
    rest = list(slow)
    for host in dict.fromkeys(facts[link.target].host for link in slow):
        own = [link for link in rest if host in (facts[link.source].host, facts[link.target].host)]
        if len(own) < 2:
            continue
        rest = [link for link in rest if link not in own]
        speeds = " and ".join(f"{link.gb_per_second:.3g}" for link in own)
        ends = ", ".join(f"rank {link.source} to {link.target}" for link in own)
        yield Refusal(
            f"host {host} with links of {speeds} GB/s ({ends})", rule, f"exclude the host: sbatch --exclude={host}"
        )
    for link in rest:
        source, target = facts[link.source].host, facts[link.target].host
        between = f"the network between {source} and {target}, or exclude one: sbatch --exclude={target}"
        yield Refusal(
            f"link from rank {link.source} on {source} to rank {link.target} on {target} with "
            f"{link.gb_per_second:.3g} GB/s",
            rule,
            f"look at {between}" if source != target else f"exclude the host: sbatch --exclude={source}",
        )


def _kind(link: Link, facts: Sequence[RankFacts]) -> Literal["between", "within"]:
    return "within" if facts[link.source].node == facts[link.target].node else "between"


def _versions(facts: Sequence[RankFacts]) -> Iterator[Refusal]:
    for package in facts[0].versions:
        yield from _differing(
            facts,
            package,
            lambda fact, package=package: fact.versions[package] or "missing",
            "all ranks must have the same",
            lambda hosts, package=package: f"install the same {package} on all hosts{_or_exclude(hosts)}",
        )


def _differing(
    facts: Sequence[RankFacts],
    what: str,
    value_of: Callable[[RankFacts], str],
    rule: str,
    fix: Callable[[Sequence[str]], str],
) -> Iterator[Refusal]:
    """One refusal where the values are not all equal: it names who differs from the majority, or all without one.

    `fix` is given the hosts that differ, none where there is no majority.
    """
    groups: dict[str, list[RankFacts]] = {}
    for fact in facts:
        groups.setdefault(value_of(fact), []).append(fact)
    if len(groups) == 1:
        return
    ordered = sorted(groups.items(), key=lambda item: len(item[1]))
    value, most = ordered[-1]
    majority = 2 * len(most) > len(facts)
    named = ordered[:-1] if majority else ordered
    shown = " and ".join(
        f"{value} on {_who(group)}" for value, group in sorted(named, key=lambda item: item[1][0].rank)
    )
    hosts = list(dict.fromkeys(fact.host for _, group in named for fact in group)) if majority else []
    if majority:
        rule += f", and {len(most)} of {len(facts)} have {value}"
    yield Refusal(f"{what} {shown}", rule, fix(hosts))


def _directory(facts: Sequence[RankFacts], settings: PreflightSettings) -> Iterator[Refusal]:
    first = facts[0]
    if first.directory_problem is not None:
        yield Refusal(
            f"run directory {first.directory} on {first.host}",
            f"cannot be written ({first.directory_problem})",
            "give runs_dir a folder that can be written to",
        )
        return
    blind = [fact for fact in facts if fact.sees_directory is False]
    if blind:
        yield Refusal(
            f"run directory {blind[0].directory} on {_who(blind)}",
            f"is not the one that rank 0 on {first.host} writes to ({first.directory})",
            "put runs_dir on a file system that all hosts share, and start in the same folder on all of them",
        )
    least = settings.disk_free_gib * GIB
    if first.disk_free is not None and first.disk_free < least:
        yield Refusal(
            f"{first.disk_free / GIB:.2f} GiB free for run directory {first.directory}",
            f"must be at least {settings.disk_free_gib:g} GiB (health.preflight.disk_free_gib)",
            "free some space, or put runs_dir on another file system",
        )


def _clock(facts: Sequence[RankFacts], settings: PreflightSettings) -> Iterator[Refusal]:
    """Hosts whose clocks are off the median; where that could be either of two, both."""
    timed = [(fact, *fact.clock) for fact in facts if fact.clock is not None]
    if len(timed) < 2:
        return
    rule = f"may differ by {settings.clock_skew:g} s (health.preflight.clock_skew)"
    low, high = (pick(timed, key=lambda one: one[1]) for pick in (min, max))
    if len(timed) == 2:
        if high[1] - low[1] - high[2] - low[2] > settings.clock_skew:
            yield Refusal(
                f"clock of {high[0].host} {high[1] - low[1]:.1f} s ahead of that of {low[0].host}",
                f"clocks {rule}",
                "set the clocks by NTP (timedatectl shows whether they are)",
            )
        return
    usual = statistics.median_low(offset for _, offset, _ in timed)
    for fact, offset, doubt in timed:
        off = offset - usual
        if abs(off) - doubt > settings.clock_skew:
            yield Refusal(
                f"clock of {fact.host} {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the others",
                f"clocks {rule}",
                f"set it by NTP (timedatectl shows whether it is), or exclude the host: sbatch --exclude={fact.host}",
            )


def _gpus(facts: Sequence[RankFacts], settings: PreflightSettings) -> Iterator[Refusal]:
    yield from _differing(
        facts,
        "GPU",
        lambda fact: f"{fact.gpu.name} of {fact.gpu.total / GIB:.0f} GiB" if fact.gpu else "none",
        "all ranks must have the same, as one that is slower or smaller holds up the rest",
        lambda hosts: f"ask for one kind of GPU (sbatch --constraint){_or_exclude(hosts)}",
    )
    holders: dict[str, RankFacts] = {}
    for fact in facts:
        if fact.gpu is None:
            continue
        other = holders.setdefault(fact.gpu.identity, fact)
        if other is not fact:
            yield Refusal(
                f"ranks {other.rank} and {fact.rank} on {fact.host} on one GPU",
                "each rank must have a GPU of its own",
                "start as many processes per host as it has GPUs",
            )
        least = settings.gpu_free_share
        if fact.gpu.free < least * fact.gpu.total:
            yield Refusal(
                f"{fact.gpu.free / GIB:.1f} of {fact.gpu.total / GIB:.1f} GiB free on the GPU of rank {fact.rank} on "
                f"{fact.host}",
                f"must be at least {least:.0%} before the run starts (health.preflight.gpu_free_share)",
                "end the process that holds the rest (nvidia-smi shows it), or exclude the host: "
                f"sbatch --exclude={fact.host}",
            )
    ranks_of: dict[int, list[RankFacts]] = {}
    for fact in facts:
        if fact.gpu is not None:
            ranks_of.setdefault(fact.node, []).append(fact)
    for group in ranks_of.values():
        free, least = group[0].shared_memory_free, settings.shared_memory_mib * len(group)
        if free is not None and free < least * MIB:
            yield Refusal(
                f"{free / MIB:.0f} MiB free in /dev/shm of {group[0].host}",
                f"must be at least {settings.shared_memory_mib:g} MiB for each of its {len(group)} processes "
                "(health.preflight.shared_memory_mib)",
                "remove what earlier jobs left there, or mount it larger (--shm-size)",
            )


def _who(group: Sequence[RankFacts]) -> str:
    """`ranks 4-7 on gpu02, gpu03`."""
    hosts = list(dict.fromkeys(fact.host for fact in group))
    shown = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more hosts" if len(hosts) > 8 else "")
    return f"{name_ranks([fact.rank for fact in group])} on {shown}"


def _or_exclude(hosts: Sequence[str]) -> str:
    return f", or exclude what differs: sbatch --exclude={','.join(hosts)}" if hosts else ""
