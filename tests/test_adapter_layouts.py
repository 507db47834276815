"""An adapter trained alone beside a frozen base: PEFT's on transformers in one process, and alike under every layout.

PEFT computes with the base's output and the adapter's added, and never merges.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch
from test_policy_parity import TEMPERATURES, UPDATES, token_losses

from megarl.config.adapters import AdapterSettings
from megarl.conversion import compare, to_hf
from megarl.conversion.ranks import Ranks
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder

SP = {"tensor": 2, "sequence": True}
FULL = {"recompute": {"kind": "full"}}
#: An adapter's gradient is smaller than a model's.
OPTIMIZER: dict[str, Any] = parity.OPTIMIZER | {"clip_grad": 0.02}
ADAPTER = {"rank": 4, "alpha": 6.0}
SCALE = ADAPTER["alpha"] / ADAPTER["rank"]
WITH_HEAD = ("all-linear", "lm_head")
SOME = ("q_proj", "v_proj", "down_proj")
#: By model: the layers with an adapter.
TARGETS = {
    "qwen2-tied": ("all-linear",),
    "qwen3-untied": WITH_HEAD,
    "qwen3-tied": SOME,
    # The first of two stages has none.
    "qwen2-untied": ("lm_head",),
    "qwen3-moe": WITH_HEAD,
    "qwen2-moe": ("all-linear",),
    "mixtral": ("all-linear",),
}
DENSE = ("qwen2-tied", "qwen3-untied", "qwen3-tied", "qwen2-untied")
#: By number of processes: layouts, each with its models. The key-value head of qwen3-tied is one for two ranks; the
#: last rank of qwen3-untied's output layer has padding.
LAYOUTS: dict[int, list[tuple[dict[str, Any], tuple[str, ...]]]] = {
    1: [({}, tuple(TARGETS)), (FULL, ("qwen2-tied",))],
    2: [
        ({"tensor": 2}, DENSE[:3]),
        (SP, ("qwen3-untied", "qwen2-moe")),
        ({"pipeline": 2}, ("qwen2-tied", "qwen3-moe", "qwen2-untied")),
        ({"pipeline": 2, "virtual_pipeline": 2}, ("qwen3-untied",)),
        ({"context": 2}, ("qwen2-tied",)),
        ({"expert": 2}, ("qwen3-moe", "qwen2-moe")),
        ({"expert_tensor": 2}, ("qwen3-moe",)),
        (SP | {"expert": 2, "expert_tensor": 1}, ("qwen3-moe",)),
    ],
    4: [({"tensor": 2}, ("qwen2-tied", "qwen3-tied")), ({"expert": 2, "expert_tensor": 2}, ("qwen3-moe",))],
}


@dataclass(frozen=True)
class Case:
    model: str
    processes: int
    layout: int

    @property
    def sections(self) -> dict[str, Any]:
        settings = LAYOUTS[self.processes][self.layout][0]
        parallel = {key: value for key, value in settings.items() if key != "recompute"}
        return {"parallel": parallel, "recompute": settings.get("recompute", {})}

    @property
    def name(self) -> str:
        sizes = [f"{key}={value}" for key, value in LAYOUTS[self.processes][self.layout][0].items()]
        return " ".join([self.model, f"{self.processes} processes", *sizes])


CASES = [
    Case(model, processes, number)
    for processes, layouts in LAYOUTS.items()
    for number, (_, models) in enumerate(layouts)
    for model in models
]


def config_of(path: Path, model: str, **sections: Any) -> Any:
    adapter = ADAPTER | {"targets": TARGETS[model]}
    return parity.run_config(path, parameters="adapter", adapter=adapter, optimizer=OPTIMIZER, **sections)


def start(name: str, factor: str, sizes: tuple[int, ...]) -> np.ndarray:
    """A whole factor to begin from: B is not zero, so that every factor has a gradient at once."""
    random = np.random.default_rng(list(f"{name}.{factor}".encode()))
    return random.normal(scale=0.05, size=sizes).astype(np.float32)


def begin(policy: Any) -> None:
    """Give each factor its part of `start`."""
    with torch.no_grad():
        for one in policy.network.adapter.all_factors():
            place, rank = one.place, ADAPTER["rank"]
            one.lora_A.copy_(torch.from_numpy(start(place.name, "A", (rank, place.inputs)))[:, slice(*place.columns)])
            held = torch.from_numpy(start(place.name, "B", (place.outputs, rank)))[slice(*place.rows)]
            one.lora_B[: len(held)] = held
    policy.weights_changed()


@dataclass
class Outcome:
    """What one rank found; `factors`: its parts with the places of their rows and columns."""

    log_probs: dict[int, np.ndarray]
    losses: list[float]
    norms: list[float]
    factors: dict[str, tuple[Any, np.ndarray, np.ndarray]]
    weights: dict[str, np.ndarray] | None
    frozen: bool
    elements: tuple[int, int]


def measure(
    world: Any, folder: Path, cases: list[Case], batches: dict[str, list]
) -> tuple[dict[Case, Outcome], Continued | None, dict[str, Exchanged]]:
    """Log-probs, and three updates, of every case in turn; two ranks save and load too. A scenario of `run_world`."""
    found = {case: measure_case(world, folder, case, batches[case.model]) for case in cases}
    if world.size != 2:
        return found, None, {}
    through = {model: exchanged(world, folder, model, batches[model][0]) for model in EXCHANGED}
    return found, saved(world, folder, batches), through


def measure_case(world: Any, folder: Path, case: Case, batches: list) -> Outcome:
    config = config_of(folder / case.model, case.model, **case.sections)
    with parity.policy_of(config, world) as policy:
        begin(policy)
        base = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
        mine = parity.share(batches[0], policy.grid)
        log_probs = policy.measure([batches[0][i] for i in mine])
        results = [parity.update(policy, parity.grpo(config), batch) for batch in batches]
        network = policy.network
        return Outcome(
            log_probs={} if log_probs is None else dict(zip(mine, log_probs, strict=True)),
            losses=[r.loss for r in results],
            norms=[r.grad_norm for r in results],
            factors=parts_of(policy),
            weights=parity.exported(policy, folder / "hf"),
            frozen=all(torch.equal(base[name], one) and one.grad is None for name, one in policy.named_parameters()),
            elements=(
                sum(
                    b.numel for w in policy.trained["policy"].wrapped for b in (*w.buffers, *w.expert_parallel_buffers)
                ),
                sum(one.numel() for one in network.adapter.parameters()),
            ),
        )


@dataclass
class Continued:
    """Three updates in one go, and the last one again from a checkpoint of the first two: by layout, the factors."""

    losses: dict[str, float]
    norms: dict[str, float]
    factors: dict[str, dict[str, tuple[Any, np.ndarray, np.ndarray]]]
    before: dict[str, tuple[Any, np.ndarray, np.ndarray]]
    reference: tuple[list[np.ndarray], list[np.ndarray]]
    weights: dict[str, np.ndarray] | None
    progress: dict[str, Any]
    refused: list[str]


def parts_of(policy: Any) -> dict[str, tuple[Any, np.ndarray, np.ndarray]]:
    return {
        one.place.name: (one.place, one.lora_A.detach().numpy().copy(), one.lora_B.detach().numpy().copy())
        for one in policy.network.adapter.all_factors()
    }


def saved(world: Any, folder: Path, batches: dict[str, list]) -> Continued:
    """An adapter of a mixture's is saved, and trained on under other layouts. A part of a scenario of `run_world`."""
    from megarl.policy import checkpoint

    model = "qwen3-moe"
    path = folder / model
    layouts = {"first": SP, "again": SP, "other": {"expert": 2}}
    found = Continued({}, {}, {}, {}, ([], []), None, {}, [])
    root = folder / "saved"

    def third(name: str, policy: Any) -> None:
        result = parity.update(policy, parity.grpo(policy.config), batches[model][2])
        found.losses[name], found.norms[name], found.factors[name] = result.loss, result.grad_norm, parts_of(policy)

    for name, layout in layouts.items():
        with parity.policy_of(config_of(path, model, parallel=layout), world) as policy:
            if name == "first":
                begin(policy)
                policy.keep("start", base=False)
                start_values = policy.measure(batches[model][0][:2])
                for batch in batches[model][:2]:
                    parity.update(policy, parity.grpo(policy.config), batch)
                found.reference = start_values or [], policy.measure(batches[model][0][:2], "start") or []
                checkpoint.save(policy, root, 2, {}, optimizer=True, keep=1)
                found.before = parts_of(policy)
                found.weights = parity.exported(policy, folder / "hf")
            else:
                found.progress = checkpoint.load(policy, checkpoint_folder.require(root, "resume"), optimizer=True)
            third(name, policy)
    step = checkpoint_folder.require(root, "resume")
    whole = parity.run_config(path)
    with parity.policy_of(whole, world) as policy:
        refuses(found, lambda: checkpoint.load(policy, step, optimizer=False))
        checkpoint.save(policy, folder / "whole", 1, {}, optimizer=True, keep=1)
        plain = parity.exported(policy, folder / "hf")
    of_whole = checkpoint_folder.require(folder / "whole", "resume")
    with parity.policy_of(config_of(path, model), world) as policy:
        refuses(found, lambda: checkpoint.load(policy, of_whole, optimizer=True))
        with torch.no_grad():
            policy.chunks[0].decoder.layers[0].self_attention.linear_qkv.weight[0, 0] += 1
        refuses(found, lambda: checkpoint.load(policy, step, optimizer=False))
        # All weights can be what an adapter is trained beside; alone they are a whole policy.
        begin(policy)
        checkpoint.load(policy, of_whole, optimizer=False)
        assert same(parity.exported(policy, folder / "hf"), plain)
        checkpoint.load(policy, step, optimizer=False)
        assert same(parity.exported(policy, folder / "hf"), found.weights)
    return found


