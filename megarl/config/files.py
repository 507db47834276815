"""What must be on disk before a run starts: model, tokenizer, data, rollouts to replay. Torch-free.

Only what a wrong path or a broken copy shows at once is checked here; contents are read by `data` and
`weights`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarl.config.data import DATA_SUFFIXES, DEMONSTRATIONS, each_source
from megarl.config.implied import Implied
from megarl.config.quantisation import scales_refusals
from megarl.config.schema import RunConfig
from megarl.errors import Refusal

#: Folders of published models without weights, by the models' names.
KNOWN_MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"


def with_known_model(config: RunConfig) -> RunConfig:
    """`config` for a plan: where its model is not on this machine, and configs/models/ has one of that name, with that
    one, of which the sizes are known."""
    path = Path(config.model.path)
    known = KNOWN_MODELS / path.name
    if (path / "config.json").is_file() or not (known / "config.json").is_file():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(known)})})


def named(looks: Iterator[Refusal]) -> Iterator[Refusal]:
    """What `looks` yields, and a refusal where a path cannot be looked at (too long, forbidden, a disk's error)."""
    try:
        yield from looks
    except OSError as error:
        rule = f"cannot be looked at ({error.strerror or error})"
        yield Refusal(f"path {error.filename}", rule, "correct the path, or who may read it")


def refusals(config: RunConfig) -> Iterator[Refusal]:
    """What is missing or broken among the files that `config` names."""
    yield from named(_refusals(config))


def _refusals(config: RunConfig) -> Iterator[Refusal]:
    model = config.model
    if model.random_init and model.weights is not None:
        yield Refusal(f"model.weights={model.weights}", "contradicts model.random_init=true", "remove one of the two")
    if model.weights is None and not model.random_init:
        yield from checkpoint_refusals(Path(model.path))
    for setting, path in Implied(config).checkpoints.items():
        yield from _folder(setting, path)
    if model.tokenizer is not None and not Path(model.tokenizer).exists():
        fix = "give a tokenizer directory or a sentencepiece .model file"
        yield Refusal(f"model.tokenizer={model.tokenizer}", "does not exist", fix)
    evaluation = config.data.model_copy(
        update={"path": config.evaluation.path, "sources": config.evaluation.sources, "max_rows": None}
    )
    sources = [*each_source(config.data), *each_source(evaluation, "evaluation")]
    if (demonstrations := config.data.of_demonstrations()) is not None:
        sources += each_source(demonstrations, DEMONSTRATIONS)
    for source in sources:
        path = source.settings.path
        if path is not None and path.lower().endswith(DATA_SUFFIXES):
            yield from _data_file(source.key, path)
    if config.rollout.replay is not None and not Path(config.rollout.replay).exists():
        fix = "give a file or a rollouts/ folder that a run with rollout.save=true wrote"
        yield Refusal(f"rollout.replay={config.rollout.replay}", "does not exist", fix)
    if config.resume == "must":
        folder = Path(config.runs_dir) / config.name / "checkpoints"
        if not folder.is_dir() or not any(folder.iterdir()):
            yield Refusal(
                "resume=must",
                f"needs a checkpoint in {folder}",
                "use resume=auto to start a new run where there is none",
            )


def checkpoint_refusals(folder: Path) -> Iterator[Refusal]:
    """What is missing or cut short among a Hugging Face checkpoint's weight files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            yield Refusal(str(index), "must be JSON with a weight_map", "copy the checkpoint again")
            return
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        rule = "must hold weights as *.safetensors"
        yield Refusal(
            f"model.path={folder}", rule, "give a complete checkpoint, or set model.random_init=true or model.weights"
        )
    whole, tensors = True, {}
    for name in names:
        file = folder / name
        found = tensors_of(file) if file.is_file() else None
        if found is None:
            wrong = (
                "is cut short or not a safetensors file" if file.is_file() else f"is named in {index.name} and missing"
            )
            yield Refusal(str(file), wrong, "copy the checkpoint again")
            whole = False
        else:
            # An entry that lacks them is refused where the file is read.
            tensors |= {
                tensor: (entry.get("dtype", ""), tuple(entry.get("shape", ()))) for tensor, entry in found.items()
            }
    if whole:
        yield from scales_refusals(tensors, str(folder))


def tensors_of(file: Path) -> dict[str, Any] | None:
    """The tensors of a safetensors file as its header has them, by name; None where it is no such file, or its size is
    not what the header says: 8 bytes of length, a JSON header, the tensors' bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > size - 8:
            return None
        try:
            header = json.loads(stream.read(header_size))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None
    return tensors if size == 8 + header_size + end else None


def _folder(key: str, path: str) -> Iterator[Refusal]:
    if not Path(path).is_dir():
        yield Refusal(f"{key}={path}", "is not a directory", "give a megarl checkpoint, or a run's checkpoints/ folder")


def _data_file(key: str, path: str) -> Iterator[Refusal]:
    file = Path(path)
    if not file.is_file():
        yield Refusal(f"{key}={path}", "no such file", "give a path relative to the working directory, or a hub name")
    elif file.stat().st_size == 0:
        yield Refusal(f"{key}={path}", "is empty", "give a file with at least one row")
