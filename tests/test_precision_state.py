"""What a policy in FP8 keeps: histories in checkpoints, factors beside weights, FP8's values; what stays in bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import parity
import pytest
import torch
from safetensors import safe_open
from test_precision import MODELS, config_of, write_models

from megarl.conversion import to_hf
from megarl.conversion.ranks import Ranks
from megarl.formats import megatron
from megarl.formats.megatron import DistributedCheckpoint
from megarl.ops import fp8

DELAYED: dict[str, Any] = {"precision": "fp8-delayed", "fp8": {"amax_history_len": 3}}
TENSOR = {"parallel": {"tensor": 2}}
#: A run that is resumed under its own layout, by name: model and settings.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "tensorwise": (MODELS[0], {"precision": "fp8-tensorwise"} | TENSOR),
    "delayed": (MODELS[0], DELAYED | TENSOR),
    "blockwise": (MODELS[0], {"precision": "fp8-blockwise", "fp8": {"num_layers_at_end_in_bf16": 1}} | TENSOR),
    "weights in fp8": (MODELS[0], {"precision": "fp8-blockwise", "fp8": {"param": True}} | TENSOR),
    "adapter": (MODELS[0], DELAYED | TENSOR | {"parameters": "adapter", "adapter": {"rank": 4}}),
    "experts": (MODELS[1], DELAYED | {"parallel": {"expert": 2}}),
    "bf16": (MODELS[0], {"precision": "bf16"} | TENSOR),
}
#: Which of them is loaded by a policy of other settings.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("delayed", DELAYED | {"parallel": {"pipeline": 2}}),
    ("experts", DELAYED | {"parallel": {"pipeline": 2}}),
    ("bf16", DELAYED | TENSOR),
    ("delayed", DELAYED | TENSOR | {"fp8": {"amax_history_len": 4}}),
    ("delayed", {"precision": "bf16"} | TENSOR),
]
#: Log-probs near to those of the random models.
LIKELY = -float(np.log(97))


def batches() -> list[list]:
    """Four mini-batches with old log-probs."""
    made = [parity.mini_batch(seed) for seed in range(4)]
    flat = [[np.full(one.trained, LIKELY, np.float32) for one in batch] for batch in made]
    return [parity.with_old_log_probs(batch, values, seed=5) for batch, values in zip(made, flat, strict=True)]


def resume(world: Any, folder: Path) -> dict[str, Any]:
    """Saves, in `folder`/name, of every run after two updates and four, and in name-again of one that went on from the
    first; and of `OTHERS` right after they were loaded, with what loading said. A scenario of `run_world`."""
    from megarl.parallel import terminal
    from megarl.policy import checkpoint

    def save(policy: Any, name: str, step: int) -> None:
        checkpoint.save(policy, folder / name, step, {}, optimizer=True, keep=9)

    for name, (model, sections) in RUNS.items():
        config = config_of(folder, model, **sections, algorithm=parity.ALGORITHM)
        with parity.policy_of(config, world) as policy:
            for step, batch in enumerate(batches(), 1):
                parity.update(policy, parity.grpo(config), batch)
                if step in (2, 4):
                    save(policy, name, step)
        with parity.policy_of(config, world) as policy:
            checkpoint.load(policy, folder / name / "step_000002", optimizer=True)
            for batch in batches()[2:]:
                parity.update(policy, parity.grpo(config), batch)
            save(policy, f"{name}-again", 4)
    said: list[list[str]] = []
    for number, (name, sections) in enumerate(OTHERS):
        config = config_of(folder, RUNS[name][0], **sections, algorithm=parity.ALGORITHM)
        with parity.policy_of(config, world) as policy, mock.patch.object(terminal, "say") as say:
            # What another run has left in this policy is not the checkpoint's.
            parity.update(policy, parity.grpo(config), batches()[3])
            checkpoint.load(policy, folder / name / "step_000002", optimizer=True)
            said.append([call.args[0] for call in say.call_args_list])
            save(policy, f"other-{number}", 2)
    return {"said": said}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, by their keys."""
    found = DistributedCheckpoint(directory)
    return {key: found.read(key, tuple((0, side) for side in shape)) for key, (shape, _) in found.tensors.items()}


def scaling_of(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors_of(directory).items() if megatron.is_scaling(key)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("precision_state"))


@pytest.fixture(scope="module")
def said(folder: Path) -> list[list[str]]:
    return parity.run_world("test_precision_state", "resume", 2, folder)[0]["said"]


@pytest.mark.processes
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, folder: Path, said: list):
    whole, again = (tensors_of(folder / root / "step_000004") for root in (name, f"{name}-again"))
    assert set(whole) == set(again)
    assert not [key for key in whole if not torch.equal(whole[key], again[key])]


