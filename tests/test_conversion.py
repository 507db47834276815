"""Hugging Face to Megatron and back: bitwise under every layout, refused where anything is wrong, whole or absent."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parity
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megarl.config.model_shape import read_model_shape
from megarl.config.sections import ParallelSettings
from megarl.config.splits import policy_refusals
from megarl.conversion import to_hf, to_megatron
from megarl.conversion.ranks import Ranks
from megarl.errors import Refusal
from megarl.formats import megatron
from megarl.formats.huggingface import HfCheckpoint
from megarl.formats.megatron import DistributedCheckpoint
from megarl.formats.staging import Staging
from megarl.reshard.boxes import extents, whole
from megarl.reshard.weight_map import hf_tensors

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
LAYOUTS = [
    ParallelSettings(tensor=tensor, pipeline=pipeline, expert=expert)
    for tensor in (1, 2, 4)
    for pipeline in (1, 2)
    for expert in (1, 2)
] + [ParallelSettings(pipeline=3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model of `parity.MODELS`, as transformers saves it."""
    folder = tmp_path_factory.mktemp("models")
    for name in parity.MODELS:
        parity.write_model(folder, name)
    return folder


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewritten(
    source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None, files: int = 1
) -> Path:
    """The checkpoint with its tensors changed in place, in so many files."""
    tensors = tensors_of(source)
    change(tensors)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    if files == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::files]}
        save_file(part, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def as_bf16(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def assert_same(found: Path, wanted: Path) -> None:
    """Names, types and every bit."""
    left, right = tensors_of(found), tensors_of(wanted)
    assert set(left) == set(right)
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype and torch.equal(left[name], tensor), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", parity.MODELS)
def test_there_and_back_is_bitwise_through_every_layout(model: str, dtype: str, models: Path, tmp_path: Path):
    """fp32 in one file, bf16 in three, through a few layouts; the vocabulary of 97 is odd, and one key-value head is
    fewer than TP 2."""
    source = models / model
    if dtype == "bf16":
        source = rewritten(source, tmp_path / "bf16", as_bf16, files=3)
        edit_config(source, dtype="bfloat16")
    shape = read_model_shape(source)
    converted = 0
    for number, layout in enumerate(LAYOUTS if dtype == "fp32" else LAYOUTS[:: len(LAYOUTS) // 3]):
        if any(policy_refusals(shape, layout)) or (layout.expert > 1 and not shape.is_moe):
            continue
        megatron, back = tmp_path / f"megatron-{number}", tmp_path / f"back-{number}"
        to_megatron.convert(source, megatron, layout, Ranks(), file_bytes=50_000)
        to_hf.convert(megatron, back, Ranks(), file_bytes=5_000_000_000 if dtype == "fp32" else 100_000)
        assert_same(back, source)
        assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
        assert (back / "model.safetensors.index.json").is_file() == (dtype == "bf16")
        converted += 1
    assert converted >= (2 if dtype == "bf16" else 6 if shape.is_moe else 4)


def test_a_rank_reads_chunks_that_are_wholly_its_own(models: Path, tmp_path: Path):
    """Shards are stored as --tensor asks for: every box of a weight that TP cuts is a rank's own."""
    to_megatron.convert(models / "qwen2-untied", tmp_path / "out", ParallelSettings(tensor=2, pipeline=2), Ranks())
    stored = DistributedCheckpoint(tmp_path / "out")
    boxes = {key: [(tuple(s for s, _ in box), extents(box)) for box in stored.boxes(key)] for key in stored.tensors}
    prefix = "decoder.layers.3."
    assert boxes[prefix + "self_attention.linear_qkv.weight"] == [((0, 0), (64, 64)), ((64, 0), (64, 64))]
    assert boxes[prefix + "self_attention.linear_proj.weight"] == [((0, 0), (64, 32)), ((0, 32), (64, 32))]
    gate_up = boxes[prefix + "mlp.linear_fc1.weight"]
    assert sorted(gate_up) == [((start, 0), (48, 64)) for start in (0, 48, 96, 144)]
    assert boxes["embedding.word_embeddings.weight"] == [((0, 0), (64, 64)), ((64, 0), (64, 64))]
    assert boxes["decoder.final_layernorm.weight"] == [((0,), (64,))]


def test_types_are_converted_where_asked(models: Path, tmp_path: Path):
    """A type that is stated twice is stated once in what megarl writes, which it and transformers read again."""
    source = rewritten(models / "qwen2-tied", tmp_path / "source")
    edit_config(source, dtype="float32", torch_dtype="float32", unsloth_version="é")
    to_megatron.convert(source, tmp_path / "megatron", ParallelSettings(), Ranks(), dtype=torch.bfloat16)
    to_hf.convert(tmp_path / "megatron", tmp_path / "back", Ranks())
    to_megatron.convert(tmp_path / "back", tmp_path / "again", ParallelSettings(), Ranks())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").dtype == torch.bfloat16
    assert "torch_dtype" not in json.loads((tmp_path / "back" / "config.json").read_text())
    wanted = {name: tensor.bfloat16() for name, tensor in tensors_of(models / "qwen2-tied").items()}
    found = tensors_of(tmp_path / "back")
    assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    to_hf.convert(tmp_path / "megatron", tmp_path / "fp32", Ranks(), dtype=torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(tmp_path / "fp32").values())


def test_checkpoints_with_stacked_layers_are_read(models: Path, tmp_path: Path):
    """As Megatron names them where all layers are alike, unless it is asked not to."""
    to_megatron.convert(models / "qwen2-tied", tmp_path / "megatron", ParallelSettings(tensor=2), Ranks())
    plain = DistributedCheckpoint(tmp_path / "megatron")
    stacked: list[tuple[str, tuple[int, ...], Any, torch.Tensor]] = []
    for key, (shape, _) in plain.tensors.items():
        data = plain.read(key, whole(shape))
        layer, found = key.split(".")[2], key.startswith("decoder.layers.")
        if found:
            name = key.replace(f".layers.{layer}.", ".layers.")
            place = ((int(layer), int(layer) + 1), *whole(shape))
            stacked.append((name, (4, *shape), place, data[None]))
        else:
            stacked.append((key, shape, whole(shape), data))
    (tmp_path / "stacked").mkdir()
    megatron.write_index(tmp_path / "stacked", megatron.write_file(tmp_path / "stacked" / "__0_0.distcp", stacked))
    to_hf.convert(tmp_path / "stacked", tmp_path / "back", Ranks(), hf_config=models / "qwen2-tied")
    assert_same(tmp_path / "back", models / "qwen2-tied")


# --- several processes, and interrupted ones ----------------------------------------------------------------------

#: A conversion in small pieces, so that several processes have some of a tiny model; argv: tool, kill after, arguments.
SMALL = """
import os, signal, sys
sys.path.insert(0, "tools")
from megarl.conversion import to_hf, to_megatron
from megarl.formats.staging import Staging

to_megatron.convert.__kwdefaults__["file_bytes"] = 50_000
to_hf.PIECE_BYTES = 20_000
tool, left = sys.argv[1], int(sys.argv[2])
record = Staging.record

def kill(self, *arguments):
    global left
    record(self, *arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

Staging.record = kill
module = __import__(tool)
sys.exit(module.main(sys.argv[3:]))
"""


def convert_in_pieces(tool: str, kill_after: int, *arguments: Any, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = [] if processes == 1 else ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(processes)]
    command = [*launcher, sys.executable, "-c", SMALL, tool, str(kill_after), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.processes
def test_two_processes_write_the_same_bytes(models: Path, tmp_path: Path):
    source = models / "qwen3-moe"
    for processes in (1, 2):
        megatron, back = tmp_path / f"megatron-{processes}", tmp_path / f"back-{processes}"
        forth = ("--hf", source, "--out", megatron, "--tensor", 2, "--expert", 2)
        done = convert_in_pieces("convert_hf_to_megatron", 0, *forth, processes=processes)
        assert done.returncode == 0 and f"{processes} processes" in done.stdout, done.stderr
        there = ("--megatron", megatron, "--out", back)
        done = convert_in_pieces("convert_megatron_to_hf", 0, *there, processes=processes)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "megatron-1").glob("*.distcp"))) > 4
    assert bytes_of(tmp_path / "megatron-1") == bytes_of(tmp_path / "megatron-2")
    assert bytes_of(tmp_path / "back-1") == bytes_of(tmp_path / "back-2")


@pytest.mark.processes
def test_an_error_of_one_process_ends_all(models: Path, tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")

    source = rewritten(models / "qwen2-tied", tmp_path / "source", spoil)
    done = convert_in_pieces("convert_hf_to_megatron", 0, "--hf", source, "--out", tmp_path / "out", processes=2)
    assert done.returncode == 2 and "model.layers.3.mlp.down_proj.weight" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_a_killed_conversion_goes_on_where_it_stopped(models: Path, tmp_path: Path):
    source = models / "qwen2-untied"
    to_megatron.convert(source, tmp_path / "whole", ParallelSettings(), Ranks(), file_bytes=50_000)
    forth = ("convert_hf_to_megatron", "--hf", source, "--out", tmp_path / "megatron")
    there = ("convert_megatron_to_hf", "--megatron", tmp_path / "whole", "--out", tmp_path / "back")
    for tool, *arguments in (forth, there):
        out = Path(arguments[-1])
        assert convert_in_pieces(tool, 3, *arguments).returncode == -signal.SIGKILL
        partial = out.with_name(out.name + ".partial")
        assert not out.exists() and partial.is_dir()
        with pytest.raises(Refusal):
            DistributedCheckpoint(out)
        written = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.distcp")}
        # Another number of processes goes on all the same.
        done = convert_in_pieces(tool, 0, *arguments, processes=2)
        assert done.returncode == 0, done.stderr
        assert not partial.exists() and not (out / ".records").exists()
        kept = [name for name, time in written.items() if (out / name).stat().st_mtime_ns == time]
        assert len(kept) == (3 if tool == forth[0] else 0)
    assert bytes_of(tmp_path / "megatron") == bytes_of(tmp_path / "whole")
    assert_same(tmp_path / "back", source)


@pytest.mark.processes
def test_pieces_that_were_lost_are_made_again(models: Path, tmp_path: Path):
    source = models / "qwen2-untied"
    to_megatron.convert(source, tmp_path / "whole", ParallelSettings(), Ranks())
    forth = ("convert_hf_to_megatron", "--hf", source, "--out", tmp_path / "megatron")
    there = ("convert_megatron_to_hf", "--megatron", tmp_path / "whole", "--out", tmp_path / "back")
    for (tool, *arguments), lost in ((forth, "__1_0.distcp"), (there, "model.safetensors")):
        assert convert_in_pieces(tool, 3, *arguments).returncode == -signal.SIGKILL
        Path(f"{arguments[-1]}.partial", lost).unlink()
        done = convert_in_pieces(tool, 0, *arguments)
        assert done.returncode == 0, done.stderr
    to_hf.convert(tmp_path / "megatron", tmp_path / "round", Ranks())
    assert_same(tmp_path / "round", source)
    assert_same(tmp_path / "back", source)


@pytest.mark.processes
def test_two_conversions_into_one_place(models: Path, tmp_path: Path):
    """The second is refused while the first is at work; what no conversion made is not touched."""
    first = Staging(tmp_path / "out", {})
    first.begin(0)
    with pytest.raises(Refusal, match=r"out\.partial: is being written by another conversion"):
        to_megatron.convert(models / "qwen2-tied", tmp_path / "out", ParallelSettings(), Ranks())
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.tex").write_text("dear to me")
    with pytest.raises(Refusal, match=r"other\.partial: exists, and was not made by a conversion"):
        to_megatron.convert(models / "qwen2-tied", tmp_path / "other", ParallelSettings(), Ranks())
    assert (tmp_path / "other.partial" / "thesis.tex").is_file()


def test_processes_that_mpi_does_not_join_are_refused():
    """As under a launcher of another MPI: each would take itself for the only one."""
    code = "from megarl.conversion.command import run; import sys; sys.exit(run(lambda ranks: 0))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SLURM_STEP_NUM_TASKS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "2 processes of which MPI knows 1: must find each other" in done.stderr


def test_another_conversion_into_the_same_place_starts_clean(models: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = ("--hf", models / "qwen2-untied", "--out", out)
    assert convert_in_pieces("convert_hf_to_megatron", 2, *arguments).returncode == -signal.SIGKILL
    to_megatron.convert(models / "qwen2-tied", out, ParallelSettings(tensor=2), Ranks())
    to_hf.convert(out, tmp_path / "back", Ranks())
    assert_same(tmp_path / "back", models / "qwen2-tied")
    assert not (out / ".records").exists()


@pytest.mark.processes
def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    """1.2 GB with an embedding of 50 MB: at its peak a process has three times the largest tensor, and 1 GB."""
    config = {
        "model_type": "llama",
        "hidden_size": 1024,
        "num_hidden_layers": 25,
        "num_attention_heads": 8,
        "intermediate_size": 6144,
        "vocab_size": 24576,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shapes = hf_tensors(read_model_shape(source))
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, source / "model.safetensors")
    allowed = 3 * 24576 * 1024 * 2 + 10**9
    measure = importlib.import_module("measure_conversion").convert
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    for tool, arguments, out in (
        ("convert_hf_to_megatron", ["--hf", source], megatron),
        ("convert_megatron_to_hf", ["--megatron", megatron], back),
    ):
        _, peak = measure(tool, arguments, out, 1)
        assert peak < allowed
    assert_same(tmp_path / "back", source)


# --- bad input ----------------------------------------------------------------------------------------------------


def spoiled(models: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    return rewritten(models / "qwen2-untied", tmp_path / "spoiled", change)


def with_config(models: Path, tmp_path: Path, **changes: Any) -> Path:
    source = rewritten(models / "qwen2-untied", tmp_path / "spoiled")
    edit_config(source, **changes)
    return source


NORM = "model.layers.1.input_layernorm.weight"


def missing(models: Path, tmp_path: Path) -> Path:
    return spoiled(models, tmp_path, lambda tensors: tensors.pop(NORM))


def extra(models: Path, tmp_path: Path) -> Path:
    return spoiled(models, tmp_path, lambda tensors: tensors.update({"score.weight": torch.ones(2, 64)}))


def wrong_shape(models: Path, tmp_path: Path) -> Path:
    return spoiled(models, tmp_path, lambda tensors: tensors.update({NORM: torch.ones(63)}))


def wrong_type(models: Path, tmp_path: Path) -> Path:
    return spoiled(models, tmp_path, lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.bfloat16)}))


def integers(models: Path, tmp_path: Path) -> Path:
    return spoiled(models, tmp_path, lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int8)}))


