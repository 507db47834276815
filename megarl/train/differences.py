"""How a run differs from the one that left a checkpoint: in what makes it another run, or in settings. Torch-free.

A checkpoint keeps the configuration that it was trained with. A run that continues from it may have other settings,
which are said and kept; other data, another model or another seed would make it another run, and are refused unless
`resume_changes` names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.records import Prompt

#: The parts of a run that make it what it is; the choices of `resume_changes`.
PARTS = ("seed", "model", "data")
#: Settings and sections that change no number of a run by more than rounding, or that are there to be changed.
_FREE = (
    "name", "runs_dir", "resume", "resume_changes", "steps", "epochs", "gpus", "reproduces", "parallel", "recompute",
    "checkpoint", "logging",
    "weights", "health", "rollout.tensor", "rollout.expert_parallel", "rollout.chunk", "rollout.max_concurrent",
    "rollout.kv_cache_gib", "rollout.gpu_memory_fraction", "rollout.save", "rollout.keep_unfinished", "reward.workers",
    "evaluation.save",
    "batch.tokens_per_microbatch", "batch.packed", "batch.logprob_chunk",
)  # fmt: skip


def changed_parts(config: RunConfig, before: Mapping[str, Any], checkpoint: Path) -> Iterator[Refusal]:
    """Refusals of a seed, a model or data, and of settings that the algorithm wants kept, that differ from those
    `before`, of a checkpoint's configuration."""
    for key, old, new in _all_differences(config, before):
        if key in config.algorithm.kept_on_resume:
            yield Refusal(
                f"{key}={_shown(new)} with resume={config.resume}",
                f"differs from {_shown(old)}, with which {checkpoint} was trained",
                "set it back, or begin a new run under another name",
            )
    for key, old, new in _differences(config, before):
        part = key.partition(".")[0]
        if part in PARTS and part not in config.resume_changes:
            yield Refusal(
                f"{key}={_shown(new)} with resume={config.resume}",
                f"differs from {_shown(old)}, with which {checkpoint} was trained",
                f"set it back, begin a new run under another name, or go on all the same with resume_changes=[{part}]",
            )


def rows_of(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The number of prompts that are trained on, and a digest of them: the same file may have other rows."""
    digest = hashlib.sha256()
    for prompt in prompts:
        solution = [] if prompt.solution is None else [prompt.solution]
        digest.update(json.dumps([prompt.index, prompt.text, prompt.answer, *solution]).encode())
    return {"prompts": len(prompts), "digest": digest.hexdigest()}


def changed_rows(
    config: RunConfig, found: Mapping[str, Any], known: Mapping[str, Any], checkpoint: Path, what: str = "data"
) -> Iterator[Refusal]:
    """A refusal of other rows, by `rows_of`, than a checkpoint's `known`; `what` they are."""
    if known != found and "data" not in config.resume_changes:
        yield Refusal(
            f"{what} of {found['prompts']} prompts with resume={config.resume}",
            f"has other rows than those that {checkpoint} was trained on, {known['prompts']} prompts",
            "bring the data back, begin a new run under another name, or go on all the same with resume_changes=[data]",
        )


def changes(config: RunConfig, before: Mapping[str, Any], checkpoint: Path) -> str | None:
    """A sentence about what differs from a checkpoint's configuration `before`; None where nothing of weight does."""
    words = ", ".join(f"{key}={_shown(new)} (was {_shown(old)})" for key, old, new in _differences(config, before))
    return f"continues {checkpoint.name} with other settings: {words}" if words else None


def begun_anew(config: RunConfig, before: Mapping[str, Any], *, other_rows: bool) -> dict[str, str]:
    """The carried states that say nothing to a run of this configuration, each with what changed in words.

    `other_rows`: the data has other rows than the run that saved them had.
    """
    anew: dict[str, str] = {}
    changed = {key.partition(".")[0] for key, _, _ in _differences(config, before)} | (
        {"data"} if other_rows else set()
    )
    # What waits, and texts that are used again.
    made = ("waiting", "texts") if before["rollout"].get("ahead") else ("texts",)
    # They are known by their prompts' places in the data, and made of the model's tokens.
    for part in ("data", "model"):
        if part in changed:
            anew |= dict.fromkeys(made, f"the {part} changed")
    if "waiting" in made and config.rollout.ahead == 0:
        anew["waiting"] = "rollout.ahead is 0"
    if before["algorithm"]["name"] != config.algorithm.name:
        anew |= dict.fromkeys(("algorithm", *made), "the algorithm changed")
    return anew


def _differences(config: RunConfig, before: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys that both configurations have and that are not free to differ, with the old and the new value."""
    return (found for found in _all_differences(config, before) if not _is_free(found[0]))


def _all_differences(config: RunConfig, before: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    # As it will be read from JSON again.
    now = json.loads(json.dumps(config.model_dump(mode="json")))
    for key, old, new in _both(before, now):
        if new != old and not _same_place(key, old, new):
            yield key, old, new


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _same_place(key: str, old: Any, new: Any) -> bool:
    """Whether two spellings of a path lead to one place."""
    if not (key.endswith(("path", "tokenizer", "weights")) and isinstance(old, str) and isinstance(new, str)):
        return False
    return Path(old).resolve() == Path(new).resolve()


def _both(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting that both tables have, with its two values; a table that may have any keys is one setting."""
    for key, old in before.items():
        if key not in now:
            continue
        name, new = f"{prefix}{key}", now[key]
        closed = name not in ("megatron", "vllm") and key != "extra"
        if closed and isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _both(old, new, f"{name}.")
        else:
            yield name, old, new


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
