"""The rotary embedding of a model, from the keys and spellings in which a `config.json` may say it. Torch-free.

Read as transformers does (`RotaryEmbeddingConfigMixin`), which vLLM goes by: `rope_scaling` comes before
`rope_parameters`; the base stands in either or beside them; so does the length that yarn and llama3 start from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.config.model_keys import ROPE_THETA, ROPE_THETA_OF, Key, is_number
from megarl.config.model_reading import RESTORE, check_value, differing, shown
from megarl.errors import Refusal

#: Rotary scalings: the numbers that each needs, and what may stand beside them.
ROPE_FACTORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
_NAMES = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
#: A scaling beyond this is a mistake: vLLM lays a table of that many times the positions.
LARGEST_FACTOR = 1024


@dataclass(frozen=True, slots=True)
class Rope:
    """Base, scaling with everything that its formula needs (empty for none), and the positions that it reaches."""

    theta: float
    scaling: dict[str, Any]
    reach: int | None = None


def read_rope(raw: dict[str, Any], family: str, positions: int, origin: str) -> Rope:
    """The rotary embedding in `raw`; `positions` is max_position_embeddings.

    Raises `Refusal` for a scaling that the policy lacks, wrong or missing numbers, and contradictions.
    """
    _whole_heads(raw.get("partial_rotary_factor"), origin)
    read: dict[str, Rope] = {}
    for name in ("rope_scaling", "rope_parameters"):
        found = raw.get(name)
        if found is not None and not isinstance(found, dict):
            raise Refusal(f"{name}={shown(found)} in {origin}", "must be a table, or null", RESTORE)
        if found:
            read[name] = _read(name, found, raw, family, positions, origin)
    if not read:
        return _read("rope_parameters", {}, raw, family, positions, origin)
    if len(read) == 2 and read["rope_scaling"] != read["rope_parameters"]:
        raise differing({name: raw[name] for name in read}, origin)
    return next(iter(read.values()))


def _read(name: str, found: dict[str, Any], raw: dict[str, Any], family: str, positions: int, origin: str) -> Rope:
    """One of the two spellings, with what stands beside it."""
    if any(isinstance(value, dict) for value in found.values()):
        raise Refusal(
            f"{name}={shown(found)} in {origin}", "must be one scaling for all layers", "use a model with one"
        )
    theta = _one_of("rope_theta", name, found, raw, ROPE_THETA_OF.get(family, ROPE_THETA), origin)
    if not is_number(theta) or theta <= 1:
        raise Refusal(f"rope_theta={shown(theta)} in {origin}", "must be a number above 1", RESTORE)
    if "partial_rotary_factor" in found:
        _whole_heads(found["partial_rotary_factor"] or 0, origin)
    kind = found.get("rope_type", found.get("type", "default"))
    if "type" in found and kind != found["type"]:
        raise differing({"rope_type": kind, "type": found["type"]}, origin)
    if not isinstance(kind, str) or kind not in ROPE_FACTORS:
        kinds = list(ROPE_FACTORS)
        rule = f"must be {', '.join(kinds[:-1])} or {kinds[-1]}"
        raise Refusal(f"rope_type={shown(kind)} in {origin}", rule, "use a model with one of these")
    if kind == "default":
        _check_known(name, kind, found, set(), origin)
        return Rope(float(theta), {})
    needed, optional = ROPE_FACTORS[kind]
    for key in needed:
        if key not in found:
            raise Refusal(f"{origin} without {key}", f"a {kind} scaling needs it", RESTORE)
    # What linear does not read, transformers and vLLM pass over too.
    _check_known(name, kind, found, {*needed, *optional, "original_max_position_embeddings"}, origin)
    scaling = {"rope_type": kind} | {key: found[key] for key in (*needed, *optional) if found.get(key) is not None}
    original = None
    if "original_max_position_embeddings" in optional:
        original = _one_of("original_max_position_embeddings", name, found, raw, positions, origin)
        check_value("original_max_position_embeddings", original, Key(None, "whole"), origin)
        scaling["original_max_position_embeddings"] = original
    _check_numbers(kind, scaling, found, origin)
    # vLLM's table for yarn ends where the scaling does.
    reach = int(original * scaling["factor"]) if kind == "yarn" and original is not None else None
    return Rope(float(theta), scaling, reach)


def _one_of(key: str, name: str, found: dict[str, Any], raw: dict[str, Any], default: Any, origin: str) -> Any:
    """What stands in the table `found`, beside it, or in neither place."""
    if key in found and key in raw and found[key] != raw[key]:
        raise differing({f"{name}.{key}": found[key], key: raw[key]}, origin)
    return found.get(key, raw.get(key, default))


def _check_known(name: str, kind: str, found: dict[str, Any], known: set[str], origin: str) -> None:
    for key, value in found.items():
        if key not in known | _NAMES:
            raise Refusal(
                f"{name}.{shown(key)[1:-1]}={shown(value)} in {origin}",
                f"is no number of a {kind} scaling",
                "say by rope_type which scaling is meant, or remove it",
            )


def _check_numbers(kind: str, scaling: dict[str, Any], found: dict[str, Any], origin: str) -> None:
    for key, value in found.items():
        if key in _NAMES or (key not in scaling and value is not None):
            continue
        if key == "truncate":
            check_value(key, value, Key(True, "switch"), origin)
        elif key == "factor" and not (is_number(value) and 1 <= value <= LARGEST_FACTOR):
            rule = f"must be a number of at least 1 and at most {LARGEST_FACTOR}"
            raise Refusal(f"factor={shown(value)} in {origin}", rule, RESTORE)
        # These may be null, by both libraries' reading.
        elif not is_number(value) and not (value is None and key in ("attention_factor", "mscale", "mscale_all_dim")):
            raise Refusal(f"{key}={shown(value)} in {origin}", "must be a number above 0", RESTORE)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise Refusal(
            f"high_freq_factor={scaling['high_freq_factor']} in {origin}",
            f"must be above low_freq_factor={scaling['low_freq_factor']}",
            RESTORE,
        )


def _whole_heads(share: Any, origin: str) -> None:
    if share is not None and (isinstance(share, bool) or share != 1):
        raise Refusal(
            f"partial_rotary_factor in {origin}",
            f"must be 1, and is {shown(share)}: heads are rotated whole",
            "use another model",
        )