def half(models: Path, tmp_path: Path) -> Path:
    source = spoiled(models, tmp_path, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    edit_config(source, dtype="float16")
    return source


def not_a_number(models: Path, tmp_path: Path) -> Path:
    return spoiled(models, tmp_path, lambda tensors: tensors[NORM].__setitem__(5, float("nan")))


def infinite(models: Path, tmp_path: Path) -> Path:
    return spoiled(models, tmp_path, lambda tensors: tensors["lm_head.weight"].__setitem__((96, 0), float("inf")))


def cut_short(models: Path, tmp_path: Path) -> Path:
    source = rewritten(models / "qwen2-untied", tmp_path / "spoiled")
    with open(source / "model.safetensors", "r+b") as file:
        file.truncate(100_000)
    return source


def absent_file(models: Path, tmp_path: Path) -> Path:
    source = rewritten(models / "qwen2-untied", tmp_path / "spoiled", files=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    return source


def index_astray(models: Path, tmp_path: Path) -> Path:
    source = rewritten(models / "qwen2-untied", tmp_path / "spoiled", files=3)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["lm_head.weight"]
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return source


def two_saves(models: Path, tmp_path: Path) -> Path:
    source = rewritten(models / "qwen2-untied", tmp_path / "spoiled", files=3)
    shutil.copy(models / "qwen2-untied" / "model.safetensors", source)
    return source


def classifier(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, architectures=["Qwen2ForSequenceClassification"])


def uneven_heads(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, num_key_value_heads=3)


def rope_by_layer(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 4.0}})


