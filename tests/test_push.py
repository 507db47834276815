"""The weight push, after real updates: the engine against vLLM's own loader, and its log-probs against the policy's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest

#: vLLM's CPU attention wants heads of 32 elements. 130 rows are padded to 192: with TP 2 the second rank pads.
SIZES = {"hidden_size": 128, "head_dim": 32, "vocab_size": 130}
MODELS = ("qwen2-tied", "qwen3-untied", "llama-llama3")
LAYOUTS: tuple[dict[str, Any], ...] = ({"tensor": 2, "pipeline": 2}, {"pipeline": 2}, {"tensor": 2, "sequence": True})
#: Mixtures of experts train with the experts that the engine chose.
MIXTURES = ("qwen3-moe", "qwen2-moe", "mixtral")
MIXTURE_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"expert": 2},
    {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1},
)
#: Those of which an adapter trains alone: what is pushed is merged.
ADAPTED = ("llama-llama3", "mixtral")
#: Ends of names of what an adapter changes in an engine.
LINEAR = ("proj.weight", "w13_weight", "w2_weight", "lm_head.weight")
ENGINES: tuple[dict[str, Any], ...] = ({"tensor": 1}, {"tensor": 2})
ENGINES_OF_MIXTURES: tuple[dict[str, Any], ...] = (*ENGINES, {"tensor": 2, "expert_parallel": True})
PUSHES = 3
WITH_ADAPTER: dict[str, Any] = {"parameters": "adapter", "adapter": {"rank": 4, "targets": ("all-linear", "lm_head")}}
#: Model, layout of the policy, engine.
GRIDS_OF_8: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("qwen3-untied", {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}, {"tensor": 4}),
    (
        "qwen3-moe",
        {"tensor": 2, "pipeline": 2, "sequence": True, "expert": 2, "expert_tensor": 2},
        {"tensor": 4, "expert_parallel": True},
    ),
    (
        "qwen2-moe",
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True, "expert": 4, "expert_tensor": 1},
        {"tensor": 4},
    ),
)
PROMPTS = 12


def pairwise_cases(models: tuple[str, ...], layouts: tuple[Any, ...], engines: tuple[Any, ...]) -> dict[int, list]:
    """By number of the engine, models with the numbers of layouts: any two of model, layout and engine meet in a case.

    Every case costs an engine for vLLM's loader, which is most of the time; the product of all three is left to the
    plans (test_reshard_plan.py).
    """
    found: dict[int, list] = {number: [] for number in range(len(engines))}
    for place, model in enumerate(models):
        for other in range(max(len(layouts), len(engines))):
            layout, engine = other % len(layouts), (place + other) % len(engines)
            if (model, layout) not in found[engine]:
                found[engine].append((model, layout))
    return found


@dataclass
class Outcome:
    """One rank's findings after one push. `received`, `sent`: bytes; `least`: bytes that it needs and does not hold."""

    received: int
    sent: int
    least: int
    engine: dict[str, np.ndarray]
    completions: list[Any]
    log_probs: dict[int, np.ndarray]


def config_for(path: Path, parallel: dict[str, Any], engine: dict[str, Any]) -> Any:
    return parity.run_config(
        path,
        parallel=parallel,
        rollout={"max_tokens": 16, "kv_cache_gib": 0.01} | engine,
        data={"max_prompt_tokens": 32},
        batch={"tokens_per_microbatch": 128, "logprob_chunk": 7},
        # Small enough for several bucket rounds per push.
        weights={"bucket_mib": 0.05},
        moe={"routing_replay": "on" if path.name.startswith(MIXTURES) else "off"},
        **(WITH_ADAPTER if path.name.startswith(ADAPTED) else {}),
    )


def engine_of(config: Any, world: Any, *, load_weights: bool = False) -> Any:
    from megarl.config.model_shape import read_model_shape
    from megarl.rollout.engine import Engine

    shape = read_model_shape(config.model.path)
    engine = Engine(
        config,
        shape,
        eos_token_ids=(1,),
        rank=world.rank,
        world_size=world.size,
        load_weights=load_weights,
        record_routing=shape.is_moe,
    )
    # All stay alive: an engine that is collected takes the process's groups down with it.
    _ENGINES.append(engine)
    return engine


_ENGINES: list[Any] = []


