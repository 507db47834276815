"""The folders that checkpoints lie in: which is the newest whole one, and what was noted beside its weights.

`checkpoints/step_000010/` holds Megatron's files and `progress.json`, which lists them with their sizes and checksums;
`checkpoints/latest` names the newest complete one. Torch-free.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megarl.config.adapters import AdapterSettings
from megarl.config.model_shape import ModelShape
from megarl.errors import Refusal
from megarl.formats import checksums, durable
from megarl.formats.checksums import StoredFile

#: What progress.json says of itself. A change that this version's reader would misunderstand takes the next number.
#: Weights are read from every format, a run continues from this one alone.
FORMAT = 2
#: The last version of megarl that continues from a checkpoint of an earlier format.
LAST_VERSIONS = {1: "0.1.0"}
#: What the names of tensors begin with that are not the policy's own but those of a set that trains beside it.
SETS = "sets."


class Damaged(Refusal):
    """A checkpoint that is not whole; `damage` says in words what is wrong with it."""

    def __init__(self, checkpoint: Path, damage: str) -> None:
        fix = "copy it again, or use an earlier one; without any, remove the folder to start from the beginning"
        super().__init__(str(checkpoint), f"must be a complete checkpoint, but {damage}", fix)
        self.checkpoint, self.damage = checkpoint, damage

    def __reduce__(self) -> Any:
        return Damaged, (self.checkpoint, self.damage)


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
    directory: Path, shape: ModelShape, facts: Mapping[str, Any], measured: Mapping[str, StoredFile] | None = None
) -> None:
    """Write progress.json, last of a checkpoint's files: `facts`, the model's sizes, the files' sizes and checksums.

    Of the facts a checkpoint must have `step` and `optimizer`: whether it holds the optimizer's state. `measured` are
    the files that others have read already; the rest is read here.
    """
    known = dict(measured or {})
    known |= {name: checksums.measure(directory / name) for name in file_names(directory) if name not in known}
    files = {name: known[name]._asdict() for name in sorted(known)}
    # As it will be read again, with JSON's own types.
    content = json.loads(json.dumps({**facts, "format": FORMAT, "model": _sizes(shape), "files": files}))
    durable.replace_text(directory / "progress.json", json.dumps(content | {"checksum": _checksum(content)}))


def read_progress(directory: Path) -> dict[str, Any]:
    """What was saved beside the weights.

    Raises `Refusal` where a newer version of megarl wrote it, `Damaged` where it is not what was written.
    """
    found = json.loads((directory / "progress.json").read_text(encoding="utf-8"))
    stated = found.pop("checksum", None)
    # First, and the same in every format: the number of the format may be what was altered.
    if stated is not None and stated != _checksum(found):
        raise Damaged(directory, "has another progress.json than was saved")
    if found.get("format", FORMAT) > FORMAT:
        raise Refusal(
            f"{directory} of format {found['format']}",
            f"was written by a newer megarl; this one reads formats up to {FORMAT}",
            "update megarl, or continue from an earlier checkpoint with model.weights",
        )
    return found


def _checksum(content: Mapping[str, Any]) -> str:
    """Of all that progress.json says but this."""
    return checksums.of_text(json.dumps(content, sort_keys=True))


def file_names(directory: Path) -> list[str]:
    """Megarl's note apart, the files of a checkpoint."""
    return [file.name for file in sorted(directory.iterdir()) if file.is_file() and file.name != "progress.json"]


def check_resumable(directory: Path, progress: Mapping[str, Any]) -> None:
    """Raise `Refusal` where a checkpoint lacks what a run needs to go on, or has it in an earlier version's form."""
    if (written := progress.get("format", 1)) < FORMAT:
        last = LAST_VERSIONS[written]
        raise Refusal(
            f"{directory} of format {written}",
            f"was saved by an older megarl, and {last} is the last version that continues from it",
            f"finish the run with megarl {last}, or start a new one with model.weights set to it",
        )
    if not progress["optimizer"]:
        raise Refusal(
            str(directory),
            "was saved without the optimizer's state, so the run cannot continue from it",
            "start a new run with model.weights set to it, or save with checkpoint.optimizer=true",
        )


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


