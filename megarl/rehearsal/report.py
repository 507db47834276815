"""What a rehearsal finds: records of plain numbers, all bytes. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from megarl.rehearsal.hours import Hours

#: The phases of a step that own a GPU's memory in turn: `log-probs` are the passes without a gradient, `train` those of
#: the policy, `train beside` those of a model that trains beside it, and `save` a checkpoint of several.
PhaseName = Literal["log-probs", "train", "train beside", "push", "rollout", "save"]


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes of one kind. `counted`: taken from real shapes and settings; else computed by a formula."""

    kind: str
    bytes: int
    counted: bool


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """The memory of a GPU of pipeline stage `stage` in a phase, and how much there is."""

    phase: PhaseName
    stage: int
    amounts: tuple[Amount, ...]
    limit: int

    @property
    def used(self) -> int:
        return sum(amount.bytes for amount in self.amounts)

    @property
    def margin(self) -> int:
        """Bytes left; negative where they do not suffice."""
        return self.limit - self.used

    def of(self, kind: str) -> int:
        """Bytes of a kind, 0 where there are none."""
        return sum(amount.bytes for amount in self.amounts if amount.kind == kind)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What a node's host keeps for its GPUs while the engine generates: the busiest rank's, times the GPUs."""

    amounts: tuple[Amount, ...]
    limit: int

    @property
    def used(self) -> int:
        return sum(amount.bytes for amount in self.amounts)


@dataclass(frozen=True, slots=True)
class StageParameters:
    """The parameters of one rank of each of the pipeline stages `stages`, which are alike; `layers` of a stage."""

    stages: tuple[int, ...]
    layers: int
    by_kind: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


@dataclass(frozen=True, slots=True)
class Parameters:
    """`exact`: parameters of the model by its config.json; `counted`: of all shards, each once, `by_kind`."""

    exact: int
    counted: int
    by_kind: dict[str, int]
    stages: tuple[StageParameters, ...]


@dataclass(frozen=True, slots=True)
class KvCache:
    """The engine's cache on one GPU; `sequences` of `sequence_tokens`, the longest, fit at once."""

    bytes: int
    bytes_per_token: int
    tokens: int
    sequence_tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a data-parallel replica does in an update if all sequences are the longest."""

    sequences: int
    micro_batches: int
    tokens_per_microbatch: int


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """What a kind of link carries in a push: of all ranks, and into and out of the rank where that is most."""

    total: int
    most_received: int
    most_sent: int


@dataclass(frozen=True, slots=True)
class PushTraffic:
    """A weight push. `network`: between nodes; `nvlink`: within nodes; `copied_bytes`: within ranks, of all.

    `received_bytes_max_rank`: of the rank to which most comes; `lower_bound_max_rank`: what it needs and does not hold;
    `gathered_bytes`: all weights, as a push that gathers puts them together on every rank. `rounds` and `messages` are
    those of `slowest_rank`. `seconds` follows from the cluster's speeds.
    """

    network: LinkBytes
    nvlink: LinkBytes
    copied_bytes: int
    received_bytes_max_rank: int
    lower_bound_max_rank: int
    gathered_bytes: int
    slowest_rank: int
    rounds: int
    messages: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """A rehearsal. `fits`: whether every phase of every stage has the memory; `verdict` says it in a sentence.

    `notes` are what could not be checked or is not modelled. `push` is None where nothing is generated; `hours` is
    an estimate.
    """

    name: str
    processes: int
    layout: dict[str, int]
    parameters: Parameters
    work: Work
    phases: tuple[PhaseMemory, ...]
    kv_cache: KvCache | None
    host: HostMemory
    fits: bool
    verdict: str
    notes: tuple[str, ...]
    push: PushTraffic | None
    hours: Hours

    def busiest(self, phase: str) -> PhaseMemory | None:
        """The stage with the least memory left in a phase; None where the run has no such phase."""
        return min((one for one in self.phases if one.phase == phase), key=lambda one: one.margin, default=None)

    def as_table(self) -> dict[str, Any]:
        """The report for JSON, sums included."""
        table = asdict(self)
        table["phases"] = [asdict(one) | {"used": one.used, "margin": one.margin} for one in self.phases]
        table["host"] |= {"used": self.host.used}
        table["hours"] |= {"gpu_hours": self.hours.gpu_hours}
        return table
