"""The look before the start: every rank, in seconds, before anything is built. A bad rank, host or link is named.

Facts are gathered once and judged alike on all ranks (`megarl.health.readiness`), so that all refuse with one sentence.
A rank that does not get through its own part is named by the roll call that follows it.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from megarl.config.health import PreflightSettings
from megarl.config.load import dump_config
from megarl.config.schema import RunConfig
from megarl.errors import Interrupted, Refusal
from megarl.health import facts as own_facts
from megarl.health.guard import is_broken_connection
from megarl.health.links import clock_against_first, time_all_reduce, time_ring
from megarl.health.readiness import MIB, Link, RankFacts, broken_rules, slow_links
from megarl.parallel import roll_call
from megarl.parallel.bootstrap import World
from megarl.parallel.exchange import from_first, gather_all

#: Seconds that a host looks for the file which rank 0 wrote: a shared file system may show it late.
SEEN_WITHIN = 10.0

#: Seconds that a rank that refuses waits for the others to come to it too.
FAREWELL = 30.0

#: How often the ring is timed before a link counts as slow: what was busy once need not be slow.
RINGS = 3

#: How much larger messages between GPUs are than those between CPUs.
_GPU_FACTOR = 8


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """What was found: the ranks' facts and links by rank, seconds of an all-reduce of 1 MiB, and of all of it."""

    facts: tuple[RankFacts, ...]
    links: tuple[Link, ...]
    all_reduce_seconds: float
    seconds: float

    def status_line(self) -> str:
        """For the terminal: `pre-flight: 4 ranks on 2 hosts, slowest link 0.9 GB/s, 0.4 s`."""
        hosts = len({fact.node for fact in self.facts})
        text = f"pre-flight: {len(self.facts)} rank{'s' * (len(self.facts) > 1)} on {hosts} host{'s' * (hosts > 1)}"
        if self.links:
            text += f", slowest link {min(link.gb_per_second for link in self.links):.2g} GB/s"
        return f"{text}, {self.seconds:.1f} s"

    def as_table(self) -> dict[str, Any]:
        """For preflight.json: sizes in bytes, times in seconds, links in GB/s by both ends."""
        hosts: dict[str, dict[str, Any]] = {}
        for fact in self.facts:
            host = hosts.setdefault(fact.host, {"ranks": [], "gpus": []})
            host["ranks"].append(fact.rank)
            if fact.gpu is not None:
                host["gpus"].append({"name": fact.gpu.name, "free": fact.gpu.free, "total": fact.gpu.total})
            if fact.clock is not None:
                host.update(clock_ahead=fact.clock[0], clock_doubt=fact.clock[1])
                host.update(disk_free=fact.disk_free, shared_memory_free=fact.shared_memory_free)
        links = [
            {
                "from": [link.source, self.facts[link.source].host],
                "to": [link.target, self.facts[link.target].host],
                "gb_per_second": link.gb_per_second,
            }
            for link in self.links
        ]
        first = self.facts[0]
        speeds = [link.gb_per_second for link in self.links]
        return {
            "ranks": len(self.facts),
            "seconds": self.seconds,
            "versions": dict(first.versions),
            "config_hash": first.config_hash,
            "all_reduce_seconds": self.all_reduce_seconds,
            "slowest_link": min(speeds, default=None),
            "median_link": statistics.median(speeds) if speeds else None,
            "hosts": hosts,
            "links": links,
        }

    def write(self, file: Path) -> None:
        """Write `as_table` as JSON."""
        file.write_text(json.dumps(self.as_table(), indent=1) + "\n", encoding="utf-8")


def preflight(config: RunConfig, world: World, run_directory: Path) -> PreflightReport:
    """Look at all ranks, their hosts and the links between them. Collective, right after joining the world.

    Raises `Refusal` alike on all ranks where something forbids a start; `Interrupted` where a rank does not get through
    within health.preflight.limit seconds or ends meanwhile. A refused run leaves no folder behind.
    """
    settings = config.health.preflight
    start = time.monotonic()
    token = _Token(run_directory, world)
    try:
        own = _look(config, world, token, settings)
        found = gather_all(own)
        for refusal in broken_rules(found, settings):
            raise refusal
        links = _time_links(world, found, settings)
        return PreflightReport(tuple(found), tuple(links), time_all_reduce(world), time.monotonic() - start)
    except Refusal:
        token.withdraw_folders = True
        _hear_out(world)
        raise
    except RuntimeError as error:
        if config.health.watchdog or not is_broken_connection(error):
            # The watchdog knows whose end it was.
            raise
        raise Interrupted(
            f"rank {world.rank} on {world.hosts[world.rank]} lost the connection to other ranks in the pre-flight "
            f"({roll_call.cause_of(error)}): see what ended, then start again with resume=auto"
        ) from None
    finally:
        token.remove()