def read_back(engine: Any) -> dict[str, np.ndarray]:
    from megarl.rollout.weights import EngineWeights

    return {name: tensor.float().numpy() for name, tensor in EngineWeights(engine).read_back().items()}


def generate(engine: Any, vocab: int) -> list[Any]:
    from megarl.rollout.engine import Request, Sampling

    requests = [Request(tuple(2 + (7 * i + j) % (vocab - 2) for j in range(2 + i)), i, 100 + i) for i in range(PROMPTS)]
    return [(r.prompt_token_ids, c) for r, c in zip(requests, engine.generate(requests, Sampling(16)), strict=True)]


def least(policy: Any) -> int:
    """Bytes that must come to this rank: what its engine needs and its policy does not hold."""
    from megarl.reshard.boxes import missing_bytes
    from megarl.weights.push_plan import engine_tensors, policy_tensors, push_wire

    needed = engine_tensors(policy.config, policy.shape, policy.world.rank)
    held = policy_tensors(policy.config, policy.shape, policy.grid)
    return missing_bytes(needed.values(), held.values(), push_wire(policy.config, policy.shape))


def push_and_measure(policy: Any, push: Any, engine: Any) -> Outcome:
    engine.wake_weights()
    push.run()
    engine.wake_cache()
    completions = generate(engine, policy.shape.vocab_size)
    sequences = [
        parity.Sequence(
            tokens=np.array([*prompt, *c.token_ids], np.int32),
            positions=parity.from_place(len(prompt), len(prompt) + len(c.token_ids)),
            routed_experts=c.routed_experts,
        )
        for prompt, c in completions
    ]
    mine = parity.share(sequences, policy.grid)
    log_probs = policy.measure([sequences[i] for i in mine])
    found = Outcome(
        received=push.mover.received_bytes,
        sent=push.mover.sent_bytes,
        least=least(policy),
        engine=read_back(engine),
        completions=[c for _, c in completions],
        log_probs={} if log_probs is None else dict(zip(mine, log_probs, strict=True)),
    )
    engine.sleep()
    return found


def base_alone(policy: Any, engine: Any) -> str:
    """What a push says of a source that leaves the adapter out."""
    from megarl.errors import PhaseError
    from megarl.weights.push import AdapterMissing, Push

    base = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    engine.wake_weights()
    with pytest.raises(AdapterMissing) as caught:
        Push(policy, engine, base).run()
    # Nothing generates with what it left.
    with pytest.raises(PhaseError):
        engine.wake_cache()
    Push(policy, engine).run()
    engine.wake_cache()
    engine.sleep()
    return str(caught.value)


def pushes(
    world: Any, folder: Path, settings: dict[str, Any], cases: list[tuple[str, int]], layouts: list[dict], updates: int
) -> dict[str, Any]:
    """Of each case, a model and the number of a layout: updates with a push after each, and what vLLM loads from the
    last export. A scenario of `run_world`."""
    from megarl.weights.export import export_hf
    from megarl.weights.push import Push

    found = {}
    for model in dict.fromkeys(model for model, _ in cases):
        engine = engine_of(config_for(folder / model, {}, settings), world)
        engine.sleep()
        for number in (number for name, number in cases if name == model):
            config = config_for(folder / model, layouts[number], settings)
            exported = folder / f"{model}-{'-'.join(map(str, settings.values()))}-{number}"
            with parity.policy_of(config, world) as policy:
                push = Push(policy, engine)
                rounds = []
                for seed in range(updates):
                    batch = parity.mini_batch(seed, vocab=policy.shape.vocab_size)
                    values = [np.full(s.trained, -4.8) for s in batch]
                    parity.update(policy, parity.grpo(config), parity.with_old_log_probs(batch, values, seed))
                    rounds.append(push_and_measure(policy, push, engine))
                precision = "fp8" if settings.get("precision") == "fp8" else None
                export_hf(policy, exported, Path(config.model.path), precision=precision)
                if policy.adapted:
                    said = base_alone(policy, engine)
                    assert "decoder.layers.0.mlp." in said and "without the adapter" in said
            loader = engine_of(config_for(exported, {}, settings), world, load_weights=True)
            found[model, number] = rounds, read_back(loader), generate(loader, policy.shape.vocab_size)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    for model in MODELS:
        parity.write_model(folder, model, **SIZES)
    return folder


