"""Sources that compute what leaves a policy: what arrives is what they made, and none is made twice or kept."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import parity
import torch
from reshard_reference import make_shape, random_checkpoint, rank_tensors, slice_reader
from reshard_worlds import Case, layout_of, moe_shape, plan_of
from test_reshard_fp8_map import bits, quantise_after_gather
from torch.multiprocessing.reductions import StorageWeakRef

from megarl.config.sections import ParallelSettings
from megarl.reshard.wire import Kind, all_in

SHAPE = make_shape(num_layers=2)
SCALE = 3.0
DENSE = make_shape(hidden_size=256, num_heads=4, num_kv_heads=4, head_dim=64, ffn_size=256)
MIXTURE = moe_shape("mixtral", hidden_size=256, num_heads=4, num_kv_heads=4, head_dim=64, expert_ffn_size=128)
#: Policy and engine in FP8 on 2 ranks, and bytes of a round: shards that are sent in many rounds, experts that go to
#: the other rank, and a rank that copies all it has.
QUANTISED = (
    (Case(DENSE, ParallelSettings(tensor=2), 1, False, 2, 2, True), 40_000),
    (Case(MIXTURE, ParallelSettings(expert=2), 1, False, 2, 2, True), 10**6),
    (Case(MIXTURE, ParallelSettings(), 1, False, 2, 2, True), 10**6),
)


def low_rank(name: str, dims: torch.Size) -> torch.Tensor:
    """A product of two thin matrices of small whole numbers, so that every sum of theirs is exact; 0 for vectors."""
    if len(dims) < 2:
        return torch.zeros(dims, dtype=torch.float64)
    drawn = torch.Generator().manual_seed(len(name))
    up, down = (torch.randint(-4, 5, size, generator=drawn).double() for size in ((dims[0], 2), (2, dims[1])))
    return SCALE * (up @ down)


class Watched:
    """A source; how often it was asked, and the most bytes of what it gave that were alive when it gave more."""

    def __init__(self, source: Any) -> None:
        self.source, self.asked, self.most, self._given = source, 0, 0, list[tuple[StorageWeakRef, int]]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked += 1
        made = self.source[name]
        storage = made.untyped_storage()
        self._given = [one for one in self._given if not one[0].expired() and one[0].cdata != storage._cdata]
        self._given.append((StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self._given))
        return made


class Either:
    """`names` of one source, all else of another."""

    def __init__(self, names: Container[str], source: Any, other: Any) -> None:
        self.names, self.source, self.other = names, source, other

    def __getitem__(self, name: str) -> torch.Tensor:
        return (self.source if name in self.names else self.other)[name]


def moved(world: Any, kinds: list[Kind]) -> tuple[list[tuple[list[str], list[str], int, int, int, int]], list[Any]]:
    """A push of merged weights from TP 2 to TP 1, of each type: tensors that are not the merged checkpoint's, matrices
    that are the unmerged one's, how often a tensor was computed, and how many there are, the most bytes of them alive,
    and the bytes of the largest; then what `in_fp8` says of each of `QUANTISED`. For `run_world`."""
    return [push(world, kind) for kind in kinds], [in_fp8(world, *one) for one in QUANTISED]


def in_fp8(world: Any, case: Any, bucket: int) -> tuple[list[str], int, int, int, int]:
    """A push of quantised weights: tensors that are not the quantised checkpoint's, how often one of the policy was
    quantised, and how many there are, the most bytes of values alive, and those of the largest tensor with all scales.
    """
    from megarl.config.quantisation import scale_name
    from megarl.reshard.copying import read_local
    from megarl.reshard.fp8_map import quantised_wire, weight_parts
    from megarl.weights.quantising import QuantisedWeights, origins
    from megarl.weights.transfer import WIRE_TYPES, Mover

    checkpoint, weights = random_checkpoint(case.shape), case.quantised
    wire = quantised_wire(weights, "fp32")
    tensors, held = case.engine_of(world.rank), case.policy(world.rank)
    parts = list(weight_parts(held, weights))
    of_policy = {one.tensor for one in parts}
    plain = {name: read_local(one, slice_reader(checkpoint), torch.float32) for name, one in held.items()}
    quantised = Watched(plain)

    class Tensors(dict[str, torch.Tensor]):
        def buffer(self, name: str) -> torch.Tensor:
            if name not in self:
                dtype = WIRE_TYPES[wire(tensors[name].regions[0].hf_name)]
                self[name] = torch.zeros(tensors[name].shape, dtype=dtype)
            return self[name]

        def complete(self, name: str) -> None:
            pass

    source, arrived = Watched(QuantisedWeights(quantised, parts)), Tensors()
    computed = origins(parts)
    mover = Mover(case.plan(world.rank, bucket, wire), device=torch.device("cpu"), time_limit=60.0, computed=computed)
    mover.run(Either(computed, source, plain), arrived, verify=True)
    wanted = slice_reader(quantise_after_gather(case.shape, checkpoint))
    wrong = [
        name
        for name, one in tensors.items()
        if not torch.equal(bits(arrived[name]), read_local(one, wanted, torch.float64))
    ]
    scales = sum(one.nbytes for name, one in arrived.items() if name.endswith(scale_name("")))
    largest = max(plain[name].numel() for name in of_policy)
    return wrong, quantised.asked, len(of_policy), source.most, largest + scales


def push(world: Any, kind: Kind) -> tuple[list[str], list[str], int, int, int, int]:
    from megarl.reshard.copying import read_local
    from megarl.reshard.weight_map import vllm_tensors
    from megarl.weights.transfer import WIRE_TYPES, Mover

    dtype = WIRE_TYPES[kind]
    cut = {"tensor": 2, "pipeline": 1, "pipeline_rank": 0}
    layouts = [rank_tensors(SHAPE, tensor_rank=rank, **cut) for rank in range(2)]
    targets = [vllm_tensors(SHAPE, tensor=1, tensor_rank=0) for _ in range(2)]
    plain = random_checkpoint(SHAPE)
    changes = {name: low_rank(name, tensor.shape) for name, tensor in plain.items()}

    class Merged:
        """This rank's weights, each with its share of the products added."""

        def __getitem__(self, name: str) -> torch.Tensor:
            parts = (
                read_local(layouts[world.rank][name], slice_reader(one), torch.float32) for one in (plain, changes)
            )
            return torch.add(*parts)

    class Tensors:
        def __init__(self) -> None:
            self.found = {name: torch.zeros(one.shape, dtype=dtype) for name, one in targets[world.rank].items()}

        def buffer(self, name: str) -> torch.Tensor:
            return self.found[name]

        def complete(self, name: str) -> None:
            pass

    plan = plan_of(world.rank, layout_of(layouts), layout_of(targets), [0, 0], None, 600, all_in(kind))
    source, arrived, held = Watched(Merged()), Tensors(), layouts[world.rank]
    computed = {name: name for name in held}
    mover = Mover(plan, device=torch.device("cpu"), time_limit=60.0, computed=computed)
    mover.run(source, arrived, verify=True)

    def equal_to(checkpoint: dict[str, torch.Tensor]) -> set[str]:
        wanted = {name: read_local(one, slice_reader(checkpoint)) for name, one in targets[world.rank].items()}
        return {name for name, one in wanted.items() if torch.equal(arrived.found[name], one.float().to(dtype))}

    merged = equal_to({name: tensor + changes[name] for name, tensor in plain.items()})
    unmerged = sorted(name for name in equal_to(plain) if arrived.found[name].dim() > 1)
    largest = 4 * max(math.prod(one.shape) for one in held.values())
    return sorted(arrived.found.keys() - merged), unmerged, source.asked, len(held), source.most, largest


def test_merged_and_quantised_weights_arrive_in_place_of_those_that_are_trained() -> None:
    """Rounds hold a part of a tensor, or all that a rank keeps to itself: of tensors that are made on the way out one
    is alive at a time."""
    for merged, quantised in parity.run_world("test_weight_source", "moved", 2, ["fp32", "bf16"]):
        for wrong, unmerged, *_ in merged:
            assert (wrong, unmerged) == ([], [])
        for wrong, *_ in quantised:
            assert not wrong
        for *_, computed, tensors, most, largest in (*merged, *quantised):
            assert computed >= tensors > 5
            assert most <= largest
        # Rounds of 600 bytes: what a rank keeps of a tensor may be due in another one than what it sends.
        assert all(computed < 2 * tensors for _, _, computed, tensors, *_ in merged)
        assert all(computed == tensors for _, computed, tensors, *_ in quantised)