def _look(config: RunConfig, world: World, token: _Token, settings: PreflightSettings) -> RankFacts:
    """This rank's facts. Two roll calls bound it: after what each rank does alone, and after the look at the folder."""
    versions, config_hash = own_facts.versions(), own_facts.text_hash(dump_config(config))
    problem = token.write()
    gpu = own_facts.gpu(world.device)
    _call("alone", world, settings.limit)
    clock = clock_against_first(world)
    content = from_first(token.content if problem is None else None)
    sees = token.is_seen(content) if content is not None and clock is not None else None
    _call("folder", world, settings.limit)
    return RankFacts(
        rank=world.rank,
        host=world.hosts[world.rank],
        node=world.node_of_rank[world.rank],
        versions=versions,
        config_hash=config_hash,
        directory=str(token.directory),
        directory_problem=problem,
        sees_directory=sees,
        clock=clock,
        disk_free=own_facts.disk_free(token.directory),
        shared_memory_free=own_facts.shared_memory_free(),
        gpu=gpu,
    )


def _call(part: str, world: World, seconds: float) -> None:
    store = PrefixStore(f"megarl/preflight/{part}", dist.distributed_c10d._get_default_store())
    limit = f"{seconds:g} s to the pre-flight (health.preflight.limit)"
    roll_call.call(store, world.rank, world.size, limit, time.monotonic() + seconds)


def _hear_out(world: World) -> None:
    """Stay until all ranks have come to the same refusal: one that left would look like one that died to the rest."""
    with contextlib.suppress(Interrupted, RuntimeError):
        _call("refused", world, FAREWELL)


def _time_links(world: World, found: list[RankFacts], settings: PreflightSettings) -> list[Link]:
    """The links, each with the best of its times; raises `Refusal` where one stays too slow."""
    size = int(settings.message_mib * MIB) * (_GPU_FACTOR if world.device.type == "cuda" else 1)
    links = time_ring(world, size)
    for attempt in range(1, RINGS + 1):
        refusal = next(slow_links(links, found, settings), None)
        if refusal is None:
            break
        if attempt == RINGS:
            raise refusal
        again = time_ring(world, size)
        links = [max(pair, key=lambda link: link.gb_per_second) for pair in zip(links, again, strict=True)]
    return links


class _Token:
    """A file of rank 0 in the run's directory, by which the other hosts know that it is theirs too."""

    def __init__(self, directory: Path, world: World) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.content = uuid.uuid4().hex
        self.withdraw_folders = False
        self._writes = world.rank == 0
        self._made: list[Path] = []

    def write(self) -> str | None:
        """Rank 0: write it, and the folders that lack; returns why that fails."""
        if not self._writes:
            return None
        try:
            missing = [folder for folder in (self.directory, *self.directory.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._made.append(folder)
            self._path(self.content).write_text(self.content, encoding="utf-8")
        except OSError as error:
            self.withdraw_folders = True
            return error.strerror or str(error)
        return None

    def is_seen(self, content: str) -> bool:
        """Whether this host sees what rank 0 wrote, after a few looks."""
        until = time.monotonic() + SEEN_WITHIN
        while True:
            with contextlib.suppress(OSError):
                # To list a folder makes NFS ask the server again for what is in it.
                for folder in (self.directory.parent, self.directory):
                    os.listdir(folder)
                if self._path(content).read_text(encoding="utf-8") == content:
                    return True
            if time.monotonic() > until:
                return False
            time.sleep(0.2)

    def remove(self) -> None:
        """Rank 0: remove it, and after a refusal also the folders that were made for it."""
        if not self._writes:
            return
        with contextlib.suppress(OSError):
            self._path(self.content).unlink(missing_ok=True)
        if self.withdraw_folders:
            # Where something else has come into one, it and those above it stay.
            with contextlib.suppress(OSError):
                for folder in reversed(self._made):
                    folder.rmdir()

    def _path(self, content: str) -> Path:
        return self.directory / f".preflight-{content[:8]}"
