"""The memory of phases, by hand; the head's formula against the bytes that are really alive."""

from __future__ import annotations

import dataclasses
from functools import cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from test_influence import heard
from test_plan_shards import MODELS

from megarl.config.algorithms.grpo import GrpoSettings
from megarl.config.cluster import GIB, read_cluster
from megarl.config.grid import Chunk
from megarl.config.implied import Implied
from megarl.config.influence import InfluenceSettings
from megarl.config.load import load_config
from megarl.config.model_shape import model_shape_from_hf, read_model_shape
from megarl.config.parameter_sets import ParameterSet
from megarl.config.schema import RunConfig
from megarl.parallel.vocab import token_log_probs, vocabulary_shard
from megarl.policy.batch import lay_out
from megarl.records import Sequence, from_place
from megarl.rehearsal.activations import head_bytes, layer_terms
from megarl.rehearsal.build import build_report
from megarl.rehearsal.memory import micro_batch_bytes, score_bytes, work_of
from megarl.rehearsal.rehearse import checked
from megarl.rehearsal.report import Report
from megarl.rehearsal.table import print_report

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
#: Runs that are to fit the GPUs that they are written for, on nodes of H100 with 80 GB.
LARGE = [
    path
    for path in sorted([*CONFIGS.glob("grpo_*.yaml"), *(CONFIGS / "reproduce").glob("*.yaml")])
    if load_config(path).gpus is not None
]


#: Those that docs/plan.md shows, their models, and under which heading.
SHOWN = [
    ("grpo_qwen2.5_72b", "Qwen2.5-72B", "How it looks"),
    ("grpo_qwen2.5_32b_16k", "Qwen2.5-32B", "32B on 16 nodes"),
]


@cache
def plan(*overrides: str, name: str = "grpo_qwen2.5_32b_16k", model: str = "Qwen2.5-32B", world: int = 64) -> Report:
    given = [f"model.path={CONFIGS}/models/{model}", f"parallel.processes={world}", *overrides]
    config = load_config(CONFIGS / f"{name}.yaml", given)
    return build_report(config, read_model_shape(config.model.path), read_cluster("h100"), world)


def run_of(**sections: Any) -> RunConfig:
    base: dict[str, Any] = {"name": "case", "steps": 1, "model": {"path": "unused"}, "data": {"path": "unused"}}
    return RunConfig.model_validate(base | {"algorithm": {"name": "grpo"}} | sections)


def test_all_large_configurations_say_their_gpus() -> None:
    assert len(LARGE) == 5 + 54


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_recipes_fit_their_gpus(path: Path) -> None:
    """As `megarl plan FILE` has it, in one process: rules, every shard, every phase."""
    cluster = read_cluster("h100")
    config, world = checked(load_config(path), cluster, None)
    report = build_report(config, read_model_shape(config.model.path), cluster, world)
    assert report.fits, report.verdict
    assert report.verdict.startswith("fits: the tightest is ")
    assert min(phase.margin for phase in report.phases) > 2 * GIB
    assert report.parameters.counted == report.parameters.exact
    # Of the 235B mixture 10: its engines of 8 GPUs have little room beside their weights.
    assert report.kv_cache is not None and report.kv_cache.sequences >= 10
    assert world % 8 == 0 or world < 8
    assert (report.hours.gpu_hours or 0) > 1


@pytest.mark.parametrize(("name", "model", "heading"), SHOWN)
def test_the_page_shows_what_a_plan_prints(name: str, model: str, heading: str) -> None:
    """docs/plan.md, for 128 GPUs each: the lines of the first block after the heading, in order."""
    printed = StringIO()
    print_report(plan(name=name, model=model, world=128), printed)
    found = iter([line.rstrip() for line in printed.getvalue().splitlines()])
    section = (CONFIGS.parent / "docs" / "plan.md").read_text().partition(f"## {heading}\n")[2]
    shown = [line for line in section.split("```\n")[1].splitlines() if line]
    assert len(shown) > 20
    for line in shown:
        assert line in found, line


