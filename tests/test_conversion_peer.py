"""The same checkpoint through another project's mapping: mbridge makes the same Megatron tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch

from megarl.config.sections import ParallelSettings
from megarl.conversion import to_megatron
from megarl.conversion.ranks import Ranks
from megarl.formats.megatron import DistributedCheckpoint
from megarl.reshard.boxes import whole

pytest.importorskip("mbridge", reason="mbridge is not installed")

#: What mbridge 0.15.1 knows of. Tied models last: one that it has seen ties all of its family that come after it.
MODELS = sorted(
    (name for name in parity.MODELS if not name.startswith("mistral")), key=lambda name: parity.MODELS[name].tied
)
#: Keys of stacked experts, which mbridge names one by one.
EXPERTS = ("mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight")


def peer(world: Any, folder: Path, wanted: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, dict[str, np.ndarray]]:
    """mbridge's tensors by Megatron's keys, of those keys and shapes. A scenario of `run_world`."""
    from mbridge import AutoBridge

    from megarl.parallel.groups import form_grid

    form_grid(ParallelSettings(), 1)
    found: dict[str, dict[str, np.ndarray]] = {}
    for model, shapes in wanted.items():
        bridge: Any = AutoBridge.from_pretrained(str(folder / "hf" / model), dtype=torch.float32)

        checkpoint = {
            name: torch.from_numpy(value) for name, value in parity.read_checkpoint(folder / "hf" / model).items()
        }

        def made(name: str, bridge: Any = bridge, checkpoint: dict[str, Any] = checkpoint) -> np.ndarray:
            names = bridge._weight_name_mapping_mcore_to_hf(name)
            return bridge._weight_to_mcore_format(name, [checkpoint[one] for one in names]).numpy()

        found[model] = {
            key: np.stack([made(f"{key.replace('.experts.experts.', '.experts.')}{e}") for e in range(shape[0])])
            if key.endswith(EXPERTS)
            else made(key)
            for key, shape in shapes.items()
        }
    return found


def test_mbridge_makes_the_same_tensors(tmp_path: Path):
    ours: dict[str, DistributedCheckpoint] = {}
    for model in MODELS:
        # mbridge knows no dense layers among those of experts.
        sizes: dict[str, Any] = {"mlp_only_layers": []} if "-moe" in model else {}
        source = parity.write_model(tmp_path / "hf", model, **sizes)
        to_megatron.convert(source, tmp_path / model, ParallelSettings(), Ranks())
        ours[model] = DistributedCheckpoint(tmp_path / model)
    shapes = {
        model: {key: shape for key, (shape, _) in checkpoint.tensors.items()} for model, checkpoint in ours.items()
    }
    [theirs] = parity.run_world("test_conversion_peer", "peer", 1, tmp_path, shapes)
    for model, checkpoint in ours.items():
        assert set(theirs[model]) == set(checkpoint.tensors)
        for key, wanted in theirs[model].items():
            found = checkpoint.read(key, whole(checkpoint.tensors[key][0])).numpy()
            # The padding of the vocabulary is ours; theirs has none before it is cut.
            assert np.array_equal(found[: len(wanted)], wanted), (model, key)
            assert len(found) == len(wanted) or not found[len(wanted) :].any()