@pytest.mark.parametrize("number", range(len(ENGINES)))
def test_engine_holds_what_vllm_loads_from_the_exported_checkpoint(folder: Path, number: int):
    """Bitwise, as its kernels use the weights, under every layout of the policy; and so are its answers."""
    cases = pairwise_cases(MODELS, LAYOUTS, ENGINES)[number]
    ranks = parity.run_world("test_push", "pushes", 4, folder, ENGINES[number], cases, list(LAYOUTS), PUSHES)
    check(ranks, set(cases), PUSHES)


@pytest.mark.parametrize("number", range(len(ENGINES_OF_MIXTURES)))
def test_engine_of_a_mixture_of_experts(folder: Path, number: int):
    """As for dense models, with the experts spread over ranks in the policy and split, or spread too, in the engine."""
    for model in MIXTURES:
        parity.write_model(folder, model, **SIZES)
    cases = pairwise_cases(MIXTURES, MIXTURE_LAYOUTS, ENGINES_OF_MIXTURES)[number]
    engine, layouts = ENGINES_OF_MIXTURES[number], list(MIXTURE_LAYOUTS)
    ranks = parity.run_world("test_push", "pushes", 2, folder, engine, cases, layouts, PUSHES)
    check(ranks, set(cases), PUSHES)
    for rank in ranks:
        for rounds, _, _ in rank.values():
            # Every token but the last of each answer has its experts.
            for outcome in rounds:
                assert all(
                    c.routed_experts.shape[1] in (3, 4) and (c.routed_experts >= 0).all() for c in outcome.completions
                )


@pytest.mark.parametrize("model, parallel, engine", GRIDS_OF_8)
def test_grids_of_eight_processes(tmp_path: Path, model: str, parallel: dict[str, Any], engine: dict[str, Any]):
    """TP, PP, interleaved stages, EP, ETP and DP together, onto engines of four ranks."""
    parity.write_model(tmp_path, model, **SIZES)
    ranks = parity.run_world("test_push", "pushes", 8, tmp_path, engine, [(model, 0)], [parallel], 1)
    check(ranks, {(model, 0)}, 1)


def casts(world: Any, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int, int, list[str]]:
    """A bf16 engine that an fp32 policy fills, and one that loads the policy's export; bytes; tensors of engine and
    export that a source of doubled weights did not double, and of an export in FP8 that are not those of the whole
    weights. A scenario of `run_world`."""
    import torch
    from safetensors.torch import load_file

    from megarl.ops.fp8 import quantise_weight
    from megarl.weights.export import export_hf
    from megarl.weights.push import Push
    from megarl.weights.source import PolicyWeights

    class Doubled(PolicyWeights):
        def __getitem__(self, name: str) -> Any:
            return super().__getitem__(name) * 2

    settings = {"tensor": 2, "precision": "bf16"}
    config = config_for(folder / "qwen3-untied", {"tensor": 2, "pipeline": 2}, settings)
    engine = engine_of(config, world)
    engine.sleep()
    with parity.policy_of(config, world) as policy:
        push = Push(policy, engine)
        engine.wake_weights()
        push.run()
        pushed = read_back(engine)
        parity.exported(policy, folder / "cast")
        needed = least(policy)
        Push(policy, engine, Doubled(policy)).run()
        twice = read_back(engine)
        wrong = [name for name, one in twice.items() if not np.array_equal(one, 2 * pushed[name])]
        export_hf(policy, folder / "doubled", Path(config.model.path), Doubled(policy))
        exported = parity.read_checkpoint(folder / "cast")
        doubled = parity.read_checkpoint(folder / "doubled")
        wrong += [name for name, one in exported.items() if not np.array_equal(doubled[name], 2 * one)]
        export_hf(policy, folder / "fp8", Path(config.model.path), precision="fp8")
        in_fp8 = load_file(folder / "fp8" / "model.safetensors")
        for name, one in exported.items():
            weight = torch.from_numpy(one)
            if name.endswith("_proj.weight"):
                quantised = quantise_weight(weight)
                weight, scales = quantised.values, in_fp8.pop(f"{name}_scale_inv")
                wrong += [f"scales of {name}"] * (not torch.equal(scales, quantised.scales))
            wrong += [name] * (in_fp8[name].dtype != weight.dtype or not torch.equal(in_fp8.pop(name), weight))
        wrong += list(in_fp8)
    loader = engine_of(config_for(folder / "cast", {}, settings), world, load_weights=True)
    return pushed, read_back(loader), push.mover.received_bytes, needed, wrong


