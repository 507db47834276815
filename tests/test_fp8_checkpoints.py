"""FP8 checkpoints of Hugging Face's format: published ones are read as transformers reads them, or refused; those that
are written are what vLLM's format says."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear

from megarl.config.files import checkpoint_refusals
from megarl.config.model_shape import model_shape_from_hf
from megarl.config.sections import ParallelSettings
from megarl.conversion import to_hf, to_megatron
from megarl.conversion.ranks import Ranks
from megarl.errors import Refusal
from megarl.formats.huggingface import HfCheckpoint
from megarl.reshard.boxes import whole
from megarl.reshard.fp8_map import quantised_weights, quantization_config

#: Several blocks in both directions, and smaller ones at the far edges.
SIZES = {"hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 160, "head_dim": 32}
LINEAR = ("_proj.weight",)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
#: A weight with more blocks than one, and its scales.
GATE = "model.layers.1.mlp.gate_proj.weight"
SCALES = f"{GATE}_scale_inv"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("qwen3-untied", "qwen3-moe"):
        sizes = SIZES if name == "qwen3-moe" else {key: value for key, value in SIZES.items() if "moe" not in key}
        parity.write_model(folder, name, **sizes)
    return folder


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def published(source: Path, out: Path, scales_dtype: torch.dtype) -> Path:
    """A checkpoint as its makers publish it: linear layers in FP8, scales amax / 448 of each block, not rounded to
    powers of two; everything else in bf16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(source).items():
        if not name.endswith(LINEAR):
            tensors[name] = tensor.bfloat16()
            continue
        rows, columns = tensor.shape
        scales = torch.empty(-(-rows // 128), -(-columns // 128))
        values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scales[i, j] = (tensor[block].abs().max() / 448).to(scales_dtype)
                values[block] = (tensor[block] / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors |= {name: values, f"{name}_scale_inv": scales.to(scales_dtype)}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    edit_config(out, dtype="bfloat16", quantization_config=FP8)
    return out


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of every number."""
    return scales.float().repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=["fp32", "bf16", "powers of two"]
)
@pytest.mark.parametrize("model", ["qwen3-untied", "qwen3-moe"])
def test_published_checkpoints_are_read_as_numbers(model: str, scales: torch.dtype, models: Path, tmp_path: Path):
    source = published(models / model, tmp_path / "fp8", scales)
    assert not list(checkpoint_refusals(source))
    layout = ParallelSettings(tensor=2, expert=2 if model == "qwen3-moe" else 1)
    to_megatron.convert(source, tmp_path / "megatron", layout, Ranks())
    to_hf.convert(tmp_path / "megatron", tmp_path / "back", Ranks())
    raw, found = tensors_of(source), tensors_of(tmp_path / "back")
    assert found.keys() == {name for name in raw if not name.endswith("_scale_inv")}
    for name, tensor in found.items():
        wanted = raw[name]
        if name.endswith(LINEAR):
            wanted = (wanted.float() * spread(raw[f"{name}_scale_inv"], wanted.shape)).bfloat16()
        assert torch.equal(tensor, wanted), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"


@pytest.mark.parametrize("model", ["qwen3-untied", "qwen3-moe"])
def test_transformers_reads_the_same(model: str, tmp_path: Path):
    """It takes whole blocks alone; of whatever size the grid of the scales implies, so that here they are of 128."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    sizes |= {"moe_intermediate_size": 128} if model == "qwen3-moe" else {}
    source = published(parity.write_model(tmp_path, model, **sizes), tmp_path / "fp8", torch.float32)
    to_megatron.convert(source, tmp_path / "megatron", ParallelSettings(), Ranks())
    to_hf.convert(tmp_path / "megatron", tmp_path / "back", Ranks())
    theirs, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
        for path in (source, tmp_path / "back")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_boxes_need_not_begin_or_end_with_blocks(models: Path, tmp_path: Path):
    source = published(models / "qwen3-untied", tmp_path / "fp8", torch.float32)
    raw = tensors_of(source)
    with HfCheckpoint(source) as checkpoint:
        assert SCALES not in checkpoint.tensors and checkpoint.tensors[GATE].dtype == "BF16"
        for rows, columns in (
            ((0, 320), (0, 192)),
            ((100, 300), (5, 130)),
            ((255, 257), (127, 129)),
            ((319, 320), (0, 1)),
        ):
            found = checkpoint.read(GATE, (rows, columns))
            wanted = torch.tensor(
                [
                    [float(raw[GATE][i, j]) * raw[SCALES][i // 128, j // 128] for j in range(*columns)]
                    for i in range(*rows)
                ]
            )
            assert found.dtype == torch.float32 and torch.equal(found, wanted)


BAD: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str, bool]] = {
    "no scales": (
        lambda tensors: tensors.pop(SCALES),
        rf"{GATE} in .*: is FP8, so its scales must be there, {SCALES}\. Fix: copy the checkpoint again",
        True,
    ),
    "other blocks": (
        lambda tensors: tensors.update({SCALES: torch.ones(5, 3)}),
        rf"{SCALES} of shape \(5, 3\) in .*: must have shape \(3, 2\): one for every block of 128 x 128 of {GATE}",
        True,
    ),
    "type of scales": (
        lambda tensors: tensors.update({SCALES: torch.ones(3, 2, dtype=torch.int32)}),
        rf"{SCALES} of type I32 in .*: must be of type F32, BF16, F16, F8_E8M0",
        True,
    ),
    "e5m2": (
        lambda tensors: tensors.update({GATE: tensors[GATE].float().to(torch.float8_e5m2)}),
        rf"{GATE} of type F8_E5M2 in .*: must be a matrix of type F8_E4M3",
        True,
    ),
    "NaN": (
        lambda tensors: tensors[SCALES].__setitem__((1, 1), float("nan")),
        rf"{SCALES} in .*: must be positive numbers, but 1 of 6 are not",
        False,
    ),
    "zero": (
        lambda tensors: tensors[SCALES].__setitem__((0, 1), 0.0),
        rf"{SCALES} in .*: must be positive numbers, but 1 of 6 are not",
        False,
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_scales_are_refused(bad: str, models: Path, tmp_path: Path):
    """What the files' headers show is refused before a start; what it takes their numbers for when they are read."""
    source = published(models / "qwen3-untied", tmp_path / "fp8", torch.float32)
    change, message, in_header = BAD[bad]
    tensors = tensors_of(source)
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=message):
        to_megatron.convert(source, tmp_path / "out", ParallelSettings(), Ranks())
    assert not (tmp_path / "out").exists()
    early = [str(refusal) for refusal in checkpoint_refusals(source)]
    assert len(early) == in_header and all(GATE in one for one in early)


def by_hand(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of a weight: amax of a block, at least 1e-4, over 448, up to the next power of two; one number
    at a time, the nearest that e4m3 has."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i, j in itertools.product(*map(range, scales.shape)):
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        exact = max(float(weight[block].abs().max()), 1e-4) / 448
        scales[i, j] = 2.0 ** math.ceil(math.log2(exact))
        values[block] = (weight[block].double() / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", ["qwen3-untied", "qwen3-moe"])
def test_written_checkpoints_have_the_format(model: str, dtype: torch.dtype, models: Path, tmp_path: Path):
    """Every linear layer in FP8, made of the weights as they are, whatever pieces Megatron has them in; all else bf16;
    over several files; and it is read again as the numbers that it has."""
    to_megatron.convert(models / model, tmp_path / "megatron", ParallelSettings(tensor=2), Ranks(), dtype=dtype)
    written = tmp_path / "fp8"
    to_hf.convert(tmp_path / "megatron", written, Ranks(), dtype=torch.bfloat16, fp8=True, file_bytes=300_000)
    assert len(list(written.glob("*.safetensors"))) > 2
    found, wanted = tensors_of(written), dict[str, torch.Tensor]()
    for name, tensor in tensors_of(models / model).items():
        if name.endswith(LINEAR):
            wanted[name], wanted[f"{name}_scale_inv"] = by_hand(tensor.to(dtype))
        else:
            wanted[name] = tensor.bfloat16()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor.float(), wanted[name].float()), name
    config = json.loads((written / "config.json").read_text())
    stays = {name for name, one in found.items() if one.dim() == 2 and not name.endswith((*LINEAR, "_scale_inv"))}
    stays = {"lm_head", *(name.removesuffix(".weight") for name in stays if "embed_tokens" not in name)}
    stated = config["quantization_config"]
    assert set(stated.pop("modules_to_not_convert")) == stays and stated == FP8 and config["dtype"] == "bfloat16"
    with HfCheckpoint(written) as checkpoint:
        for name in found:
            if name.endswith(LINEAR):
                numbers = found[name].float() * spread(found[f"{name}_scale_inv"], found[name].shape)
                assert torch.equal(checkpoint.read(name, whole(numbers.shape)), numbers)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-untied", "qwen2-moe", "qwen3-moe", "mixtral"])
def test_transformers_builds_of_it_the_layers_that_were_written(name: str) -> None:
    """On a GPU it makes FP8 layers of all linear ones that `quantization_config` does not name: those alone that are
    quantised, and not an output layer, tied or not."""
    model = parity.MODELS[name]
    fields = parity.SIZES | model.extra
    config = getattr(transformers, f"{model.classes}Config")(**fields, tie_word_embeddings=model.tied)
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
    shape = model_shape_from_hf(config.to_dict())
    stated = quantization_config(shape)
    settings = transformers.FineGrainedFP8Config(weight_block_size=(128, 128))
    replace_with_fp8_linear(network, stated["modules_to_not_convert"], settings, pre_quantized=True)
    found = {name for name, module in network.named_modules() if isinstance(module, FP8Linear)}
    wanted = {name.removesuffix(".weight") for name in quantised_weights(shape)}
    # Of experts it has stacks, under names of its own.
    assert found == {name for name in wanted if ".experts." not in name}
    experts = [type(module).__name__ for path, module in network.named_modules() if path.endswith(".experts")]
    assert bool(experts) == shape.is_moe and all("FP8" in one for one in experts)


def test_a_header_without_types_is_left_to_who_reads_it(tmp_path: Path) -> None:
    header = json.dumps({"model.norm.weight": {"data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert list(checkpoint_refusals(tmp_path)) == []
    with pytest.raises(Refusal, match=r"must be a whole safetensors file"):
        HfCheckpoint(tmp_path)
