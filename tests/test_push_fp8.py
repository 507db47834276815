"""Engines in FP8 blocks: the push against vLLM's own loader of an FP8 checkpoint, and the numbers they compute with
against a plain forward pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import test_push
import torch

from megarl.config.quantisation import BLOCK_FP8

#: Of whole blocks where tensor parallelism of 2 cuts, and where vLLM fuses.
SIZES = {
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 130,
}
#: vLLM's Qwen2 takes the heads' size from hidden_size; that of others need not be of whole blocks.
HIDDEN = {"qwen2-tied": 256, "qwen2-moe": 256, "qwen3-untied": 224, "qwen3-moe": 224, "mixtral": 224}
EXPERTS = {
    "qwen2-moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3-moe": {"moe_intermediate_size": 128},
}
#: Processes, engine, cases (model, number of a layout), layouts.
WORLDS: tuple[tuple[int, dict[str, Any], list[tuple[str, int]], list[dict[str, Any]]], ...] = (
    (
        4,
        {"tensor": 2, "precision": "fp8"},
        [("qwen3-untied", 0), ("qwen2-tied", 1)],
        [{"tensor": 2, "pipeline": 2}, {"pipeline": 2}],
    ),
    (
        2,
        {"tensor": 2, "precision": "fp8", "expert_parallel": True},
        [("qwen3-moe", 0), ("mixtral", 1)],
        [{"expert": 2}, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}],
    ),
    (2, {"tensor": 2, "precision": "fp8"}, [("qwen2-moe", 0)], [{"tensor": 2, "sequence": True}]),
)
UPDATES = 2


def write_model(folder: Path, model: str) -> Path:
    """With weights so small that a rounding is not blown up from layer to layer."""
    sizes = SIZES | EXPERTS.get(model, {}) | {"hidden_size": HIDDEN[model], "vocab_size": 130}
    return parity.write_model(folder, model, deviation=0.03, **sizes)


@pytest.mark.parametrize("number", range(len(WORLDS)))
def test_engine_holds_what_vllm_loads_from_an_fp8_checkpoint(tmp_path: Path, number: int):
    """Values and scales bitwise, of dense models and mixtures, adapters merged; and so are its answers."""
    processes, engine, cases, layouts = WORLDS[number]
    for model, _ in cases:
        write_model(tmp_path, model)
    ranks = parity.run_world("test_push", "pushes", processes, tmp_path, engine, cases, layouts, UPDATES)
    test_push.check(ranks, set(cases), UPDATES, gap=0.3)
    for case in cases:
        gaps = [
            np.abs(values - outcome.completions[index].log_probs)
            for rank in ranks
            for outcome in rank[case][0]
            for index, values in outcome.log_probs.items()
        ]
        # Log-probs of other weights' tokens are some 0.5 nats apart.
        assert np.mean(np.concatenate(gaps)) < 0.05, case
    for rank in ranks:
        for rounds, _, _ in rank.values():
            held = rounds[-1].engine
            scales = {name for name in held if name.endswith("_scale_inv")}
            assert len(scales) >= 8
            for name in scales:
                # What the CPU multiplies with is what the values stand for, experts among it.
                values, dense = held[name.removesuffix("_scale_inv")], held.get(f"{name[:-10]} (packed)")
                assert np.frexp(held[name])[0].tolist() == np.full(held[name].shape, 0.5).tolist()
                if dense is not None:
                    tiles = held[name].repeat(128, -2).repeat(128, -1)[..., : values.shape[-2], : values.shape[-1]]
                    assert np.array_equal(dense, values * tiles), name


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as vLLM quantises them on Hopper: rows of 128, power-of-two scales; written out here once more."""
    rows, length = x.reshape(-1, x.shape[-1]), x.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, -length % 128)).float().view(len(rows), -1, 128)
    scales = torch.exp2(torch.ceil(torch.log2(padded.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448)))
    values = (padded / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales
    return values.view(len(rows), -1)[:, :length].reshape(x.shape).to(x.dtype)


class RoundedProducts(torch.overrides.TorchFunctionMode):
    """Products with weights in given memory see rounded activations."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.memory = {one.untyped_storage().data_ptr() for one in weights}
        self.seen = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear and args[1].untyped_storage().data_ptr() in self.memory:
            self.seen += 1
            args = rounded(args[0]), *args[1:]
        return function(*args, **(kwargs or {}))


def plain_log_probs(path: Path, answers: list[Any]) -> list[np.ndarray]:
    """Log-probs of the answers' tokens by transformers in bf16, with the weights that FP8 values stand for, and
    activations rounded."""
    from megarl.ops.fp8 import quantise_weight

    model = parity.transformers_model(path)
    quantised = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers keeps experts in stacks, gate and up in one.
            if not name.endswith(("_proj.weight", "gate_up_proj", "experts.down_proj")):
                continue
            quantised.append(name)
            matrices = parameter if parameter.dim() == 3 else parameter[None]
            for matrix in matrices:
                for half in matrix.chunk(2) if name.endswith("gate_up_proj") else [matrix]:
                    half.copy_(quantise_weight(half).dequantised())
        model = model.bfloat16().eval()
        mode = RoundedProducts([model.get_parameter(name) for name in quantised])
        found = []
        with mode:
            for prompt, answer in answers:
                tokens = torch.tensor([[*prompt, *answer.token_ids]])
                logits = model(tokens).logits[0, len(prompt) - 1 : -1].float()
                chosen = torch.tensor(answer.token_ids)[:, None]
                found.append(logits.log_softmax(-1).gather(1, chosen)[:, 0].numpy())
    assert mode.seen
    return found


def answers_of(world: Any, folder: Path, model: str) -> tuple[list[Any], dict[str, float], list[str]]:
    """What an engine that an fp32 policy has filled answers, with its log-probs; how far its layers' products are from
    those by hand, relative to bf16's rounding; and what is said of changed weights. A scenario of `run_world`."""
    from megarl.rollout.weights import EngineWeights
    from megarl.weights.push import Push

    # A checkpoint in FP8 that a policy starts from, and a bf16 engine of it.
    whole = test_push.engine_of(test_push.config_for(folder / "stated", {}, {"precision": "bf16"}), world)
    assert {slot.dtype for slot in EngineWeights(whole).tensors().values()} == {torch.bfloat16}
    config = test_push.config_for(folder / model, {}, {"precision": "fp8"})
    engine = test_push.engine_of(config, world)
    engine.sleep()
    with parity.policy_of(config, world) as policy:
        push = Push(policy, engine)
        engine.wake_weights()
        push.run(checked=True)
        assert not push.differences()
        engine.wake_cache()
        answers = test_push.generate(engine, policy.shape.vocab_size)
        push.check()
        network = engine.call_worker(lambda worker: worker.get_model())
        errors = dict(products(network))
        said = changes(push, network)
    return answers, errors, said


def changes(push: Any, network: Any) -> list[str]:
    """What a push says of one element that a kernel multiplies with, of all of them in other memory, and of one value
    with the other sign, which must differ by twice the weight."""
    from megarl.weights.push import EngineChanged

    layers = [layer for _, layer in network.named_modules() if hasattr(layer, "w2_weight_scale_inv")]
    said = []
    for layer in layers[-1:]:
        stacks = layer.cpu_linear
        stacks[1][2, 3, 4] *= -1
        with pytest.raises(EngineChanged) as caught:
            push.check()
        stacks[1][2, 3, 4] *= -1
        push.check()
        layer.cpu_linear = tuple(one.clone() for one in stacks)
        said += [str(caught.value), *push.engine_weights.changed()]
        layer.cpu_linear = stacks
    for path, layer in [one for one in network.named_modules() if hasattr(one[1], "weight_scale_inv")][-1:]:
        weight = float(numbers(layer.weight, layer.weight_scale_inv)[3, 4])
        assert weight
        layer.weight.view(torch.uint8)[3, 4] ^= 128
        (found,) = push.differences()
        assert found.largest == 2 * abs(weight) and found.name.startswith(path), found
    return said


def products(network: Any) -> Any:
    """Each quantised layer's error, of random inputs."""
    drawn = torch.Generator().manual_seed(1)
    for path, layer in network.named_modules():
        if hasattr(layer, "weight_scale_inv"):
            x = torch.randn(5, layer.weight.shape[1], generator=drawn).bfloat16()
            wanted = rounded(x).float() @ numbers(layer.weight, layer.weight_scale_inv).T
            yield path, error(layer.quant_method.apply(layer, x), wanted)
        elif hasattr(layer, "w13_weight_scale_inv"):
            x = torch.randn(5, layer.w13_weight.shape[2], generator=drawn).bfloat16()
            chosen = torch.tensor([[0, 1], [1, 2], [3, 2], [0, 3], [2, 0]], dtype=torch.int32)
            shares = torch.rand(5, 2, generator=drawn)
            wanted = torch.zeros(x.shape)
            for expert in range(4):
                w13, w2 = (
                    numbers(getattr(layer, name)[expert], getattr(layer, f"{name}_scale_inv")[expert])
                    for name in ("w13_weight", "w2_weight")
                )
                tokens, places = (chosen == expert).nonzero(as_tuple=True)
                # In bf16, as what is next to a border of FP8 would fall to its other side.
                gate, up = torch.nn.functional.linear(rounded(x)[tokens], w13.bfloat16()).chunk(2, dim=-1)
                made = rounded(torch.nn.functional.silu(gate) * up).float() @ w2.T
                # Rounded once.
                wanted[tokens] += (shares[tokens, places, None] * made).bfloat16()
            yield path, error(layer.quant_method.apply(layer, x, shares, chosen, None, None), wanted.bfloat16())


def numbers(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    tiles = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values.float() * tiles[: values.shape[0], : values.shape[1]]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in units of bf16's rounding of the largest number."""
    return float((found.float() - wanted).abs().max() / wanted.abs().max()) * 2**8


def gap(answers: list[Any], log_probs: list[np.ndarray]) -> float:
    """Mean difference from the engine's log-probs, in nats per token."""
    pairs = zip(answers, log_probs, strict=True)
    return float(np.mean(np.concatenate([np.abs(np.array(one.log_probs) - plain) for (_, one), plain in pairs])))


@pytest.mark.parametrize("model", ["qwen2-tied", "qwen3-moe"])
def test_engine_computes_with_what_values_stand_for(tmp_path: Path, model: str):
    """Its products are those with dequantised weights and activations that were rounded before, and its log-probs
    transformers' in bf16 with such products."""
    path = write_model(tmp_path, model)
    shutil.copytree(path, tmp_path / "stated")
    stated = json.loads((path / "config.json").read_text()) | {"quantization_config": BLOCK_FP8}
    (tmp_path / "stated" / "config.json").write_text(json.dumps(stated))
    ((answers, errors, said),) = parity.run_world("test_push_fp8", "answers_of", 1, tmp_path, model)
    assert len(errors) >= 8
    for layer, one in errors.items():
        # Of experts all that is rounded is rounded above too: none falls to the other side of a bf16 number.
        assert one < (0.5 if layer.endswith("experts") else 1), layer
    if model == "qwen3-moe":
        assert "down_proj.weight (by up to " in said[0]
        assert {name.rpartition(".")[2] for name in said[1:]} >= {"w13_weight", "w2_weight"}
    assert gap(answers, plain_log_probs(path, answers)) < 0.03