def rope_without_factor(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})


def half_rotated(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, partial_rotary_factor=0.5)


def no_layers(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, num_hidden_layers=-1)


def a_list(models: Path, tmp_path: Path) -> Path:
    source = rewritten(models / "qwen2-untied", tmp_path / "spoiled")
    (source / "config.json").write_text("[]")
    return source


def unknown(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, model_type="gpt_neox")


def own_code(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Model"})


def other_rope(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4})


def two_types(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, dtype="float32", torch_dtype="bfloat16")


def untied(models: Path, tmp_path: Path) -> Path:
    return with_config(models, tmp_path, tie_word_embeddings=True)


def pickled(models: Path, tmp_path: Path) -> Path:
    source = rewritten(models / "qwen2-untied", tmp_path / "spoiled")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    return source


BAD_SOURCES: dict[Callable[[Path, Path], Path], str] = {
    missing: rf"without {NORM}: must hold every tensor of the model",
    extra: r"score\.weight in .*: is no tensor of a qwen2 model",
    wrong_shape: rf"{NORM} of shape \(63,\) in .*: must have shape \(64,\) by config\.json",
    wrong_type: rf"{NORM} of type BF16 in .*: must be of type F32, as config\.json says",
    integers: rf"{NORM} of type I8 in .*: must be of type F32 or BF16 or F16",
    half: r"of type F16: is no type that a policy has\. Fix: add --dtype",
    not_a_number: rf"{NORM} in .*: must be finite, but 1 of its 64 numbers are NaN or infinite",
    infinite: r"lm_head\.weight in .*: must be finite, but 1 of its 6208 numbers",
    cut_short: r"model\.safetensors: must be a whole safetensors file",
    absent_file: r"model-00002-of-00003\.safetensors: is named in model\.safetensors\.index\.json and missing",
    index_astray: r"model\.norm\.weight in .*index\.json: must be in model-.*, which does not hold it",
    two_saves: r"with model\.safetensors and model\.safetensors\.index\.json: must hold one of them",
    classifier: r"architectures=\['Qwen2ForSequenceClassification'\] in .*: must be Qwen2ForCausalLM",
    uneven_heads: r"num_key_value_heads=3 in .*: must divide the 4 attention heads",
    rope_by_layer: r"rope_parameters=.* in .*: must be one scaling for all layers",
    rope_without_factor: r"without factor: a yarn scaling needs it",
    half_rotated: r"partial_rotary_factor in .*: must be 1",
    no_layers: r"num_hidden_layers=-1 in .*: must be a whole number of at least 1",
    a_list: r"config\.json: must be a JSON object",
    unknown: r"model_type='gpt_neox' in .*: must be one of \['llama', 'mistral'",
    own_code: r"auto_map in .*: names code that comes with the checkpoint, which is never run",
    other_rope: r"rope_type='longrope' in .*: must be default, linear, llama3 or yarn",
    two_types: r"torch_dtype='bfloat16' and dtype='float32' in .*: must be the same, as both say one thing",
    untied: r"lm_head\.weight in .*: must equal the embedding, to which config\.json ties it",
    pickled: r"with pickled weights: is not read unless asked for.*Fix: .*--allow-pickle",
}


