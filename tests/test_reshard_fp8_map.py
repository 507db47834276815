"""FP8 weights in the weight map: which tensors of a checkpoint are quantised, how their scales are laid out, and that
ranks which quantise their parts fill engines with what the whole checkpoint's quantisation has there."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reshard_reference import make_shape, random_checkpoint, slice_reader
from reshard_worlds import Case, blank, execute, fp8_cases, moe_shape

from megarl.config.quantisation import scale_name
from megarl.config.sections import ParallelSettings
from megarl.ops.fp8 import WEIGHT_TILE, quantise_tiles, quantise_weight
from megarl.reshard.boxes import missing_bytes, padding_boxes
from megarl.reshard.copying import box_view, read_local
from megarl.reshard.fp8_map import local_parts, quantised_weights, quantised_wire, weight_parts
from megarl.reshard.weight_map import hf_tensors
from megarl.weights.quantising import QuantisedWeights


def test_linear_layers_of_decoder_layers_and_nothing_else():
    """Every matrix within the layers but routers and gates; blocks are counted in each tensor, the last may be less."""
    for shape in (make_shape("qwen2"), moe_shape("qwen2_moe", hidden_size=136), moe_shape("mixtral")):
        tensors = hf_tensors(shape)
        kept = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "shared_expert_gate.weight", "norm.weight")
        wanted = {
            name for name, dims in tensors.items() if len(dims) == 2 and ".layers." in name and not name.endswith(kept)
        }
        found = quantised_weights(shape)
        assert set(found) == wanted
        assert list(found) == [name for name in tensors if name in found]
        for name, scales in found.items():
            assert scales == tuple(-(-length // 128) for length in tensors[name]), name
    assert scale_name("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight_scale_inv"


def bits(tensor):
    """As whole numbers, so that nothing but the same bits is equal."""
    return tensor.view({1: torch.int8, 4: torch.int32}[tensor.element_size()]).double()


class Bits:
    """A source's tensors as whole numbers, each asked for once."""

    def __init__(self, source):
        self.source, self.known = source, {}

    def __getitem__(self, name):
        if name not in self.known:
            self.known[name] = bits(self.source[name])
        return self.known[name]


def quantise_after_gather(shape, checkpoint):
    """The whole checkpoint, quantised, as whole numbers."""
    found = {}
    for name, tensor in checkpoint.items():
        if name in quantised_weights(shape):
            made = quantise_weight(tensor.float())
            found[name], found[scale_name(name)] = bits(made.values), bits(made.scales)
        else:
            found[name] = bits(tensor.float())
    return found


#: What random grids seldom are: whole experts on each rank, and key heads of half a block, which Megatron interleaves.
WHOLE_EXPERTS = Case(
    moe_shape("mixtral", hidden_size=256, head_dim=64, num_kv_heads=4, expert_ffn_size=128),
    ParallelSettings(tensor=2, expert=2, expert_tensor=1), 2, True, 4, 2, True,
)  # fmt: skip
HALF_A_BLOCK = Case(
    make_shape(hidden_size=256, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=512, num_layers=4),
    ParallelSettings(tensor=2, pipeline=2), 2, False, 8, 4, True,
)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(fp8_cases(), st.integers(3000, 400_000))
@example(WHOLE_EXPERTS, 20_000)
@example(HALF_A_BLOCK, 100_000)
def test_engines_hold_what_quantising_after_gathering_gives(case, bucket_bytes):
    """Bit for bit, whatever the grid; in 1 byte a value and 4 a scale, and no byte twice."""
    checkpoint = {
        name: tensor * 10.0 ** torch.randint(-6, 3, (1,), generator=torch.Generator().manual_seed(place)).item()
        for place, (name, tensor) in enumerate(random_checkpoint(case.shape).items())
    }
    weights, wire = case.quantised, quantised_wire(case.quantised, "fp32")
    sources = []
    for rank in range(case.world):
        held = {
            name: read_local(one, slice_reader(checkpoint), torch.float32) for name, one in case.policy(rank).items()
        }
        sources.append(Bits(QuantisedWeights(held, list(weight_parts(case.policy(rank), weights)))))
    targets = [blank(case.engine_of(rank)) for rank in range(case.world)]
    plans = case.plans(bucket_bytes, wire)
    execute(plans, sources, targets)
    wanted = slice_reader(quantise_after_gather(case.shape, checkpoint))
    for rank, plan in enumerate(plans):
        for name, tensor in case.engine_of(rank).items():
            expected = read_local(tensor, wanted, torch.float64)
            for box in padding_boxes(tensor):
                box_view(expected, box).fill_(-1)
            assert torch.equal(targets[rank][name], expected), (rank, name)
        least = missing_bytes(case.engine_of(rank).values(), local_parts(case.policy(rank), weights).values(), wire)
        assert sum(one.nbytes for one in plan.receives()) == least


class Kept:
    """What Transformer Engine 2.11 has of a parameter in blocks (Float8BlockwiseQTensor), as far as it is looked at."""

    _is_2D_scaled = True

    def __init__(self, weight):
        made = quantise_tiles(weight, WEIGHT_TILE)
        self.weight, self._rowwise_data = weight, made.values.view(torch.uint8)
        columns = made.scales.shape[1]
        self._rowwise_scale_inv = torch.nn.functional.pad(made.scales, (0, -columns % 4))

    def __getitem__(self, box):
        return self.weight[box]


def test_parameters_that_are_kept_in_blocks_travel_as_they_are():
    """Where their blocks are those of the checkpoint's tensors; else they are quantised anew."""
    shape = make_shape(hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=128, ffn_size=256)
    for head_dim, kept in ((128, True), (64, False)):
        shape = replace(shape, head_dim=head_dim)
        case = Case(shape, ParallelSettings(), 1, False, 1, 1, True)
        parts = list(weight_parts(case.policy(0), case.quantised))
        drawn = torch.Generator().manual_seed(1)
        held = {
            name: Kept(torch.randn(one.shape, generator=drawn))
            for name, one in case.policy(0).items()
            if len(one.shape) == 2
        }
        source = QuantisedWeights(cast("Any", held), parts)
        for part in parts:
            one = held[part.tensor]
            wanted = quantise_weight(torch.cat([box_view(one.weight, box) for box in part.local_boxes]))
            assert torch.equal(bits(source[part.name]), bits(wanted.values)), part
            assert torch.equal(bits(source[scale_name(part.name)]), bits(wanted.scales.contiguous())), part
        # What was kept is what travelled: another value in its place shows, or not.
        name = "model.layers.0.self_attn.k_proj.weight"
        (part,) = (one for one in parts if one.name == name)
        held[part.tensor]._rowwise_data.fill_(0)
        assert (not bits(QuantisedWeights(cast("Any", held), parts)[name]).any()) == kept


def test_parts_that_end_within_a_block_are_no_plan():
    """The rules refuse such a layout; a plan of it would cut a block in two."""
    case = Case(make_shape(hidden_size=256, num_heads=4, head_dim=96), ParallelSettings(tensor=2), 1, False, 2, 2, True)
    with pytest.raises(ValueError, match="begins within a block of 128"):
        case.plans()
