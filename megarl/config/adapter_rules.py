"""Rules of an adapter's settings, and of what a run can do with an adapter alone. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from megarl.config.adapters import ALL_LINEAR, OUTPUT_LAYER, AdapterSettings, is_target, linears
from megarl.config.base import without_effect
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.errors import Refusal

#: Modules of the Hugging Face models with a weight that is no linear layer's, or one that every rank has whole.
WITHOUT_ADAPTER = (
    "embed_tokens",
    "norm",
    "input_layernorm",
    "post_attention_layernorm",
    "q_norm",
    "k_norm",
    "gate",
    "shared_expert_gate",
)


def refusals(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    """What cannot be asked of an adapter."""
    implied = Implied(config)
    if implied.adapter is None:
        names = tuple(AdapterSettings.model_fields)
        fix = "set parameters=adapter, or remove it"
        yield from without_effect(config.adapter, "adapter", names, f"with parameters={config.parameters}", fix)
        return
    yield from _targets(config.adapter, shape)
    yield from _rank(config.adapter, shape)
    yield from _experts(config.adapter, shape)
    if implied.base_is_frozen:
        beside = [f"the parameter set {name}" for name in implied.trained_sets]
        if config.algorithm.adapter_optimizer(config) is not None:
            beside.insert(0, "its base")
        if beside:
            yield Refusal(
                "parameters=adapter",
                f"trains one adapter, and algorithm.name={config.algorithm.name} trains {beside[0]} too",
                "remove it, or use an algorithm that trains the policy alone",
            )


def _targets(settings: AdapterSettings, shape: ModelShape) -> Iterator[Refusal]:
    names = [one.name for one in linears(shape)]
    for target in settings.targets:
        if target == ALL_LINEAR or any(is_target(name, [target]) for name in names):
            continue
        last = target.rpartition(".")[2]
        if last == OUTPUT_LAYER:
            rule = "takes no adapter: the output layer of this model is its embedding (tie_word_embeddings)"
        elif last in WITHOUT_ADAPTER:
            rule = "takes no adapter: norms, embeddings, routers and gates have none"
        else:
            rule = f"matches no linear layer of a {shape.family} model with this config.json"
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
        yield Refusal(f"adapter.targets={target}", rule, f"name some of {', '.join(leaves)}, or {ALL_LINEAR}")


def _rank(settings: AdapterSettings, shape: ModelShape) -> Iterator[Refusal]:
    targeted = [one for one in linears(shape) if is_target(one.name, settings.targets)]
    if not targeted:
        return
    smallest = min(targeted, key=lambda one: min(one.outputs, one.inputs))
    most = min(smallest.outputs, smallest.inputs)
    if settings.rank > most:
        yield Refusal(
            f"adapter.rank={settings.rank}",
            f"must not exceed the sizes of the matrices that it is for: {smallest.name.rpartition('.')[2]} is "
            f"{smallest.outputs} x {smallest.inputs}",
            f"use at most {most}, or leave it out of adapter.targets",
        )


def _experts(settings: AdapterSettings, shape: ModelShape) -> Iterator[Refusal]:
    """The experts' gate and up are one parameter to transformers, and one adapter in PEFT's files."""
    names = [one.name for one in linears(shape) if ".experts." in one.name]
    for gate, up, _ in [names] if names else []:
        found = [name.rpartition(".")[2] for name in (gate, up) if is_target(name, settings.targets)]
        if len(found) == 1:
            (other,) = {gate.rpartition(".")[2], up.rpartition(".")[2]} - set(found)
            yield Refusal(
                f"adapter.targets={','.join(settings.targets)}",
                f"has the experts' {found[0]} without their {other}: PEFT's files have both as one",
                f"add {other}, or remove {found[0]}",
            )