@pytest.mark.parametrize("bad", BAD_SOURCES, ids=lambda bad: bad.__name__)
def test_bad_checkpoints_are_refused_and_leave_nothing(bad: Any, models: Path, tmp_path: Path):
    source = bad(models, tmp_path)
    with pytest.raises(Refusal, match=BAD_SOURCES[bad]):
        to_megatron.convert(source, tmp_path / "out", ParallelSettings(), Ranks())
    assert not (tmp_path / "out").exists()


def test_other_types_are_read_where_one_is_asked_for(models: Path, tmp_path: Path):
    source = half(models, tmp_path)
    to_megatron.convert(source, tmp_path / "out", ParallelSettings(), Ranks(), dtype=torch.float32)
    to_hf.convert(tmp_path / "out", tmp_path / "back", Ranks())
    wanted = tensors_of(source)
    assert all(torch.equal(found, wanted[name].float()) for name, found in tensors_of(tmp_path / "back").items())


def test_pickled_weights_are_read_where_asked_and_nothing_else_is(models: Path, tmp_path: Path):
    source = pickled(models, tmp_path)
    to_megatron.convert(source, tmp_path / "out", ParallelSettings(), Ranks(), allow_pickle=True)
    to_hf.convert(tmp_path / "out", tmp_path / "back", Ranks())
    assert_same(tmp_path / "back", models / "qwen2-untied")

    class Harm:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "harm"),))

    torch.save({"step": 3, **load_file(models / "qwen2-untied" / "model.safetensors")}, source / "pytorch_model.bin")
    with pytest.raises(Refusal, match=r"must be a record of tensors, not \['step'\]"):
        to_megatron.convert(source, tmp_path / "again", ParallelSettings(), Ranks(), allow_pickle=True)
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Harm()}))
    with pytest.raises(Refusal, match=r"pytorch_model\.bin: must be a whole file of pickled weights"):
        to_megatron.convert(source, tmp_path / "again", ParallelSettings(), Ranks(), allow_pickle=True)
    assert not (tmp_path / "harm").exists()