def test_weights_are_cast_before_they_are_sent(folder: Path):
    """An fp32 policy fills a bf16 engine with what vLLM makes of its fp32 checkpoint, at two bytes an element.

    What a source makes of the weights is pushed and exported in their place; what is exported in FP8 is quantised
    whole, wherever the policy's ranks cut it.
    """
    for pushed, loaded, received, needed, wrong in parity.run_world("test_push", "casts", 4, folder):
        assert pushed.keys() == loaded.keys()
        assert not [name for name in loaded if not np.array_equal(pushed[name], loaded[name])]
        assert received == needed > 0
        assert not wrong


def test_ranks_whose_share_of_the_vocabulary_is_padding_alone(tmp_path: Path):
    """65 rows are padded to 128: of four ranks the third has one row and the fourth none; it pads with zeros."""
    for model in ("qwen2-tied", "qwen3-untied"):
        parity.write_model(tmp_path, model, **SIZES | {"vocab_size": 65})
    cases = [("qwen2-tied", 0), ("qwen3-untied", 0)]
    ranks = parity.run_world("test_push", "pushes", 4, tmp_path, {"tensor": 4}, cases, [{"tensor": 2}], PUSHES)
    check(ranks, set(cases), PUSHES)
    for (model, _), (rounds, _, _) in ranks[3].items():
        for outcome in rounds:
            rows = [value for name, value in outcome.engine.items() if "embed_tokens" in name or "lm_head" in name]
            assert len(rows) >= 2, model
            assert all(value.shape == (32, 128) and not value.any() for value in rows)


def refused(world: Any, folder: Path) -> str:
    """What the push says of an engine of another model. A scenario of `run_world`."""
    from megarl.errors import Refusal
    from megarl.weights.push import Push

    engine = engine_of(config_for(folder / "narrow" / "qwen2-tied", {}, {}), world)
    config = config_for(folder / "qwen2-tied", {}, {})
    with parity.policy_of(config, world) as policy, pytest.raises(Refusal) as refusal:
        Push(policy, engine)
    return str(refusal.value)


def test_model_that_vllm_builds_otherwise_is_refused(tmp_path: Path):
    """Sizes that vLLM takes from elsewhere than the policy would be filled wrongly: here another checkpoint's."""
    parity.write_model(tmp_path, "qwen2-tied", **SIZES)
    parity.write_model(tmp_path / "narrow", "qwen2-tied", **SIZES, intermediate_size=64)
    said = parity.run_world("test_push", "refused", 1, tmp_path)[0]
    assert "mlp.down_proj.weight of shape (128, 64) in vLLM: must have shape (128, 96)" in said


def check(ranks: list[dict], cases: set, updates: int, gap: float = 1e-4) -> None:
    """Every push changed every weight with the fewest bytes, powers of two aside; log-probs agree within `gap` after
    each; after the last, weights are the loader's."""
    for rank in ranks:
        assert set(rank) == cases
        for case, (rounds, loaded, loader_completions) in rank.items():
            last = rounds[-1]
            assert len(rounds) == updates
            assert set(last.engine) == set(loaded)
            assert not [name for name in loaded if not np.array_equal(last.engine[name], loaded[name])], case
            assert last.completions == [c for _, c in loader_completions], case
            for before, after in pairwise(rounds):
                same = {n for n in loaded if loaded[n].any() and np.array_equal(before.engine[n], after.engine[n])}
                frozen = {n for n in loaded if not n.split()[0].endswith(LINEAR)} if case[0] in ADAPTED else set()
                same, frozen = ({n for n in names if not n.endswith("_scale_inv")} for names in (same, frozen))
                assert same == frozen, f"{case}: a push changed nothing in {same - frozen}"
            for outcome in rounds:
                assert outcome.received == outcome.least, case
                for index, log_probs in outcome.log_probs.items():
                    np.testing.assert_allclose(log_probs, outcome.completions[index].log_probs, rtol=0, atol=gap)
    for case in cases:
        for number in range(updates):
            outcomes = [rank[case][0][number] for rank in ranks]
            assert sum(one.sent for one in outcomes) == sum(one.received for one in outcomes)
            compared = {index for rank in ranks for index in rank[case][0][number].log_probs}
            assert compared == set(range(PROMPTS))
