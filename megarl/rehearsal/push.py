"""What a weight push moves, and how long its links take for it."""

from __future__ import annotations

from math import prod

from megarl.config.cluster import Cluster
from megarl.config.grid import grid_of_rank
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.rehearsal.report import LinkBytes, PushTraffic
from megarl.reshard.boxes import missing_bytes
from megarl.reshard.plan import Plan
from megarl.reshard.traffic import Traffic, count_traffic
from megarl.reshard.weight_map import hf_tensors
from megarl.reshard.wire import BYTES
from megarl.weights.push_plan import engine_tensors, policy_tensors, push_layouts, push_plan, push_wire


def push_traffic(config: RunConfig, shape: ModelShape, cluster: Cluster, world: int) -> PushTraffic:
    """The push of a run on `world` GPUs: bytes of all ranks, the plan of the slowest, seconds by the links' speeds.

    The seconds are those of the rank whose bytes take longest: its network and its NVLink work side by side, each in
    both directions at once; copies within the rank read and write its memory; messages come one after another. Copies
    into and out of a round's buffers are not in them, nor what packs weights in the engine.
    """
    nodes = _nodes(cluster, world)
    wire = push_wire(config, shape)
    sources, targets = push_layouts(config, shape, world)
    traffic = count_traffic(sources, targets, nodes, wire)
    moving = [_seconds(traffic, rank, cluster) for rank in range(world)]
    slowest = moving.index(max(moving))
    neediest = max(range(world), key=traffic.received)
    plan = push_plan_of(config, shape, cluster, world, slowest)
    messages = sum(len(one.messages) for one in plan.rounds)
    least = missing_bytes(
        engine_tensors(config, shape, neediest).values(),
        policy_tensors(config, shape, grid_of_rank(neediest, world, config.parallel)).values(),
        wire,
    )
    return PushTraffic(
        network=_link(traffic.received_far, traffic.sent_far),
        nvlink=_link(traffic.received_near, traffic.sent_near),
        copied_bytes=sum(traffic.local),
        received_bytes_max_rank=traffic.received(neediest),
        lower_bound_max_rank=least,
        gathered_bytes=sum(map(prod, hf_tensors(shape).values())) * BYTES[config.engine_dtype],
        slowest_rank=slowest,
        rounds=len(plan.rounds),
        messages=messages,
        seconds=moving[slowest] + messages * cluster.message_seconds,
    )


def push_plan_of(config: RunConfig, shape: ModelShape, cluster: Cluster, world: int, rank: int) -> Plan:
    """The part of a rank in the push of a run on `world` GPUs."""
    return push_plan(config, shape, rank, _nodes(cluster, world))


def _nodes(cluster: Cluster, world: int) -> list[int]:
    """The node of every rank where nodes are filled one after another."""
    return [rank // cluster.gpus_per_node for rank in range(world)]


def _link(received: list[int], sent: list[int]) -> LinkBytes:
    return LinkBytes(sum(received), max(received), max(sent))


def _seconds(traffic: Traffic, rank: int, cluster: Cluster) -> float:
    network = max(traffic.received_far[rank], traffic.sent_far[rank]) / cluster.network_bytes_per_second
    nvlink = max(traffic.received_near[rank], traffic.sent_near[rank]) / cluster.nvlink_bytes_per_second
    return max(network, nvlink) + 2 * traffic.local[rank] / cluster.hbm_bytes_per_second
