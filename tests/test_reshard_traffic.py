"""Traffic counted by classes is that of all ranks' plans."""

from hypothesis import given, settings
from reshard_reference import make_shape
from reshard_worlds import ONE_BYTE, Case, cases, fp8_cases

from megarl.config.sections import ParallelSettings
from megarl.reshard import matching
from megarl.reshard.fp8_map import quantised_wire
from megarl.reshard.traffic import count_traffic


def counted(case, wire=ONE_BYTE):
    sources, targets = case.layouts()
    return count_traffic(sources, targets, case.nodes, wire)


def assert_counted(case, wire=ONE_BYTE):
    traffic = counted(case, wire)
    nodes = case.nodes
    for rank, plan in enumerate(case.plans(wire=wire)):
        near = [sum(t.nbytes for t in found if nodes[t.source] == nodes[t.target])
                for found in (plan.receives(), plan.sends())]  # fmt: skip
        whole = [sum(t.nbytes for t in found) for found in (plan.receives(), plan.sends())]
        assert traffic.local[rank] == sum(t.nbytes for t in plan.local())
        assert [traffic.received_near[rank], traffic.sent_near[rank]] == near
        assert [traffic.received(rank), traffic.sent(rank)] == whole


@settings(deadline=None, max_examples=60)
@given(cases())
def test_traffic_is_that_of_the_plans(case):
    assert_counted(case)


@settings(deadline=None, max_examples=40)
@given(fp8_cases())
def test_values_of_a_byte_and_scales_of_four_beside_what_is_not_quantised(case):
    assert_counted(case, quantised_wire(case.quantised, "bf16"))


@settings(deadline=None, max_examples=40)
@given(cases())
def test_also_where_boxes_are_shared_in_parts(case):
    least, matching.LEAST_PART = matching.LEAST_PART, 1
    try:
        assert_counted(case)
    finally:
        matching.LEAST_PART = least


def test_32b_on_64_ranks():
    """Qwen2.5-32B from TP 8 x PP 4 x DP 2 to 16 engines of TP 4: traffic in closed form."""
    shape = make_shape(
        hidden_size=5120, num_layers=64, num_heads=40, num_kv_heads=8, head_dim=128, ffn_size=27648, vocab_size=152_064
    )
    case = Case(shape, ParallelSettings(tensor=8, pipeline=4), 4, False, 64, 8)
    traffic = counted(case)
    layer = 2 * 5120 * 5120 + 2 * 1024 * 5120 + 3 * 27648 * 5120 + 5120 + 2 * 1024
    norms = 2 * 5120
    vocabulary = 152_064 * 5120
    # An engine has 4 copies of every norm and one of all else; 64 layers, 16 to a stage.
    stage = 16 * (layer + 4 * norms)
    stages = [stage + vocabulary, stage, stage, stage + vocabulary + 4 * 5120]
    # A node of 8 ranks holds one stage whole: its two engines fetch the other stages from afar.
    afar = sum(2 * 2 * (sum(stages) - held) for held in stages)
    assert sum(traffic.received_far) == sum(traffic.sent_far) == afar
    assert sum(traffic.local) + sum(traffic.received_near) + afar == 16 * sum(stages)
    # The 16 ranks of a stage share its sending to other nodes; the first and the last also have the vocabulary.
    for first in range(0, 64, 16):
        sent = traffic.sent_far[first : first + 16]
        assert max(sent) <= 1.001 * sum(sent) / 16