def test_copies_of_tied_embeddings_and_rotary_tables_are_passed_over(models: Path, tmp_path: Path):
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    source = rewritten(models / "qwen2-tied", tmp_path / "source", add)
    to_megatron.convert(source, tmp_path / "out", ParallelSettings(), Ranks())
    to_hf.convert(tmp_path / "out", tmp_path / "back", Ranks())
    assert_same(tmp_path / "back", models / "qwen2-tied")


def test_an_output_that_exists_is_not_touched(models: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear to me")
    with pytest.raises(Refusal, match=r"out: exists, and is not written over"):
        to_megatron.convert(models / "qwen2-tied", tmp_path / "out", ParallelSettings(), Ranks())
    to_megatron.convert(models / "qwen2-tied", tmp_path / "megatron", ParallelSettings(), Ranks())
    with pytest.raises(Refusal, match=r"out: exists, and is not written over"):
        to_hf.convert(tmp_path / "megatron", tmp_path / "out", Ranks())
    assert (tmp_path / "out" / "thesis.tex").read_text() == "dear to me"


def test_a_full_disk_is_refused_before_writing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(Refusal, match=r"out: needs 0\.00 GB, and its disk has 0\.00 GB left"):
        to_megatron.convert(models / "qwen2-tied", tmp_path / "out", ParallelSettings(), Ranks())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 3}, r"parallel\.tensor=3: must divide the model's 4 attention heads"),
        ({"pipeline": 5}, r"parallel\.pipeline=5: must be at most the model's 4 layers"),
        ({"expert": 2}, r"parallel\.expert=2: is for mixtures of experts, and a qwen2 model is dense"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout: dict[str, Any], message: str, models: Path, tmp_path: Path):
    with pytest.raises(Refusal, match=message):
        to_megatron.convert(models / "qwen2-tied", tmp_path / "out", ParallelSettings(**layout), Ranks())
    assert not list(tmp_path.iterdir())