def test_states_of_a_dense_model_by_hand() -> None:
    """18 bytes per parameter, 12 of them over the 4 ranks that share the parameters of a stage."""
    report = plan()
    for phase in report.phases:
        if phase.phase != "train":
            continue
        (own,) = (one for one in report.parameters.stages if phase.stage in one.stages)
        assert phase.of("policy weights") == pytest.approx(2 * own.total, rel=1e-4)
        assert phase.of("gradients") == 2 * phase.of("policy weights")
        assert phase.of("optimizer") == pytest.approx(12 * own.total / 4, rel=1e-4)
    # 4 ranks share an engine's weights, which are not padded here but for the vocabulary.
    (push,) = {phase.of("engine weights") for phase in report.phases if phase.phase == "push"}
    assert push == pytest.approx(2 * report.parameters.exact / 4, rel=1e-3)
    assert all(phase.of("push buckets") == 2 * 256 * 2**20 for phase in report.phases if phase.phase == "push")


def test_experts_have_data_parallel_ranks_of_their_own() -> None:
    report = plan(name="grpo_qwen3_30b_a3b", model="Qwen3-30B-A3B", world=32)
    train = report.busiest("train")
    assert train is not None
    own = report.parameters.stages[train.stage]
    # 16 ranks of a stage: the experts' weights are on 8 of them, twice; all others on 2, eight times.
    experts = own.by_kind["experts"]
    assert train.of("optimizer") == pytest.approx(12 * (experts / 2 + (own.total - experts) / 8), rel=1e-4)


def test_a_dense_layer_is_the_sum_of_korthikanti_adapted() -> None:
    """Per token 8 h for norms and residual, what attention and a gated MLP keep, and attention's log-sum-exp."""
    shape = read_model_shape(CONFIGS / "models" / "Qwen2.5-72B")
    h, ffn, query, key = 8192, 29568, 8192, 1024
    whole = sum(term.bytes for term in layer_terms(run_of(), shape, sparse=False))
    assert whole == 2 * (4 * h + (query + 2 * key) + query + 3 * ffn) + 4 * 64
    split = run_of(parallel={"tensor": 8, "sequence": True})
    assert sum(term.bytes for term in layer_terms(split, shape, sparse=False)) == whole / 8
    norms_whole = run_of(parallel={"tensor": 8})
    apart = sum(term.bytes for term in layer_terms(norms_whole, shape, sparse=False))
    assert apart == whole / 8 + 2 * 4 * h * 7 / 8


