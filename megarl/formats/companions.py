"""The files of a Hugging Face checkpoint beside its weights: configuration, tokenizer, chat template. Torch-free."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Patterns of a tokenizer's files in all the forms that transformers and the model's makers have for it.
TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
)
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of `source` that fit one of `patterns`, each to the same place in `target`."""
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                place = target / file.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)


def copy_companions(
    source: Path, target: Path, dtype: str | None = None, quantization: Mapping[str, Any] | None = None
) -> None:
    """Copy those that `source` has; with `dtype`, such as bfloat16, config.json states it as the weights' type, and
    `quantization` as what some of them are quantised by.

    In one way, that of transformers since 4.56: older files have torch_dtype, and some have both.
    """
    copy_files(source, target, COMPANIONS)
    if dtype is None:
        return
    before = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in before.items() if key not in ("torch_dtype", "quantization_config")}
    config |= {"dtype": dtype} | ({} if quantization is None else {"quantization_config": quantization})
    if config != before:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The type of the weights that a config.json states, as torch names it, or None."""
    return config.get("dtype") or config.get("torch_dtype")