@pytest.mark.processes
def test_histories_are_in_checkpoints_by_layer_and_expert(folder: Path, said: list):
    layers = [f"decoder.layers.{number}." for number in range(4)]
    dense = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    found = scaling_of(folder / "delayed" / "step_000002")
    names = {
        f"{layer}{module}.scaling.{name}" for layer in layers for module in dense for name in ("history", "factors")
    }
    assert set(found) == names
    for key, tensor in found.items():
        assert (tensor[1:] > 0).all() if key.endswith("history") else (tensor != 1).all(), key
    # An adapter's run has the same of its base.
    assert set(scaling_of(folder / "adapter" / "step_000002")) == names
    experts = scaling_of(folder / "experts" / "step_000002")
    of_experts = {key: tensor for key, tensor in experts.items() if ".mlp.experts." in key}
    # Layer 1 is dense. Four experts, each with a history of its own.
    assert len(of_experts) == 3 * 2 * 2
    for key, tensor in of_experts.items():
        assert tensor.shape == ((4, 3, 3) if key.endswith("history") else (4, 3)), key
        assert len({tuple(expert.flatten().tolist()) for expert in tensor}) == 4, key
    assert any(".shared_experts." in key for key in experts)


@pytest.mark.processes
def test_histories_come_back_under_other_layouts_or_begin_anew(folder: Path, said: list):
    for number, name in ((0, "delayed"), (1, "experts")):
        found, saved = (scaling_of(folder / root / "step_000002") for root in (f"other-{number}", name))
        assert set(found) == set(saved) and all(torch.equal(found[key], saved[key]) for key in saved)
        assert said[number] == []
    for number, length in ((2, 3), (3, 4)):
        fresh = scaling_of(folder / f"other-{number}" / "step_000002")
        assert len(fresh) == 32
        for key, tensor in fresh.items():
            assert torch.equal(tensor, torch.zeros(length, 3) if key.endswith("history") else torch.ones(3)), key
        (words,) = said[number]
        assert words.startswith("step_000002 has no histories of FP8 amaxes that this run could continue: fp8-delayed")
    assert said[4] == [] and not scaling_of(folder / "other-4" / "step_000002")


def test_keys_of_scaling_are_told_from_others():
    scaling = ("decoder.layers.0.mlp.linear_fc1.scaling.history", "mlp.experts.linear_fc2.scaling12.factors")
    assert all(map(megatron.is_scaling, scaling))
    others = (
        "mlp.linear_fc1.weight",
        "mlp.linear_fc1.scaling.weight",
        "mlp.history",
        "mlp.scaling_up.factors",
        "x._extra_state",
    )
    assert not any(map(megatron.is_scaling, others))


@pytest.mark.processes
def test_conversion_leaves_histories_out(folder: Path, said: list, tmp_path: Path):
    """Dense, and with experts; the weights are the checkpoint's."""
    for name in ("delayed", "experts"):
        saved, out = folder / name / "step_000002", tmp_path / name
        to_hf.convert(saved, out, Ranks(), hf_config=folder / RUNS[name][0])
        with safe_open(next(out.glob("*.safetensors")), "pt") as file:
            assert not [key for key in file.keys() if "scaling" in key]  # noqa: SIM118
            found = file.get_tensor("model.layers.3.self_attn.o_proj.weight")
        assert torch.equal(found, tensors_of(saved)["decoder.layers.3.self_attention.linear_proj.weight"])