def test_an_engine_in_fp8_has_a_byte_for_a_weight_of_its_layers() -> None:
    """Qwen2.5 32B on 4 ranks: linear layers of decoder layers in e4m3, with an fp32 scale for 128 x 128 of them; the
    embedding, the output layer, norms and biases in bf16. The rest of the GPU is the cache's."""
    h, ffn, fused, vocabulary = 5120, 27648, 5120 + 2 * 1024, 152064
    linear = 64 * (h * fused + h * h + 3 * h * ffn) // 4
    rest = 2 * vocabulary * h // 4 + 64 * (2 * h + fused // 4) + h
    whole, quantised = (plan(*overrides) for overrides in ((), ("rollout.precision=fp8",)))
    for report, wanted in ((whole, 2 * linear + 2 * rest), (quantised, linear + linear // 128**2 * 4 + 2 * rest)):
        push, rollout = report.busiest("push"), report.busiest("rollout")
        assert push is not None and rollout is not None
        assert push.of("engine weights") == rollout.of("engine weights") == wanted
        # Gate and up of a rank of the policy's 4: a copy in bf16, values in a byte, 16 bytes of an element of a slab.
        made = 3 * 2 * ffn * h // 4 + 16 * 2**22
        assert push.of("quantised weights") == (made if report is quantised else 0)
    assert whole.kv_cache is not None and quantised.kv_cache is not None
    assert quantised.kv_cache.tokens > whole.kv_cache.tokens


def test_a_dense_layer_in_fp8_keeps_a_byte_of_what_it_multiplies() -> None:
    """Of two norms and two products (h, h, ffn and beside attention's output query) one byte, and with blocks the fp32
    scale of 128; all else as in bf16."""
    shape = read_model_shape(CONFIGS / "models" / "Qwen2.5-72B")
    h, ffn, query, key = 8192, 29568, 8192, 1024
    rest = 2 * (2 * h + (query + 2 * key) + query + 2 * ffn) + 4 * 64
    for precision, byte in (("fp8-tensorwise", 1), ("fp8-delayed", 1), ("fp8-blockwise", 1 + 1 / 32)):
        kept = sum(term.bytes for term in layer_terms(run_of(precision=precision), shape, sparse=False, fp8=True))
        assert kept == rest + byte * (2 * h + query + ffn)


def test_weights_in_fp8_lie_beside_their_own() -> None:
    """Qwen2.5 32B under TP 8 x PP 1: values and transposed of every linear layer of decoder layers; of blocks the
    scales of both; of layers that stay in bf16 nothing; of weights that are FP8 themselves the scales alone."""
    layout = (
        *("parallel.tensor=8", "parallel.context=1", "parallel.pipeline=1"),
        *("parallel.virtual_pipeline=null", "parallel.stage_layers=null"),
    )

    def of(*overrides: str) -> int:
        report = plan(*layout, *overrides)
        train = report.busiest("train")
        assert train is not None
        push = report.busiest("push")
        assert push is None or push.of("FP8 weights") == 0
        return train.of("FP8 weights")

    h, ffn, fused = 5120, 27648, 5120 + 2 * 1024
    layer = (h * fused + h * h + 3 * h * ffn) // 8
    assert of() == 0
    assert of("precision=fp8-tensorwise") == 2 * 64 * layer
    blockwise = of("precision=fp8-blockwise")
    assert blockwise == int(64 * layer * (2 + 8 / 128**2))
    ends = ("fp8.num_layers_at_start_in_bf16=3", "fp8.num_layers_at_end_in_bf16=1")
    assert of("precision=fp8-blockwise", *ends) == int(60 * layer * (2 + 8 / 128**2))
    assert of("precision=fp8-blockwise", "fp8.param=true") == int(64 * layer * 8 / 128**2)


def test_activations_shrink_with_context_and_recomputation() -> None:
    def activations(*overrides: str) -> int:
        phase = plan(*overrides).busiest("train")
        assert phase is not None
        return phase.of("activations")

    # The lengths of micro-batches are bounded in whole tokens; each of the context-parallel ranks has its part.
    plain = activations("parallel.context=1")
    assert activations() == pytest.approx(plain / 2, rel=1e-6)
    # What stays with full recomputation is the input of every layer: 2 h / t of 2 (8 h + ...) / t.
    assert activations("recompute.kind=full") < activations() / 10


def test_passes_without_gradient_stand_apart_where_they_are_needed() -> None:
    assert plan().busiest("log-probs") is None
    reference = plan("algorithm.kl_coefficient=0.01").busiest("log-probs")
    several = plan("batch.updates=2").busiest("log-probs")
    assert reference is not None and several is not None
    # A copy of the weights takes part in the one, not in the other.
    assert reference.of("weight set") == pytest.approx(reference.of("policy weights"), rel=1e-4)
    assert several.of("weight set") == 0
    assert plan("algorithm.kl_coefficient=0.01").host.used > plan().host.used


class Attentive(GrpoSettings):
    """GRPO that measures what attention says of its steps."""

    attention: InfluenceSettings = InfluenceSettings()

    @property
    def influence(self) -> InfluenceSettings | None:
        return self.attention


def test_attention_that_is_measured_stands_in_the_passes_for_log_probs() -> None:
    def scores(**settings: Any) -> list[int]:
        config = load_config(
            CONFIGS / "grpo_qwen2.5_32b_16k.yaml",
            [f"model.path={CONFIGS}/models/Qwen2.5-32B", "parallel.processes=64"],
        )
        algorithm = Attentive(attention=InfluenceSettings(**settings))
        config = config.model_copy(update={"algorithm": algorithm})
        report = build_report(config, read_model_shape(config.model.path), read_cluster("h100"), 64)
        return [phase.of("attention scores") for phase in report.phases if phase.phase == "log-probs"]

    assert plan().busiest("log-probs") is None
    # Each of 4 tensor-parallel ranks has 10 of 40 heads and 2 of 8 key-value heads, of 128; blocks of 64 queries, by
    # default. Context parallelism gathers the keys of all tokens in bf16.
    length, gathered, queries = 2048 + 16384, 2 * 20480 * 2 * 128, 4 * 64 * 10 * 128
    usual = gathered + queries + 4 * length * (2 * 128 + 2 * 10 * 64 + 2 * 10)
    assert scores() == [usual] * 4
    assert scores(query_block=128) == [usual + queries + 4 * length * 2 * 10 * 64] * 4
    assert scores(layers=(63,)) == [0, 0, 0, usual]
    chosen = gathered + queries // 5 + 4 * length * (2 * 128 + 2 * 2 * 64 + 2 * 2)
    assert scores(heads=(3, 4)) == [chosen] * 4


@pytest.mark.parametrize("heads", [None, (0, 1, 5)])
def test_attention_takes_what_the_formula_says(heads: tuple[int, ...] | None) -> None:
    """Of one layer, where every token is a step; queries and keys themselves are the layer's."""
    shape = model_shape_from_hf(
        MODELS["llama"] | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 128}
    )
    settings = InfluenceSettings(query_block=64, heads=heads)
    # Whole blocks of queries behind the first four, which have no step far enough before them.
    lengths = {"rollout": {"max_tokens": 500}, "data": {"path": "unused", "max_prompt_tokens": 16}}
    made = heard(516, np.arange(516), settings, 8, 2, 16, torch.bfloat16)
    layers = SimpleNamespace(chunks=(Chunk(range(2), True, True),))
    computed = score_bytes(run_of(precision="bf16", **lengths), shape, cast(Any, layers), settings)
    assert made.bytes == pytest.approx(computed + made.query.nbytes + made.key.nbytes, rel=0.02)


def test_a_set_that_trains_beside_the_policy_is_on_a_gpu_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as the policy again: one of the two at a time where something trains, both where they are saved."""
    alone = plan()
    monkeypatch.setattr(Implied, "parameter_sets", (ParameterSet("namer", trains=True),))
    config = load_config(
        CONFIGS / "grpo_qwen2.5_32b_16k.yaml",
        [f"model.path={CONFIGS}/models/Qwen2.5-32B", "parallel.processes=64"],
    )
    both = build_report(config, read_model_shape(config.model.path), read_cluster("h100"), 64)
    found = {phase.phase: phase for phase in both.phases if phase.stage == 0}
    states = ("policy weights", "gradients", "optimizer")
    assert found["train"] == next(one for one in alone.phases if (one.phase, one.stage) == ("train", 0))
    assert found["train beside"].of("set namer") == sum(found["train"].of(name) for name in states)
    assert found["train beside"].of("policy weights") == 0
    assert found["save"].of("set namer") == found["save"].of("policy weights") + found["save"].of("optimizer")
    assert found["push"].of("set namer") == found["rollout"].of("set namer") == 0
    assert both.host.used == 2 * alone.host.used


@pytest.mark.parametrize("shadow", ["persistent", "rebuilt"])
def test_a_step_of_bridge_takes_no_more_than_one_set_beside_the_policy(shadow: str) -> None:
    config = load_config(
        CONFIGS / "reproduce" / "bridge_32b_bridge.yaml",
        [f"model.path={CONFIGS}/models/Qwen2.5-32B", "parallel.processes=64", f"algorithm.shadow={shadow}"],
    )
    report = build_report(config, read_model_shape(config.model.path), read_cluster("h100"), 64)
    found = {phase.phase: phase for phase in report.phases}
    train = found["train"]
    own = sum(train.of(name) for name in ("policy weights", "adapter", "gradients", "optimizer"))
    beside = sum(train.of(name) for name in ("set shadow", "gradients set aside"))
    assert 0 < train.of("gradients set aside") < train.of("gradients") and beside < own
    assert train.of("adapter") > 0 and (train.of("set shadow") > 0) == (shadow == "rebuilt")
    # The shadow's turn has it in the policy's place.
    assert found["train beside"].used <= own + beside + sum(train.of(n) for n in ("reserved", *WORK))


#: What passes with a gradient take beside what trains.
WORK = ("merged weights", "activations", "backward pass", "micro-batches")


def test_work_of_an_update() -> None:
    config = run_of(
        batch={"prompts": 10, "updates": 2, "tokens_per_microbatch": 500},
        rollout={"max_tokens": 100, "group_size": 4},
        data={"path": "unused", "max_prompt_tokens": 50},
    )
    # 5 prompts x 4 samples over 3 replicas; three sequences of 150 tokens fit a micro-batch.
    work = work_of(config, replicas=3)
    assert (work.sequences, work.micro_batches) == (7, 3)


def test_micro_batches_hold_no_more_than_the_formula_says() -> None:
    """Sequences of 64 tokens, all but the first of them trained, with every value that a sequence can carry."""
    shape = model_shape_from_hf(MODELS["qwen3-moe"])
    lengths = {"rollout": {"max_tokens": 63}, "data": {"path": "unused", "max_prompt_tokens": 1}}
    config = run_of(moe={"routing_replay": "on"}, **lengths)
    values = np.zeros(63, np.float32)
    routed = np.zeros((63, sum(shape.sparse_layers), shape.experts_per_token), np.int16)
    sequences = [
        Sequence(
            tokens=np.arange(64, dtype=np.int32),
            positions=from_place(1, 64),
            advantages=values,
            rollout_log_probs=values,
            old_log_probs=values,
            log_probs_under={"reference": values},
            routed_experts=routed,
            group=index,
        )
        for index in range(5)
    ]
    batch = lay_out(sequences, packed=True)
    fields = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    fields = [list(field.values()) if isinstance(field, dict) else field for field in fields]
    tensors = [one for field in fields for one in (field if isinstance(field, tuple | list) else [field])]
    real = sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor))
    assert real == pytest.approx(micro_batch_bytes(config, shape, 5), rel=0.02)


def test_supervised_training_has_no_engine() -> None:
    report = plan("algorithm={name: sft}", "data.solution_column=solution")
    assert {phase.phase for phase in report.phases} == {"train"}
    assert report.kv_cache is None
    assert report.host.used == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk", [64, 4])
def test_the_head_takes_what_the_formula_says(dtype: torch.dtype, entropy: bool, chunk: int) -> None:
    """Counted without data: there a GPU's products are taken, which need no copy of bf16 matrices in fp32."""
    tokens, vocabulary = 256, 2048
    shape = model_shape_from_hf(MODELS["llama"] | {"vocab_size": vocabulary})
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    config = run_of(precision=precision, batch={"logprob_chunk": chunk})
    with torch.device("meta"):
        hidden = torch.randn(tokens, shape.hidden_size, dtype=dtype, requires_grad=True)
        weight = torch.randn(vocabulary, shape.hidden_size, dtype=dtype, requires_grad=True)
        targets, chosen = torch.randint(0, vocabulary, (tokens,)), torch.arange(tokens)
    with LiveBytes(hidden, weight) as live:
        rows = hidden.index_select(0, chosen)
        shard = vocabulary_shard(vocabulary, vocabulary, 0, None)
        log_probs, entropies = token_log_probs(
            rows, weight, targets, shard, temperature=0.7, chunk=chunk, entropy_gradient=entropy
        )
        # The hidden states themselves are not new here.
        forward = live.peak + hidden.nbytes
        live.peak = 0
        (log_probs.sum() + (entropies.sum() if entropy else 0)).backward()
    computed = [
        head_bytes(config, shape, tokens, backward=backward, entropy_gradient=entropy) for backward in (False, True)
    ]
    assert forward == pytest.approx(computed[0], rel=0.05)
    assert live.peak == pytest.approx(computed[1], rel=0.05)


def test_a_run_that_does_not_fit_is_told_what_to_change() -> None:
    report = plan("recompute.kind=none", "parallel.context=1")
    assert not report.fits
    assert report.verdict.startswith("does not fit: train on pipeline stage 1 needs ")
    assert "and a GPU has 79.1 GiB. Fix: set recompute.kind=full, with which it fits." in report.verdict
    assert plan("recompute.kind=full", "parallel.context=1").fits


def test_an_engine_without_room_for_one_sequence_does_not_fit() -> None:
    report = plan("rollout.gpu_memory_fraction=0.2")
    assert not report.fits
    assert "rollout" in report.verdict and "the engine's share of a GPU is 15.8 GiB" in report.verdict
    assert "Fix: set rollout.gpu_memory_fraction=0.85, with which it fits." in report.verdict
    small = plan("rollout.kv_cache_gib=0.5")
    assert not small.fits and small.kv_cache is not None and small.kv_cache.sequences == 0