def adapter_facts(adapter: AdapterSettings) -> dict[str, Any]:
    """What a checkpoint says of an adapter."""
    return {"rank": adapter.rank, "alpha": adapter.alpha, "targets": sorted(set(adapter.targets))}


def check_adapter(
    directory: Path, progress: Mapping[str, Any], adapter: AdapterSettings | None, alone: bool, *, resumes: bool
) -> None:
    """Raise `Refusal` where what a checkpoint holds (all weights, these with an adapter beside them, or an adapter
    alone) is not for a run with `adapter`, which trains `alone` or beside all weights.

    All weights can be the base of an adapter, but with `resumes`, where the run goes on from what was trained.
    """
    saved = progress.get("adapter", progress.get("beside"))
    if saved is None:
        if adapter is not None and resumes and alone:
            raise Refusal(
                "parameters=adapter",
                f"trains an adapter alone, and {directory} was saved by a run that trains all weights",
                "set parameters=policy, or start a new run with model.weights set to it",
            )
        if adapter is not None and resumes:
            raise Refusal(
                str(directory),
                "was saved by a run without an adapter, and this one trains an adapter beside all weights",
                "set back what trained without one, or start a new run with model.weights set to it",
            )
        return
    if "adapter" in progress and not alone:
        raise Refusal(
            "parameters=policy",
            f"needs all weights, and {directory} holds an adapter alone",
            "set parameters=adapter and the adapter's settings, or use the run's merged model (hf/) as model.path",
        )
    if adapter is None or ("beside" in progress and alone):
        raise Refusal(
            str(directory),
            "holds a base and an adapter that are one policy together, and this run "
            + ("trains an adapter alone" if alone else "has no adapter"),
            "use the run's merged model (hf/, or converted) as model.path",
        )
    for name, value in adapter_facts(adapter).items():
        if saved[name] != value:
            raise Refusal(
                f"adapter.{name}={_shown(value)}",
                f"differs from {_shown(saved[name])}, with which {directory} was trained",
                "set it back, or start a new run under another name",
            )


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else f"{value:g}"


def _sizes(shape: ModelShape) -> dict[str, Any]:
    """As they are read from JSON again."""
    found = {name: getattr(shape, name) for name in _SIZES}
    return found | {"sparse_layers": list(shape.sparse_layers)}


def check_whole(directory: Path) -> None:
    """Raise `Damaged` where files of a checkpoint are missing or of another size."""
    if (damage := damage_of(directory)) is not None:
        raise Damaged(directory, damage)


