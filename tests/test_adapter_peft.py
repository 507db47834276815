"""PEFT's files: what PEFT made is read for every family, what megarl would misunderstand is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch
from config_case import MODEL
from safetensors.numpy import load_file, save_file

from megarl.config.adapters import AdapterSettings
from megarl.config.load import load_config
from megarl.config.model_shape import read_model_shape
from megarl.errors import Refusal
from megarl.formats import peft as files
from megarl.reshard.adapter_map import adapters_of
from megarl.train import admission

RANK, ALPHA = 4, 6.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: Model -> PEFT's target modules and parameters, and megarl's targets of the same.
MADE: dict[str, tuple[tuple[str, ...], list[str], tuple[str, ...]]] = {
    "qwen2-tied": (DENSE, [], ("all-linear",)),
    "qwen3-untied": ((*DENSE, "lm_head"), [], ("all-linear", "lm_head")),
    "llama-llama3": (("q_proj", "down_proj"), [], ("q_proj", "down_proj")),
    "mistral-yarn": (DENSE, [], ("all-linear",)),
    # PEFT takes the names of its dense layer's MLP for the experts'.
    "qwen3-moe": (ATTENTION, STACKED, (*ATTENTION, "experts.gate_proj", "experts.up_proj", "experts.down_proj")),
    "qwen2-moe": (DENSE, STACKED, ("all-linear",)),
    "mixtral": (ATTENTION, STACKED, ("all-linear",)),
}


def made_by_peft(path: Path, out: Path, modules: tuple[str, ...], parameters: list[str], **settings: Any) -> Any:
    """PEFT's model on transformers with a random adapter, which is saved to `out`."""
    import peft

    chosen: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": [*modules]} | settings
    if parameters:
        chosen["target_parameters"] = parameters
    model = peft.get_peft_model(parity.transformers_model(path), peft.LoraConfig(**chosen))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(str(out))
    return model


@pytest.mark.parametrize("name", MADE)
def test_an_adapter_that_peft_made_changes_weights_as_peft_merges_it(name: str, tmp_path: Path):
    modules, parameters, targets = MADE[name]
    path = parity.write_model(tmp_path, name)
    model = made_by_peft(path, tmp_path / "made", modules, parameters)
    settings = AdapterSettings(rank=RANK, alpha=ALPHA, targets=targets)
    found = files.open_adapter(tmp_path / "made", settings, read_model_shape(path))
    stored = load_file(tmp_path / "made" / files.TENSORS)
    base, merged = parity.read_checkpoint(path), parity.checkpoint_of(model.merge_and_unload())
    for tensor, value in merged.items():
        if (parts := found.parts.get(tensor.removesuffix(".weight"))) is None:
            assert np.array_equal(value, base[tensor]), tensor
        else:
            a, b = (stored[part.tensor][part.rows, part.columns] for part in parts)
            np.testing.assert_allclose(value, base[tensor] + ALPHA / RANK * (b @ a), rtol=0, atol=1e-5, err_msg=tensor)


@pytest.mark.parametrize("name", MADE)
def test_peft_merges_an_adapter_that_was_written_as_its_factors_say(name: str, tmp_path: Path):
    """And it is read again as it was written."""
    import peft

    path, targets = parity.write_model(tmp_path, name), MADE[name][2]
    shape, settings = read_model_shape(path), AdapterSettings(rank=RANK, alpha=ALPHA, targets=targets)
    sizes, places = files.written(shape, settings)
    random = np.random.default_rng(1)
    tensors = {tensor: np.zeros(dims, np.float32) for tensor, dims in sizes.items()}
    factors: dict[str, list[np.ndarray]] = {}
    for layer, parts in places.parts.items():
        factors[layer] = []
        for part in parts:
            own = tensors[part.tensor][part.rows, part.columns]
            assert not own.any()
            own[:] = random.normal(scale=0.2, size=own.shape)
            factors[layer].append(own.copy())
    out = tmp_path / "written"
    out.mkdir()
    save_file(tensors, out / files.TENSORS, {"format": "pt"})
    (out / files.CONFIG).write_text(json.dumps(files.config_of(settings, shape, str(path))))
    with warnings.catch_warnings():
        # PEFT warns of tensors that it finds no place for.
        warnings.simplefilter("error", UserWarning)
        merged = parity.checkpoint_of(
            peft.PeftModel.from_pretrained(parity.transformers_model(path), str(out)).merge_and_unload()
        )
    base = parity.read_checkpoint(path)
    for tensor, value in merged.items():
        expected = base[tensor]
        if (both := factors.get(tensor.removesuffix(".weight"))) is not None:
            expected = expected + ALPHA / RANK * (both[1] @ both[0])
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5, err_msg=tensor)
    found = files.open_adapter(out, settings, shape)
    assert found.parts == places.parts
    # Gate and up have blocks of their own, and zeros elsewhere.
    fused = [layer for layer in factors if ".experts." in layer and not layer.endswith(("down_proj", "w2"))]
    assert found.zeros.keys() == set(fused)
    assert not any(tensors[part.tensor][part.rows, part.columns].any() for part in found.zeros.values())


