"""Converted checkpoints in real policies: they load, answer as transformers does, and are what Megatron saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import test_conversion
import torch

from megarl.config.sections import ParallelSettings
from megarl.conversion import to_hf, to_megatron
from megarl.conversion.compare import compare
from megarl.conversion.ranks import Ranks
from megarl.formats import checkpoint_folder
from megarl.formats.megatron import DistributedCheckpoint
from megarl.reshard.boxes import whole

PROCESSES = 4
DENSE = {"tensor": 2, "pipeline": 2}
EXPERTS = DENSE | {"sequence": True, "expert": 2, "expert_tensor": 1}


def layout_of(model: str) -> dict[str, Any]:
    return EXPERTS if "moe" in model or "mixtral" in model else DENSE


def measure(world: Any, folder: Path, batch: list) -> dict[str, dict[int, np.ndarray]]:
    """Log-probs of this rank's sequences by every model's converted checkpoint, which is then saved again by Megatron.
    A scenario of `run_world`."""
    from megarl.policy import checkpoint

    found: dict[str, dict[int, np.ndarray]] = {}
    for model in sorted(parity.MODELS, key=lambda name: str(layout_of(name))):
        config = parity.run_config(folder / "hf" / model, parallel=layout_of(model))
        with parity.policy_of(config, world, weights=False) as policy:
            checkpoint.load(policy, folder / "megatron" / model, optimizer=False)
            mine = parity.share(batch, policy.grid)
            values = policy.measure([batch[index] for index in mine])
            found[model] = {} if values is None else dict(zip(mine, values, strict=True))
            checkpoint.save(policy, folder / "saved" / model, 1, {}, optimizer=False, keep=1)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model in Hugging Face's format and converted: hf/NAME, megatron/NAME."""
    folder = tmp_path_factory.mktemp("conversion")
    (folder / "megatron").mkdir()
    for model in parity.MODELS:
        source = parity.write_model(folder / "hf", model)
        to_megatron.convert(source, folder / "megatron" / model, ParallelSettings(**layout_of(model)), Ranks())
    return folder


@pytest.fixture(scope="module")
def batch() -> list:
    return parity.mini_batch(11)


@pytest.fixture(scope="module")
def measured(folder: Path, batch: list) -> list[dict[str, dict[int, np.ndarray]]]:
    return parity.run_world("test_conversion_policy", "measure", PROCESSES, folder, batch)


@pytest.mark.parametrize("model", parity.MODELS)
def test_log_probs_are_those_of_transformers(model: str, measured: list, folder: Path, batch: list):
    """Of the converted checkpoint under TP 2 x PP 2, mixtures also EP 2."""
    found: dict[int, np.ndarray] = {index: value for rank in measured for index, value in rank[model].items()}
    assert set(found) == set(range(len(batch)))
    network = parity.transformers_model(folder / "hf" / model)
    for index, sequence in enumerate(batch):
        with torch.no_grad():
            wanted = parity.token_values(network, sequence)[0].numpy()
        np.testing.assert_allclose(found[index], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", parity.MODELS)
def test_megatron_saves_the_same_tensors(model: str, measured: list, folder: Path):
    """Keys, shapes, types and bits of what a policy under TP 2 x PP 2 saves; and back from it to Hugging Face."""
    step = checkpoint_folder.require(folder / "saved" / model, "checkpoint")
    saved, converted = DistributedCheckpoint(step), DistributedCheckpoint(folder / "megatron" / model)
    assert saved.tensors == converted.tensors
    for key, (shape, _) in saved.tensors.items():
        assert torch.equal(saved.read(key, whole(shape)), converted.read(key, whole(shape))), key
        assert sorted(saved.boxes(key)) == sorted(converted.boxes(key)), key
    back = folder / "back" / model
    back.parent.mkdir(exist_ok=True)
    to_hf.convert(step, back, Ranks())
    wanted = parity.read_checkpoint(folder / "hf" / model)
    found = parity.read_checkpoint(back)
    assert set(found) == set(wanted) and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_the_comparison_finds_a_single_bit(folder: Path, tmp_path: Path):
    model = "qwen3-moe"
    same = compare(folder / "hf" / model, folder / "megatron" / model)
    assert not same.different and not same.problems and sum(kind.count for kind in same.kinds) == 77

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.experts.3.up_proj.weight"].view(torch.int32)[5, 7] ^= 1

    other = test_conversion.rewritten(folder / "hf" / model, tmp_path / "other", flip)
    found = compare(other, folder / "megatron" / model)
    assert found.different == ["model.layers.2.mlp.experts.3.up_proj.weight"]
    different = [kind for kind in found.kinds if kind.checksums[0] != kind.checksums[1]]
    assert [(kind.name, kind.count, len(kind.different)) for kind in different] == [
        ("model.layers.*.mlp.experts.*.up_proj.weight", 12, 1)
    ]


def test_the_comparison_lists_what_only_one_side_has(folder: Path, tmp_path: Path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.input_layernorm.weight"]
        tensors["score.weight"] = torch.ones(2, 64)
        tensors["model.norm.weight"] = torch.ones(63)

    other = test_conversion.rewritten(folder / "hf" / "qwen2-tied", tmp_path / "other", change)
    found = compare(other, folder / "megatron" / "qwen2-tied")
    assert [problem.split(" ")[0] for problem in found.problems] == [str(other), "model.norm.weight", "score.weight"]
    assert not found.different and sum(kind.count for kind in found.kinds) == 4 * 12 + 2 - 2