def altered(directory: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with the bytes of a checkpoint's files, or of those named, in words; None where they are as saved.

    Reads them from end to end.
    """
    recorded: dict[str, Any] = read_progress(directory)["files"]
    chosen = list(recorded if names is None else names)

    def differs(name: str) -> str | None:
        try:
            found = checksums.measure(directory / name)
        except OSError as error:
            return f"has a file {name} that cannot be read ({error.strerror})"
        return None if found == StoredFile(**recorded[name]) else f"has other bytes in its file {name} than were saved"

    # Reading and hashing let go of Python's lock.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return next((said for said in pool.map(differs, chosen) if said is not None), None)


def find(path: str | Path, passed_over: Mapping[Path, str] | None = None) -> Path | None:
    """The checkpoint that `path` means, or None without one.

    `path` is a checkpoint itself, or a folder whose `latest` (or that of its checkpoints/) names one. Where that one
    is damaged or in `passed_over`, which says what is wrong with it, the newest whole one before it is found; where
    `latest` is missing, which is written after the folder has its name, the newest whole one of all. Raises `Damaged`
    where damaged ones are all there is. Sizes are looked at here; bytes by `altered`.
    """
    path = Path(path)
    if (path / "progress.json").is_file() or (path.name.startswith("step_") and path.is_dir()):
        candidates = [path]
    else:
        candidates = _candidates(path)
        if not candidates:
            return None
    damages = [damage_of(candidate) or (passed_over or {}).get(candidate) for candidate in candidates]
    for candidate, damage in zip(candidates, damages, strict=True):
        if damage is None:
            return candidate
    raise Damaged(candidates[0], str(damages[0]))


def _candidates(path: Path) -> list[Path]:
    """The checkpoints of a run's folder that it may continue from, newest first."""
    named = _named(path)
    if named is None:
        return _finished(path) or _finished(path / "checkpoints")
    # What an earlier run of that name left beyond `latest` is none of this one's.
    return [directory for directory in _finished(named.parent) if _step(directory) <= _step(named)] or [named]


def holds_a_run(path: Path) -> bool:
    """Whether an earlier run has left metrics or checkpoints in the folder `path`."""
    return (path / "metrics.jsonl").exists() or bool(_finished(path / "checkpoints"))


def survey(path: Path) -> list[tuple[Path, str | None]]:
    """All checkpoints of a run's folder, newest first, with what is wrong with each in words, or None."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return [(directory, damage_of(directory)) for directory in _finished(root)]


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
    name = "" if root is None else (root / "latest").read_text(encoding="utf-8", errors="replace").strip()
    # One that a broken disk or a hand has left without a checkpoint's name is as good as none.
    return root / name if root is not None and _is_name(name) else None


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


def publish(partial: Path, final: Path, *, keep: int, keep_every: int) -> None:
    """Give a complete checkpoint its name and point `latest` at it, with all of it on the disk first.

    Then those before it are removed, but for the newest `keep` and, where `keep_every` is not 0, those of every so many
    steps. At no moment is there less than before.
    """
    root = final.parent
    durable.sync_tree(partial)
    replaced = root / f"{final.name}.partial.replaced"
    if final.exists():
        # A damaged one, which the run did not continue from.
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    durable.replace_text(root / "latest", final.name)
    # Those beyond it are none that this run can continue from.
    for directory in [found for found in _finished(root) if _step(found) <= _step(final)][keep:]:
        kept_for_good = keep_every > 0 and _step(directory) % keep_every == 0
        if directory != final and not kept_for_good:
            shutil.rmtree(directory, ignore_errors=True)
    remove_unfinished(root)


def remove_unfinished(root: Path) -> None:
    """Remove what saves that did not come to their end have left in a run's checkpoints/."""
    for left_over in root.glob("step_*.partial*"):
        shutil.rmtree(left_over, ignore_errors=True)


def _finished(root: Path) -> list[Path]:
    """Checkpoints that were renamed to their final name, newest first."""
    found = [d for d in root.glob("step_*") if d.is_dir() and _is_name(d.name)]
    return sorted(found, key=_step, reverse=True)


def _is_name(name: str) -> bool:
    return re.fullmatch(r"step_[0-9]+", name) is not None


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step_"))


def damage_of(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words, without reading its tensors; None where nothing is."""
    try:
        progress = read_progress(directory)
        expected = {name: StoredFile(**stored) for name, stored in progress["files"].items()}
        if not isinstance(progress["step"], int) or not {"optimizer", "model"} <= progress.keys():
            return "has a progress.json without what every checkpoint states"
    except Damaged as error:
        return error.damage
    except FileNotFoundError:
        return "has no progress.json, which is written last"
    except (ValueError, KeyError, TypeError):
        return "has a progress.json that cannot be read"
    for name, stored in expected.items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            return f"has lost its file {name}"
        if size != stored.bytes:
            return f"has {size} of the {stored.bytes} bytes of its file {name}"
    return None
