"""The JSON files of a model's folder, and what else in it decides how the libraries read it. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megarl.config.model_reading import differing, restore, shown
from megarl.errors import Refusal


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face checkpoint.

    Raises `Refusal` where the folder is none, or holds something else: an adapter, GGUF files, quantized weights.
    """
    _check_kind(folder)
    found = read_json(folder / "config.json")
    assert found is not None
    return found


def read_generation(folder: Path) -> dict[str, Any] | None:
    """`generation_config.json`, None where there is none. Raises `Refusal` where it cannot be read."""
    return read_json(folder / "generation_config.json")


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file.

    Raises `Refusal` where it is no JSON object, and where it says one thing twice and differently.
    """
    if not file.is_file():
        return None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        for key, value in pairs:
            if found[key] is not value and found[key] != value:
                raise differing({key: value, f"{key} again": found[key]}, str(file))
        return found

    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise Refusal(str(file), f"cannot be read ({error.strerror})", "make it readable") from None
    except RecursionError:
        raise Refusal(str(file), "must be JSON, and is nested too deeply", restore(file.name)) from None
    except ValueError as error:
        raise Refusal(
            str(file), f"must be JSON ({shown(str(error), 200)[1:-1]})", "restore the file from the original checkpoint"
        ) from None
    if not isinstance(raw, dict):
        raise Refusal(str(file), "must be a JSON object", "restore the file from the original checkpoint")
    return raw


def _check_kind(folder: Path) -> None:
    value = f"model.path={folder}"
    weights = {file.name for suffix in ("safetensors", "bin") for file in folder.glob(f"*.{suffix}")}
    # A whole model that was trained with an adapter may keep its notes.
    if (folder / "adapter_config.json").is_file() and weights <= {"adapter_model.safetensors", "adapter_model.bin"}:
        raise Refusal(
            value,
            "is an adapter (adapter_config.json), not a whole model",
            "merge it into its base model (peft's merge_and_unload), save that, and give its folder",
        )
    if (folder / "config.json").is_file():
        if (folder / "hf_quant_config.json").is_file():
            raise Refusal(
                value,
                "holds quantized weights (hf_quant_config.json), and only whole ones are trained",
                "use the checkpoint that they were made from",
            )
        return
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf"))):
        raise Refusal(value, "holds GGUF files, which are not trained", "use the checkpoint that they were made from")
    if folder.is_dir() and (folder / "params.json").is_file():
        raise Refusal(
            value,
            "holds a model in its maker's own format (params.json)",
            "use the model in Hugging Face's format, with a config.json",
        )
    raise Refusal(value, "must be a Hugging Face checkpoint directory with a config.json", "give an existing directory")
