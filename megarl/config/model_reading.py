"""One reading of a model's `config.json`: every key once, by the name that transformers has for it. Torch-free.

What is spelled in two ways is brought to one, and refused where the two differ; what is left out is transformers'
default for the family; what the policy does not know is refused (`megarl.config.model_keys`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.config.model_keys import (
    FOREIGN,
    HARMLESS_IN,
    KEYS,
    LARGEST,
    LENGTH_KEYS,
    ROPE_KEYS,
    SPELLINGS,
    WITHOUT_EFFECT,
    Key,
)
from megarl.config.quantisation import check_quantization
from megarl.errors import Refusal

#: Sizes without which a file is not whole. All that transformers saves has them, and nobody means its defaults.
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

RESTORE = "restore the original config.json"


def restore(origin: str) -> str:
    """As `RESTORE`, for the file that `origin` names."""
    return f"restore the original {Path(origin).name}"


#: Read where they are needed, whether or not they are fields of the family's class.
_READ_ELSEWHERE = frozenset({"model_type", "head_dim", "layer_types", "sliding_window", *LENGTH_KEYS, *ROPE_KEYS})


def shown(value: Any, longest: int = 80) -> str:
    """A value of a file as it stands in a message, cut to so many characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no whole numbers of more than 4300 digits.
        text = "what is too long to show"
    return text if len(text) <= longest else text[:longest] + "..."


def differing(keys: dict[str, Any], origin: str) -> Refusal:
    """Two spellings of one fact that say different things."""
    said = " and ".join(f"{key}={shown(value)}" for key, value in keys.items())
    return Refusal(f"{said} in {origin}", "must be the same, as both say one thing", "remove the one that is wrong")


def read_keys(raw: dict[str, Any], family: str, origin: str) -> dict[str, Any]:
    """The fields of transformers' class for `family`, as it would read them; rotary keys as they stand.

    Raises `Refusal` for values that it does not take, contradictions, and keys that are not known to do nothing.
    """
    fields = KEYS[family]
    for key, value in raw.items():
        if key not in fields and key not in _READ_ELSEWHERE:
            _check_foreign(key, value, family, origin)
    spelled = {key: value for key, value in raw.items() if key in fields}
    for other, key in (SPELLINGS[""] | SPELLINGS.get(family, {})).items():
        if other not in raw:
            continue
        check_value(other, raw[other], fields[key], origin)
        if raw.get(key) is not None and raw[other] is not None and raw[key] != raw[other]:
            raise differing({other: raw[other], key: raw[key]}, origin)
        if spelled.get(key) is None:
            spelled[key] = raw[other]
    missing = [key for key in NEEDED if key not in spelled]
    if missing:
        raise Refusal(f"{origin} without {', '.join(missing)}", "every size must be given", RESTORE)
    for key, value in spelled.items():
        check_value(key, value, fields[key], origin)
    return {key: spelled.get(key, field.default) for key, field in fields.items()}


def positions_of(raw: dict[str, Any], keys: dict[str, Any], origin: str) -> int:
    """The most positions that both policy and engine have: vLLM takes the least of several keys."""
    lengths = [keys["max_position_embeddings"]]
    for key in LENGTH_KEYS:
        if raw.get(key) is None:
            continue
        # Of tokenizers: "no limit" as a number with thirty digits, which some tools copy here.
        check_value(key, raw[key], Key(None, "whole", most=10**30 + 10**15), origin)
        lengths.append(raw[key])
    return min(lengths)


def check_value(name: str, value: Any, key: Key, origin: str) -> None:
    """Refuse what transformers' class or the policy does not take."""
    if key.allows(value):
        return
    fix = restore(origin)
    if isinstance(value, int) and not isinstance(value, bool) and key.kind == "fraction" and 0 < value < LARGEST:
        fix = f"write it as {float(value)}"
    raise Refusal(f"{name}={shown(value)} in {origin}", f"must be {key.rule}", fix)


def _check_foreign(key: str, value: Any, family: str, origin: str) -> None:
    """Refuse a key that is no field of the family's class, unless it is known to change nothing."""
    known = WITHOUT_EFFECT | HARMLESS_IN.get(family, frozenset()) | (SPELLINGS[""] | SPELLINGS.get(family, {})).keys()
    said = f"{shown(key)[1:-1]}={shown(value)} in {origin}"
    if key in known:
        return
    if key == "quantization_config":
        if value is not None:
            check_quantization(value, origin)
    elif key == "num_labels":
        check_value(key, value, Key(2, "whole", most=10000), origin)
    elif key not in FOREIGN:
        raise Refusal(
            said,
            f"is not known for {family}: transformers or the engine may obey it, the policy does not",
            "remove it if the weights were trained without it, or use another model",
        )
    elif value not in (foreign := FOREIGN[key])[0]:
        value_said = f"{key} in {origin}" if isinstance(value, dict) else said
        raise Refusal(value_said, foreign[1], foreign[2].format(family=family))