def changed(folder: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    config = json.loads((folder / files.CONFIG).read_text())
    tensors = load_file(folder / files.TENSORS)
    change(config, tensors)
    (folder / files.CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / files.TENSORS)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NOT_COMPUTED = (
    "is a kind of LoRA that megarl does not compute with: one rank and scale for all layers, no more. Fix: use an "
    "adapter without it."
)
#: What is done to an adapter's configuration and tensors, and what is said of it.
BROKEN: list[tuple[Callable[[dict[str, Any], dict[str, np.ndarray]], Any], str]] = [
    (
        lambda c, t: c.update(peft_type="LOHA"),
        "peft_type=LOHA in made/adapter_config.json: must be LORA. Fix: use an adapter of LoRA.",
    ),
    (
        lambda c, t: c.update(r=8),
        "adapter.rank=4: differs from r=8 in made/adapter_config.json. Fix: set adapter.rank=8.",
    ),
    (
        lambda c, t: c.update(lora_alpha=16),
        "adapter.alpha=6: differs from lora_alpha=16 in made/adapter_config.json. Fix: set adapter.alpha=16.",
    ),
    (lambda c, t: c.update(use_dora=True), f"use_dora=true in made/adapter_config.json: {NOT_COMPUTED}"),
    (lambda c, t: c.update(use_rslora=True), f"use_rslora=true in made/adapter_config.json: {NOT_COMPUTED}"),
    (lambda c, t: c.update(bias="all"), f'bias="all" in made/adapter_config.json: {NOT_COMPUTED}'),
    (
        lambda c, t: c.update(rank_pattern={"q_proj": 2}),
        f'rank_pattern={{"q_proj": 2}} in made/adapter_config.json: {NOT_COMPUTED}',
    ),
    (
        lambda c, t: c.update(modules_to_save=["lm_head"]),
        f'modules_to_save=["lm_head"] in made/adapter_config.json: {NOT_COMPUTED}',
    ),
    (
        lambda c, t: c.update(init_lora_weights="pissa"),
        "init_lora_weights=pissa in made/adapter_config.json: changes the base's weights too, and this run has them as "
        "they are. Fix: convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion.",
    ),
    (
        lambda c, t: t.pop(Q_PROJ),
        f"made/adapter_model.safetensors without {Q_PROJ}: must have the factors of every layer in adapter.targets. "
        "Fix: set adapter.targets to the layers that it was made for.",
    ),
    (
        lambda c, t: t.update({Q_PROJ: t[Q_PROJ][:, 1:].copy()}),
        f"{Q_PROJ} of shape (4, 63) in made/adapter_model.safetensors: must have shape (4, 64) by config.json and "
        "adapter.rank. Fix: use the adapter of this base model.",
    ),
    (
        lambda c, t: t.update(extra=np.zeros(3, np.float32)),
        "extra in made/adapter_model.safetensors: is of no layer in adapter.targets. Fix: add its layer to "
        "adapter.targets, or use the adapter of this base model.",
    ),
    (
        lambda c, t: c.pop("r"),
        "made/adapter_config.json: must be PEFT's configuration of a LoRA adapter, in JSON. Fix: save the adapter "
        "again with PEFT, or copy its folder again.",
    ),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the model that `run_file` names."""
    folder = tmp_path_factory.mktemp("peft")
    (folder / "model").mkdir()
    import transformers

    config = transformers.Qwen2Config(**{key: value for key, value in MODEL.items() if key != "model_type"})
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    made_by_peft(folder / "model", folder / "made", ("q_proj", "up_proj"), [])
    return folder / "made"


def refusals(run_file: Path, *overrides: str) -> list[str]:
    given = ["parameters=adapter", "adapter.rank=4", "adapter.alpha=6", "adapter.targets=[q_proj,up_proj]"]
    config = load_config(run_file, [*given, "adapter.path=made", *overrides])
    return [str(one) for one in admission.refusals(config, trains=True)]


def test_an_adapter_to_begin_from_passes(run_file: Path, made: Path):
    shutil.copytree(made, "made")
    assert refusals(run_file) == []


@pytest.mark.parametrize(("change", "said"), BROKEN, ids=[re.sub(r"[^\w=.]+", "_", said)[:60] for _, said in BROKEN])
def test_what_is_no_adapter_of_the_run_is_refused(run_file: Path, made: Path, change: Any, said: str):
    shutil.copytree(made, "made")
    changed(Path("made"), change)
    assert refusals(run_file) == [said]


def test_files_that_are_missing_or_cut_short_are_refused(run_file: Path, made: Path):
    again = "Fix: save the adapter again with PEFT, or copy its folder again."
    assert refusals(run_file) == [
        "adapter.path=made: must be a folder with PEFT's adapter_config.json and adapter_model.safetensors. Fix: "
        "correct the path."
    ]
    shutil.copytree(made, "made")
    tensors = Path("made", files.TENSORS)
    whole = tensors.read_bytes()
    for broken in (whole[:-1], whole[:40], whole[:3], b""):
        tensors.write_bytes(broken)
        assert refusals(run_file) == [f"made/{files.TENSORS}: is cut short or not a safetensors file. {again}"]
    tensors.unlink()
    assert refusals(run_file) == [f"adapter.path=made: must hold {files.TENSORS}. {again}"]


def test_an_adapter_of_more_layers_than_the_targets_is_refused(run_file: Path, made: Path):
    shutil.copytree(made, "made")
    (said,) = refusals(run_file, "adapter.targets=[q_proj]")
    assert "mlp.up_proj.lora_A.weight in made/adapter_model.safetensors: is of no layer in adapter.targets" in said


def test_the_configuration_that_is_written_names_its_layers(tmp_path: Path):
    path = parity.write_model(tmp_path, "mixtral")
    shape = read_model_shape(path)
    settings = AdapterSettings(rank=2, alpha=3.0, targets=("all-linear", "lm_head"))
    config = files.config_of(settings, shape, str(path))
    assert config["target_modules"] == ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert (config["r"], config["lora_alpha"], config["bias"]) == (2, 3, "none")
    with pytest.raises(Refusal):
        files.open_adapter(tmp_path, settings, shape)


def test_an_adapter_with_every_experts_own_names_is_read(tmp_path: Path):
    """As PEFT wrote them before experts were stacked."""
    path = parity.write_model(tmp_path, "mixtral")
    shape, settings = read_model_shape(path), AdapterSettings(rank=2, alpha=3.0, targets=("w1", "w2", "w3"))
    tensors = {
        files.tensor_name(layer, factor): np.zeros(dims, np.float32)
        for layer, (outputs, inputs) in adapters_of(shape, settings.targets).items()
        for factor, dims in (("lora_A", (2, inputs)), ("lora_B", (outputs, 2)))
    }
    (tmp_path / files.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    save_file(tensors, tmp_path / files.TENSORS)
    found = files.open_adapter(tmp_path, settings, shape)
    assert {part.tensor for both in found.parts.values() for part in both} == tensors.keys() and not found.zeros