#: By model: the layout that an adapter is written under, and the one that it is read under.
EXCHANGED = {
    "qwen3-untied": ({"tensor": 2}, {"pipeline": 2}),
    "qwen2-tied": (SP, {"context": 2}),
    "mixtral": (SP | {"expert": 2, "expert_tensor": 1}, {"expert_tensor": 2}),
    "qwen2-moe": ({"expert": 2}, {"pipeline": 2}),
}


@dataclass
class Exchanged:
    """An adapter's log-probs of a mini-batch's sequences as it is written, and its parts then and when it is read."""

    log_probs: dict[int, np.ndarray]
    written: dict[str, tuple[Any, np.ndarray, np.ndarray]]
    read: dict[str, tuple[Any, np.ndarray, np.ndarray]]
    refused: list[str]


def exchanged(world: Any, folder: Path, model: str, batch: list) -> Exchanged:
    """An adapter goes through PEFT's files. A part of a scenario of `run_world`."""
    from megarl.policy.adapter_files import load_adapter, save_adapter

    first, second = EXCHANGED[model]
    with parity.policy_of(config_of(folder / model, model, parallel=first), world) as policy:
        begin(policy)
        mine = parity.share(batch, policy.grid)
        log_probs = policy.measure([batch[i] for i in mine])
        save_adapter(policy, folder / f"{model}-adapter")
        written = parts_of(policy)
    with parity.policy_of(config_of(folder / model, model, parallel=second), world) as policy:
        refused = broken_files(world, policy, folder, model)
        load_adapter(policy, folder / f"{model}-adapter")
        found = {} if log_probs is None else dict(zip(mine, log_probs, strict=True))
        return Exchanged(found, written, parts_of(policy), refused)


