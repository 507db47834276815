"""The folders that checkpoints lie in: which is the newest whole one, and what was noted beside its weights.

`checkpoints/step_000010/` holds Megatron's files and `progress.json`, which lists them with their sizes;
`checkpoints/latest` names the newest complete one. Torch-free.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarl.config.model_shape import ModelShape
from megarl.errors import Refusal

#: What two models must share to hold the same tensors.
_SIZES = (
    "family",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_size",
    "vocab_size",
    "tied_embeddings",
    "qkv_bias",
    "qk_norm",
    "num_experts",
    "expert_ffn_size",
    "shared_expert_ffn_size",
    "attention_out_bias",
    "sparse_layers",
)


def write_progress(
    directory: Path, shape: ModelShape, facts: Mapping[str, Any], known_sizes: Mapping[str, int] | None = None
) -> None:
    """Write progress.json, last of a checkpoint's files: `facts`, the model's sizes and the files' sizes in bytes.

    Of the facts a checkpoint must have `step` and `optimizer`: whether it holds the optimizer's state. `known_sizes`
    are those of files that another host wrote, of which this one may see an older state.
    """
    content = {**facts, "model": _sizes(shape), "files": _files(directory) | dict(known_sizes or {})}
    (directory / "progress.json").write_text(json.dumps(content))


def read_progress(directory: Path) -> dict[str, Any]:
    """What was saved beside the weights."""
    return json.loads((directory / "progress.json").read_text())


def check_model(directory: Path, progress: Mapping[str, Any], shape: ModelShape) -> None:
    """Raise `Refusal` where a checkpoint is of another model."""
    own = _sizes(shape)
    for name, size in progress["model"].items():
        if own[name] != size:
            raise Refusal(
                f"{directory} of a model with {name}={size}",
                f"must be of the model in config.json, which has {name}={own[name]}",
                "use the config.json that the checkpoint was made with (a run's model.path)",
            )


def _sizes(shape: ModelShape) -> dict[str, Any]:
    """As they are read from JSON again."""
    found = {name: getattr(shape, name) for name in _SIZES}
    return found | {"sparse_layers": list(shape.sparse_layers)}


def check_whole(directory: Path) -> None:
    """Raise `Refusal` where a checkpoint is damaged."""
    if (damage := _damage(directory)) is not None:
        raise _refusal(str(directory), damage)


def find(path: str | Path) -> Path | None:
    """The checkpoint that `path` means, or None without one.

    `path` is a checkpoint itself, or a folder whose `latest` (or that of its checkpoints/) names one. Where that one
    is damaged, the newest whole one before it is found. Raises `Refusal` where damaged ones are all there is.
    """
    path = Path(path)
    if (path / "progress.json").is_file() or (path.name.startswith("step_") and path.is_dir()):
        candidates = [path]
    else:
        named = _named(path)
        if named is None:
            return None
        earlier = (directory for directory in _finished(named.parent) if directory.name <= named.name)
        candidates = sorted(earlier, reverse=True) or [named]
    damages = [_damage(candidate) for candidate in candidates]
    for candidate, damage in zip(candidates, damages, strict=True):
        if damage is None:
            return candidate
    raise _refusal(str(candidates[0]), damages[0] or "")


def survey(path: Path) -> list[tuple[Path, str | None]]:
    """All checkpoints of a run's folder, newest first, with what is wrong with each in words, or None."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return [(directory, _damage(directory)) for directory in sorted(_finished(root), reverse=True)]


def newest(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the one that its `latest` (or that of its checkpoints/) names.

    Raises `Refusal` where it is damaged, whatever there is beside it. A folder without megarl's notes is itself.
    """
    path = _named(Path(path)) or Path(path)
    if (path / "progress.json").is_file():
        check_whole(path)
    return path


def _named(path: Path) -> Path | None:
    """The checkpoint that the `latest` in `path`, or in its checkpoints/, names, whether it is there or not."""
    root = next((r for r in (path, path / "checkpoints") if (r / "latest").is_file()), None)
    return None if root is None else root / (root / "latest").read_text().strip()


def require(path: str | Path, setting: str) -> Path:
    """`find`, or a `Refusal` that names the setting."""
    found = find(path)
    if found is None:
        raise Refusal(
            f"{setting}={path}",
            "must be a checkpoint, or a folder whose `latest` names one",
            "give a checkpoints/step_... directory, or a run's folder",
        )
    return found


def hf_folder(checkpoint: Path) -> Path:
    """Where configuration and tokenizer of a checkpoint's model are: beside its weights, or in the run's model.path.

    Raises `Refusal` where neither is known.
    """
    if (checkpoint / "hf" / "config.json").is_file():
        return checkpoint / "hf"
    noted = read_progress(checkpoint).get("model_path") if (checkpoint / "progress.json").is_file() else None
    if noted is not None and (Path(noted) / "config.json").is_file():
        return Path(noted)
    raise Refusal(
        str(checkpoint),
        "does not say where its model's config.json and tokenizer are",
        "give their directory as --hf-config",
    )


def publish(partial: Path, final: Path, keep: int) -> None:
    """Give a complete checkpoint its name, point `latest` at it, and keep the newest `keep`."""
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _replace_text(final.parent / "latest", final.name)
    for directory in sorted(_finished(final.parent))[:-keep]:
        if directory != final:
            shutil.rmtree(directory, ignore_errors=True)


def _replace_text(file: Path, text: str) -> None:
    fresh = file.with_name(file.name + ".new")
    with open(fresh, "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    fresh.replace(file)


def _finished(root: Path) -> list[Path]:
    """Checkpoints that were renamed to their final name."""
    return [d for d in root.glob("step_*") if d.is_dir() and not d.name.endswith(".partial")]


def _files(directory: Path) -> dict[str, int]:
    """Sizes in bytes of Megatron's files."""
    files = (file for file in sorted(directory.iterdir()) if file.is_file())
    return {file.name: file.stat().st_size for file in files if file.name != "progress.json"}


def _damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole."""
    try:
        expected: dict[str, int] = read_progress(directory)["files"]
    except FileNotFoundError:
        return "has no progress.json, which is written last"
    except (ValueError, KeyError):
        return "has a progress.json that cannot be read"
    present = _files(directory)
    for name, size in expected.items():
        if name not in present:
            return f"has lost its file {name}"
        if present[name] != size:
            return f"has {present[name]} of the {size} bytes of its file {name}"
    return None


def _refusal(checkpoint: str, damage: str) -> Refusal:
    fix = "copy it again, or use an earlier one; without any, remove the folder to start from the beginning"
    return Refusal(checkpoint, f"must be a complete checkpoint, but {damage}", fix)
