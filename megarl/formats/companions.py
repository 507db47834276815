"""The files of a Hugging Face checkpoint beside its weights: configuration, tokenizer, chat template. Torch-free."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    # Mistral's own forms of the tokenizer.
    "tokenizer.model.v3",
    "tekken.json",
)
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def copy_companions(source: Path, target: Path, dtype: str | None = None) -> None:
    """Copy those that `source` has; with `dtype`, such as bfloat16, config.json states it as the weights' type.

    In one way, that of transformers since 4.56: older files have torch_dtype, and some have both.
    """
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if dtype is None:
        return
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    if "torch_dtype" in config or config.get("dtype") != dtype:
        config.pop("torch_dtype", None)
        text = json.dumps(config | {"dtype": dtype}, indent=2, ensure_ascii=False)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The type of the weights that a config.json states, as torch names it, or None."""
    return config.get("dtype") or config.get("torch_dtype")