#: By model: what is done to the tensors of its file, and a part of what is said.
BROKEN: dict[str, list[tuple[Any, str]]] = {
    "mixtral": [
        (
            lambda t: t["base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"].fill(1),
            "must have base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight zero where",
        ),
    ],
    "qwen3-untied": [
        (
            lambda t: t["base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"].fill(np.nan),
            "must be finite, and has NaN or infinity for model.layers.3.self_attn.q_proj",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.base_layer.weight": np.ones((97, 64), np.float32)}),
            "must have the output layer of this run's base as base_model.model.lm_head.base_layer.weight",
        ),
    ],
}


def broken_files(world: Any, policy: Any, folder: Path, model: str) -> list[str]:
    """What all ranks say of the model's adapter with its tensors changed."""
    import torch.distributed as dist
    from safetensors.numpy import save_file

    from megarl.policy.adapter_files import load_adapter

    said = []
    for number, (change, _) in enumerate(BROKEN.get(model, ())):
        copy = folder / f"{model}-broken-{number}"
        if world.is_first:
            shutil.copytree(folder / f"{model}-adapter", copy)
            tensors = parity.read_checkpoint(copy)
            change(tensors)
            save_file(tensors, copy / "adapter_model.safetensors")
        dist.barrier()
        with pytest.raises(Refusal) as caught:
            load_adapter(policy, copy)
        said.append(caught.value.rule)
    return said


def refuses(found: Continued, action: Any) -> None:
    with pytest.raises(Refusal) as caught:
        action()
    found.refused.append(str(caught.value))