# --- bad input on the way back -------------------------------------------------------------------------------------


def lose_a_file(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def cut_a_file(path: Path) -> None:
    with open(next(path.glob("*.distcp")), "r+b") as file:
        file.truncate(20_000)


def lose_the_index(path: Path) -> None:
    (path / ".metadata").unlink()


def spoil_the_index(path: Path) -> None:
    (path / ".metadata").write_bytes(b"nothing")


def smaller_model(path: Path) -> None:
    edit_config(path / "hf", num_hidden_layers=3, layer_types=...)


def larger_model(path: Path) -> None:
    edit_config(path / "hf", num_hidden_layers=5, layer_types=...)


def wider_model(path: Path) -> None:
    edit_config(path / "hf", intermediate_size=128)


def nothing_known(path: Path) -> None:
    shutil.rmtree(path / "hf")


def other_heads(path: Path) -> None:
    """The same shapes, cut otherwise."""
    edit_config(path / "hf", num_attention_heads=2, num_key_value_heads=1, head_dim=32)


def smaller_vocabulary(path: Path) -> None:
    """Fewer rows than there are would be taken for padding."""
    edit_config(path / "hf", vocab_size=50)


BAD_MEGATRON: dict[Callable[[Path], Any], str] = {
    lose_a_file: r"has lost its file __0_0\.distcp|__0_0\.distcp: is named in \.metadata and missing",
    cut_a_file: r"has 20000 of the \d+ bytes of its file __0_0\.distcp",
    lose_the_index: r"has lost its file \.metadata",
    spoil_the_index: r"has 7 of the \d+ bytes of its file \.metadata",
    other_heads: r"of a model with num_heads=4: must be of the model in config\.json, which has num_heads=2",
    smaller_vocabulary: r"of a model with vocab_size=97: must be of the model in config\.json, which has vocab_size=50",
    smaller_model: r"of a model with num_layers=4: must be of the model in config\.json, which has num_layers=3",
    larger_model: r"of a model with num_layers=4: .*which has num_layers=5",
    wider_model: r"of a model with ffn_size=96: .*which has ffn_size=128",
    nothing_known: r"does not say where its model's config\.json and tokenizer are\. Fix: .*--hf-config",
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("bad", BAD_MEGATRON, ids=lambda bad: bad.__name__)
def test_bad_megatron_checkpoints_are_refused(bad: Any, listed: bool, models: Path, tmp_path: Path):
    """With megarl's list of files, and without one, as Megatron-LM writes checkpoints."""
    source = tmp_path / "megatron"
    to_megatron.convert(models / "qwen2-tied", source, ParallelSettings(), Ranks())
    hf_config = None
    if not listed and bad in (other_heads, smaller_vocabulary):
        pytest.skip("known by megarl's notes alone")
    if not listed:
        (source / "progress.json").unlink()
        hf_config = None if bad is nothing_known else source / "hf"
    bad(source)
    message = BAD_MEGATRON[bad]
    if not listed:
        message = {
            cut_a_file: r"__0_0\.distcp: is shorter than \.metadata says",
            lose_the_index: r"must be a Megatron distributed checkpoint \(torch_dist\)",
            spoil_the_index: r"\.metadata: cannot be read",
            smaller_model: r"decoder\.layers\.3\..* in .*: is no tensor of a qwen2 model with this config\.json",
            larger_model: r"without decoder\.layers\.4\.self_attention.*: must hold every tensor of the model",
            wider_model: r"linear_fc1\.weight of shape \(192, 64\) in .*: must have shape \(256, 64\) by config\.json",
        }.get(bad, message)
    with pytest.raises(Refusal, match=message):
        to_hf.convert(source, tmp_path / "out", Ranks(), hf_config=hf_config)
    assert not (tmp_path / "out").exists()


def test_a_run_s_newest_checkpoint_is_converted_or_none(models: Path, tmp_path: Path):
    """An older one in the place of a damaged newest one would be taken for it."""
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    for step in ("step_000001", "step_000002"):
        to_megatron.convert(models / "qwen2-tied", root / step, ParallelSettings(), Ranks())
    (root / "latest").write_text("step_000002")
    source, size = to_hf.convert(tmp_path / "run", tmp_path / "out", Ranks())
    assert source == root / "step_000002" and size > 0
    cut_a_file(root / "step_000002")
    with pytest.raises(Refusal, match=r"step_000002: must be a complete checkpoint"):
        to_hf.convert(tmp_path / "run", tmp_path / "again", Ranks())


def test_an_index_runs_no_code(models: Path, tmp_path: Path):
    class Harm:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "harm"),))

    to_megatron.convert(models / "qwen2-tied", tmp_path / "megatron", ParallelSettings(), Ranks())
    (tmp_path / "megatron" / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(
        Refusal, match=r"\.metadata: cannot be read \(UnpicklingError: \w+\.mkdir is no part of an index"
    ):
        DistributedCheckpoint(tmp_path / "megatron")
    assert not (tmp_path / "harm").exists()


def test_damaged_tensors_are_refused(models: Path, tmp_path: Path):
    """Of the right length, but not what was written."""
    source = tmp_path / "megatron"
    to_megatron.convert(models / "qwen2-tied", source, ParallelSettings(), Ranks())
    with open(source / "__0_0.distcp", "r+b") as file:
        file.write(bytes(4000))
    with pytest.raises(Refusal, match=r"embedding\.word_embeddings\.weight in .*: cannot be read"):
        to_hf.convert(source, tmp_path / "out", Ranks())
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_read_through_small_mappings(models: Path, monkeypatch: pytest.MonkeyPatch):
    """Files are opened anew as pages add up; what is read stays the same."""
    monkeypatch.setattr("megarl.formats.huggingface.MAPPED_BYTES", 10_000)
    wanted = tensors_of(models / "qwen2-tied")
    with HfCheckpoint(models / "qwen2-tied") as checkpoint:
        for name, tensor in wanted.items():
            assert torch.equal(checkpoint.read(name, whole(tensor.shape)), tensor)
            assert len(checkpoint._open) <= 1