@pytest.mark.processes
def test_weights_in_fp8_have_fp8s_values(folder: Path, said: list):
    """And others, and those of the optimizer, do not."""
    found = tensors_of(folder / "weights in fp8" / "step_000004")
    rounded = {f"{m}.weight" for m in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")}
    for key, tensor in found.items():
        if tensor.dim() != 2 or key.startswith("optimizer.") or not key.endswith(".weight"):
            continue
        again = fp8.quantise_tiles(tensor, fp8.WEIGHT_TILE).dequantised().to(tensor.dtype)
        inside = any(key.endswith(name) for name in rounded)
        assert torch.equal(again, tensor) == inside, key
        main = found[f"optimizer.state.param.{key}"]
        assert not torch.equal(main, tensor.float()), key


def one_process(world: Any, folder: Path) -> dict[str, Any]:
    """What one policy shows. A scenario of `run_world`."""
    found: dict[Any, Any] = {"learned": {}}
    batch = [replace(one, advantages=np.ones(one.trained, np.float32)) for one in parity.mini_batch(0)]

    def likelihood(policy: Any) -> float:
        return float(np.concatenate(policy.measure(batch)).mean())

    for precision in ("fp32", *fp8.RECIPES):
        config = config_of(folder, MODELS[0], precision)
        with parity.policy_of(config, world) as policy:
            before = likelihood(policy)
            for _ in range(6):
                parity.update(policy, parity.grpo(config), batch)
            found["learned"][precision] = likelihood(policy) - before
    with parity.policy_of(config_of(folder, MODELS[0], **DELAYED), world) as policy:
        algorithm = parity.grpo(policy.config)
        parity.update(policy, algorithm, batch)
        then = policy.measure(batch)
        policy.keep("reference")
        for _ in range(2):
            parity.update(policy, algorithm, batch)
        found["kept"] = then, policy.measure(batch, "reference"), policy.measure(batch)
    for start, end in ((1, 2), (0, 0)):
        sections = {"fp8": {"num_layers_at_start_in_bf16": start, "num_layers_at_end_in_bf16": end}}
        with parity.policy_of(config_of(folder, MODELS[1], "fp8-blockwise", **sections), world) as policy:
            from megarl.policy.fp8_linear import Fp8Scaling

            named = policy.chunks[0].named_modules()
            found[start, end] = sorted(name for name, module in named if isinstance(module, Fp8Scaling))
    found["masters"] = [masters(world, folder, param) for param in (False, True)]
    found["adapter"] = with_and_without_adapter(world, folder, batch)
    return found


def masters(world: Any, folder: Path, param: bool) -> list[np.ndarray]:
    """The optimizer's own weights as a policy begins."""
    config = config_of(folder, MODELS[0], "fp8-blockwise", fp8={"param": param})
    with parity.policy_of(config, world) as policy:
        groups = [
            one for opt in policy.trained["policy"].optimizer.chained_optimizers for one in opt.optimizer.param_groups
        ]
        return [one.detach().float().numpy().copy() for group in groups for one in group["params"]]


def with_and_without_adapter(world: Any, folder: Path, batch: list) -> tuple[list, list, list]:
    """Log-probs of an adapter beside frozen weights, of these weights alone, and of the merged export."""
    from megarl.weights.export import export_hf

    sections = {"parameters": "adapter", "adapter": {"rank": 4}}
    with parity.policy_of(config_of(folder, MODELS[0], "fp8-blockwise", **sections), world) as policy:
        before = policy.measure(batch)
        for _ in range(3):
            parity.update(policy, parity.grpo(policy.config), batch)
        after = policy.measure(batch)
        export_hf(policy, folder / "merged", folder / MODELS[0])
    config = config_of(folder, "merged", "fp8-blockwise")
    with parity.policy_of(config, world) as policy:
        return before, after, policy.measure(batch)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return parity.run_world("test_precision_state", "one_process", 1, folder)[0]


@pytest.mark.processes
def test_each_recipe_learns(alone: dict):
    """Nats a token in six updates, beside fp32's."""
    exact = alone["learned"]["fp32"]
    assert exact > 0.1
    for recipe in fp8.RECIPES:
        assert alone["learned"][recipe] > 0.8 * exact, recipe


@pytest.mark.processes
def test_the_optimizer_begins_with_the_weights_as_they_were_read(alone: dict):
    """Those of the model are FP8's with fp8.param; its own are as fine as without."""
    without, given = alone["masters"]
    assert len(without) > 0
    assert all(np.array_equal(one, other) for one, other in zip(without, given, strict=True))


@pytest.mark.processes
def test_weights_that_are_kept_keep_their_factors(alone: dict):
    then, kept, now = alone["kept"]
    assert all(np.array_equal(one, other) for one, other in zip(then, kept, strict=True))
    assert not any(np.array_equal(one, other) for one, other in zip(then, now, strict=True))


@pytest.mark.processes
def test_decoder_layers_linear_layers_are_in_fp8_and_nothing_else(alone: dict):
    dense = ("mlp.linear_fc1", "mlp.linear_fc2")
    shared = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
    experts = tuple(f"mlp.experts.{layer}.scaling{n}" for layer in ("linear_fc1", "linear_fc2") for n in range(4))
    attention = ("self_attention.linear_proj", "self_attention.linear_qkv")

    def of_layer(number: int) -> list[str]:
        whole = (*attention, *(dense if number == 1 else shared))
        own = [f"{name}.scaling" for name in whole] + list(() if number == 1 else experts)
        return [f"decoder.layers.{number}.{name}" for name in own]

    assert alone[0, 0] == sorted(name for number in range(4) for name in of_layer(number))
    assert alone[1, 2] == sorted(of_layer(1))


@pytest.mark.processes
def test_an_adapter_is_computed_with_as_merged(alone: dict):
    before, after, merged = alone["adapter"]
    assert all(np.array_equal(one, other) for one, other in zip(after, merged, strict=True))
    assert not any(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