def same(one: dict[str, np.ndarray] | None, other: dict[str, np.ndarray] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@dataclass
class Reference:
    log_probs: list[np.ndarray]
    losses: list[float]
    norms: list[float]
    factors: dict[str, tuple[np.ndarray, np.ndarray]]


def made_batches(path: Path) -> list:
    model = parity.transformers_model(path)
    plain = [parity.mini_batch(seed, temperatures=TEMPERATURES) for seed in range(UPDATES)]
    with torch.no_grad():
        values = [[parity.token_values(model, s)[0].numpy() for s in batch] for batch in plain]
    return [parity.with_old_log_probs(b, v, seed) for seed, (b, v) in enumerate(zip(plain, values, strict=True))]


def train_by_peft(path: Path, name: str, batches: list) -> Reference:
    """Three updates by PEFT on transformers, autograd and AdamW."""
    import peft

    base = parity.transformers_model(path)
    leaves = sorted({m.rpartition(".")[2] for m, one in base.named_modules() if isinstance(one, torch.nn.Linear)})
    wanted = set(TARGETS[name]) & set(leaves)
    targets = [*wanted] if "all-linear" not in TARGETS[name] else [*wanted, *(x for x in leaves if x != "lm_head")]
    settings = peft.LoraConfig(r=ADAPTER["rank"], lora_alpha=ADAPTER["alpha"], target_modules=targets)
    model = peft.get_peft_model(base, settings)
    trained: dict[str, dict[str, torch.nn.Parameter]] = {}
    for full, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, _, factor = (
                full.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".lora_")
            )
            trained.setdefault(layer, {})[factor] = parameter
            parameter.data.copy_(torch.from_numpy(start(layer, factor, tuple(parameter.shape))))
    parameters = [one for both in trained.values() for one in both.values()]
    rates: dict[str, Any] = {key: OPTIMIZER[key] for key in ("lr", "betas", "weight_decay")}
    optimizer = torch.optim.AdamW(parameters, eps=OPTIMIZER["epsilon"], **rates)
    with torch.no_grad():
        log_probs = [parity.token_values(model, s)[0].numpy() for s in batches[0]]
    losses, norms = [], []
    for batch in batches:
        optimizer.zero_grad()
        values = [parity.token_values(model, s) for s in batch]
        total = torch.stack([token_losses(*v, s).sum() for v, s in zip(values, batch, strict=True)]).sum()
        (total / sum(s.trained for s in batch)).backward()
        losses.append(float(total.detach()) / sum(s.trained for s in batch))
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER["clip_grad"])))
        optimizer.step()
    factors = {layer: (both["A"].detach().numpy(), both["B"].detach().numpy()) for layer, both in trained.items()}
    return Reference(log_probs, losses, norms, factors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for model in TARGETS:
        parity.write_model(folder, model)
    return folder


@pytest.fixture(scope="module")
def batches(folder: Path) -> dict[str, list]:
    return {model: made_batches(folder / model) for model in TARGETS}


@pytest.fixture(scope="module")
def worlds(folder: Path, batches: dict[str, list]) -> dict[int, list[Any]]:
    """What the ranks of each size found; one world of processes serves all cases of its size."""
    found: dict[int, list[Any]] = {}
    for processes in LAYOUTS:
        cases = [case for case in CASES if case.processes == processes]
        found[processes] = parity.run_world("test_adapter_layouts", "measure", processes, folder, cases, batches)
    return found


@pytest.fixture(scope="module")
def outcomes(worlds: dict[int, list[Any]]) -> dict[Case, list[Outcome]]:
    return {case: [rank[case] for rank, _, _ in worlds[case.processes]] for case in CASES}


@pytest.fixture(scope="module")
def continued(worlds: dict[int, list[Any]]) -> list[Continued]:
    return [one for _, one, _ in worlds[2]]


@pytest.fixture(scope="module")
def references(folder: Path, batches: dict[str, list], outcomes: dict[Case, list[Outcome]]) -> dict[str, Reference]:
    """PEFT's answers for dense models; for mixtures those of one process without a layout."""
    found = {name: train_by_peft(folder / name, name, batches[name]) for name in DENSE}
    for name in TARGETS.keys() - set(DENSE):
        (alone,) = outcomes[Case(name, 1, 0)]
        found[name] = Reference(
            [alone.log_probs[i] for i in range(len(batches[name][0]))],
            alone.losses,
            alone.norms,
            whole_factors([alone]),
        )
    return found


def whole_factors(ranks: list[Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every layer's A and B, put together of the ranks' parts; parts that several ranks have must agree bitwise."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for rank in ranks:
        for name, (place, a, b) in (rank.factors if isinstance(rank, Outcome) else rank).items():
            empty = (ADAPTER["rank"], place.inputs), (place.outputs, ADAPTER["rank"])
            if name not in found:
                found[name] = np.full(empty[0], np.nan, np.float32), np.full(empty[1], np.nan, np.float32)
            whole_a, whole_b = found[name]
            rows = slice(place.rows[0], min(place.rows[1], place.outputs))
            assert not b[rows.stop - rows.start :].any()
            for whole, own, part in ((whole_a, a, np.s_[:, slice(*place.columns)]), (whole_b, b, np.s_[rows, :])):
                own = own[: rows.stop - rows.start] if whole is whole_b else own
                assert np.isnan(whole[part]).all() or np.array_equal(whole[part], own), name
                whole[part] = own
    assert not any(np.isnan(one).any() for both in found.values() for one in both)
    return found


def by_case(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@by_case(CASES)
def test_an_adapter_trains_as_pefts_does(case: Case, outcomes: dict, references: dict):
    """Log-probs, losses and gradient norms, and every factor after three updates, by size and by what they changed."""
    ranks, reference = outcomes[case], references[case.model]
    seen = {index: values for rank in ranks for index, values in rank.log_probs.items()}
    for index, expected in enumerate(reference.log_probs):
        np.testing.assert_allclose(seen[index], expected, rtol=0, atol=1e-5)
    scale = max(map(abs, reference.losses))
    for rank in ranks:
        assert rank.losses == pytest.approx(reference.losses, rel=0, abs=1e-5 * scale)
        assert rank.norms == pytest.approx(reference.norms, rel=1e-5)
        assert rank.frozen
    assert all(norm > OPTIMIZER["clip_grad"] for norm in reference.norms), reference.norms
    found = whole_factors(ranks)
    assert found.keys() == reference.factors.keys()
    for name, both in reference.factors.items():
        for factor, ours, theirs in zip("AB", found[name], both, strict=True):
            change = np.linalg.norm(theirs - start(name, factor, theirs.shape))
            assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max(), f"{name}.{factor}"
            assert 0 < np.linalg.norm(ours - theirs) + 1e-12 < 1e-4 * change, f"{name}.{factor}"


@by_case(CASES)
def test_an_export_has_the_merged_weights(case: Case, folder: Path, outcomes: dict):
    """Where an adapter is the base's weight and the product; elsewhere the base's bits."""
    base, factors = parity.read_checkpoint(folder / case.model), whole_factors(outcomes[case])
    weights = outcomes[case][0].weights
    assert weights.keys() == base.keys()
    for name, held in weights.items():
        adapter = factors.get(name.removesuffix(".weight"))
        if adapter is None:
            assert np.array_equal(held, base[name]), name
        else:
            a, b = adapter
            np.testing.assert_allclose(held, base[name] + SCALE * (b @ a), rtol=0, atol=1e-6, err_msg=name)


@by_case([case for case in CASES if case.processes == 1])
def test_a_frozen_base_has_no_gradients_and_no_optimizer(case: Case, outcomes: dict):
    (alone,) = outcomes[case]
    in_buffers, in_adapter = alone.elements
    # Megatron pads every parameter to 64 elements, and every bucket.
    assert in_adapter <= in_buffers <= in_adapter + 64 * 2 * len(alone.factors) + 256


def test_an_adapter_goes_on_from_its_checkpoint(continued: list[Continued]):
    """Bit for bit under its layout, and to 1e-5 under another."""
    for rank in continued:
        assert rank.losses["again"] == rank.losses["first"] and rank.norms["again"] == rank.norms["first"]
        assert rank.losses["other"] == pytest.approx(rank.losses["first"], rel=1e-5)
        assert rank.norms["other"] == pytest.approx(rank.norms["first"], rel=1e-5)
        for name, (_, a, b) in rank.factors["first"].items():
            assert np.array_equal(a, rank.factors["again"][name][1]) and np.array_equal(
                b, rank.factors["again"][name][2]
            )
    first, other, before = (
        whole_factors(parts)
        for parts in (
            [rank.factors["first"] for rank in continued],
            [rank.factors["other"] for rank in continued],
            [rank.before for rank in continued],
        )
    )
    for name, both in first.items():
        for one, again, old in zip(both, other[name], before[name], strict=True):
            assert np.linalg.norm(one - again) < 1e-4 * np.linalg.norm(one - old), name


def test_a_kept_set_is_the_base_with_the_adapter_of_its_time(continued: list[Continued]):
    for rank in continued:
        then, kept = rank.reference
        assert len(then) == 2
        assert all(np.array_equal(*pair) for pair in zip(then, kept, strict=True))


def test_a_checkpoint_of_an_adapter_is_converted_merged(continued: list[Continued], folder: Path, tmp_path: Path):
    """With the base that it was trained beside, and no other."""
    saved_in, base = folder / "saved" / "step_000002", folder / "qwen3-moe"
    to_hf.convert(saved_in, tmp_path / "merged", Ranks(), hf_config=base)
    found, plain = (parity.read_checkpoint(one) for one in (tmp_path / "merged", base))
    wanted = continued[0].weights or {}
    assert found.keys() == wanted.keys() == plain.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-6, err_msg=name)
    assert sum(not np.array_equal(found[name], plain[name]) for name in found) > 20
    compared = compare.compare(tmp_path / "merged", saved_in)
    assert compared.problems == [] and compared.different == []
    file = next(iter(sorted(base.glob("*.safetensors"))))
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-4] + b"\0\0\x80?")
        with pytest.raises(Refusal, match=rf"holds an adapter of a base with the digest \w+, and {base} has another"):
            to_hf.convert(saved_in, tmp_path / "other", Ranks(), hf_config=base)
    finally:
        file.write_bytes(before)
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_an_adapter_is_of_its_settings_and_its_base(continued: list[Continued], folder: Path):
    rank = continued[0]
    facts = rank.progress["adapter"]
    assert (facts["rank"], facts["alpha"], facts["targets"]) == (4, 6.0, ["all-linear", "lm_head"])
    saved_in, whole = folder / "saved" / "step_000002", folder / "whole" / "step_000001"
    first, second, third = rank.refused
    assert first == (
        f"parameters=policy: needs all weights, and {saved_in} holds an adapter alone. Fix: set parameters=adapter and "
        "the adapter's settings, or use the run's merged model (hf/) as model.path."
    )
    assert second == (
        f"parameters=adapter: trains an adapter alone, and {whole} was saved by a run that trains all weights. Fix: "
        "set parameters=policy, or start a new run with model.weights set to it."
    )
    assert third.startswith(f"{saved_in} of an adapter: must be used with the weights that it was trained beside")
    progress = checkpoint_folder.read_progress(saved_in)
    settings = AdapterSettings(rank=4, alpha=6.0, targets=WITH_HEAD)
    checkpoint_folder.check_adapter(saved_in, progress, settings, True, resumes=True)
    for field, value, said in (
        ("rank", 5, "adapter.rank=5: differs from 4"),
        ("alpha", 6.5, "adapter.alpha=6.5: differs from 6"),
        ("targets", ("q_proj", "k_proj"), "adapter.targets=k_proj,q_proj: differs from all-linear,lm_head"),
    ):
        with pytest.raises(Refusal, match=f"^{said}, with which {saved_in} was trained. Fix: set it back, or"):
            checkpoint_folder.check_adapter(
                saved_in, progress, settings.model_copy(update={field: value}), True, resumes=True
            )


@pytest.mark.parametrize("model", EXCHANGED)
def test_peft_computes_what_the_policy_does_from_the_adapter_that_is_written(model: str, folder: Path, worlds: dict):
    """And another layout reads it as it was."""
    import peft

    ranks: list[Exchanged] = [through[model] for _, _, through in worlds[2]]
    written, read = (whole_factors([getattr(rank, name) for rank in ranks]) for name in ("written", "read"))
    for name, both in written.items():
        assert all(np.array_equal(*pair) for pair in zip(both, read[name], strict=True)), name
    for rank in ranks:
        for said, (_, wanted) in zip(rank.refused, BROKEN.get(model, ()), strict=True):
            assert said.startswith(wanted)
    with warnings.catch_warnings():
        # PEFT warns of tensors that it finds no place for.
        warnings.simplefilter("error", UserWarning)
        network = peft.PeftModel.from_pretrained(
            parity.transformers_model(folder / model), str(folder / f"{model}-adapter")
        )
    batch = made_batches(folder / model)[0]
    seen = {index: values for rank in ranks for index, values in rank.log_probs.items()}
    assert sorted(seen) == list(range(len(batch)))
    with torch.no_grad():
        for index, sequence in enumerate(batch):
            expected = parity.token_values(network, sequence)[0].numpy()
            np.testing.assert_allclose(seen[index], expected, rtol=0, atol=1e-5)
    with network.disable_adapter(), torch.no_grad():
        assert np.abs(parity.token_values(network, batch[1])[0].numpy() - seen[1]).max() > 1e-3
