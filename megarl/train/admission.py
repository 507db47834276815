"""What can be known of a run within seconds, before anything of it is built: `check`, `submit` and `train` ask here.

Free of torch where there is no GPU, and of the libraries that read data until the rules have passed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megarl.config import files, gpu_rules, rules
from megarl.config.algorithms import ALGORITHM_SETTINGS
from megarl.config.cluster import Cluster
from megarl.config.implied import Implied
from megarl.config.model_shape import read_model_shape
from megarl.config.rewards import BUILTIN_KINDS, ScoreSettings
from megarl.config.schema import RunConfig
from megarl.data.preview import SECONDS, data_refusals, first_prompt
from megarl.data.thinking import ThinkingEnd
from megarl.data.tokenizer import Tokenizer, check_vocabulary, differing_token, load_tokenizer, spread_tokens
from megarl.environments import host as environments
from megarl.errors import MegarlError, Refusal
from megarl.formats import checkpoint_folder, peft
from megarl.rewards.scorer import build_scorer
from megarl.servers.client import key_of
from megarl.train import hardware, past, replay

#: Seconds for a file's rows where the run, which reads all of them, follows at once. Our choice.
BRIEFLY = 1.0
#: Tokens, spread over the vocabulary, of which the texts of two tokenizers are compared. Our choice.
COMPARED = 4096


def refusals(
    config: RunConfig,
    processes: int | None = None,
    *,
    trains: bool,
    evaluates: bool = False,
    starts: bool = False,
    reads: bool = True,
    cluster: Cluster | None = None,
) -> Iterator[Refusal]:
    """Everything that is known to end a run at its start, what is quick to find first.

    `processes` is the world that a launcher started. `trains`: the run's folder is written as that of a training.
    `evaluates`: it is an evaluation alone. `starts`: the run, which reads all of its data, follows at once.
    `reads`: prompts are read at all. `cluster`: whose GPUs the run is for; default: this machine's.
    """
    yield from rules.broken_rules(config, processes=processes)
    if cluster is not None:
        yield from gpu_rules.refusals(config, read_model_shape(config.model.path), cluster.capability)
    if trains:
        yield from past.refusals(config)
    if reads:
        yield from contents(config, evaluates=evaluates, seconds=BRIEFLY if starts else SECONDS)
    if cluster is None:
        # Last, as it may start CUDA: what is tried before starts processes by forks.
        yield from hardware.refusals(config)


def contents(config: RunConfig, *, evaluates: bool = False, seconds: float = SECONDS) -> Iterator[Refusal]:
    """The first that a run cannot use in the files that are there: its tokenizer, its data or its reward functions.

    For a run whose rules and files have passed. A file's rows are looked at for `seconds`.
    """
    try:
        _look_at_checkpoints(config)
        _look_at_adapter(config)
        if not evaluates:
            _look_at_replay(config)
        tokenizer = _usable_tokenizer(config)
        _look_at_vocabularies(config, tokenizer)
        for served in Implied(config, evaluates_alone=evaluates).served_sets:
            key_of(served.server, served.setting, served.name)
        with _in_a_sentence(f"data.path={config.data.path}", "check the file, and the tokenizer's chat template"):
            for refusal in data_refusals(config, tokenizer, seconds, evaluates=evaluates):
                raise refusal
        for section, reward in (("reward", config.reward), ("evaluation.reward", config.evaluation.reward)):
            for name, one in () if reward is None else reward.named_parts(section):
                _look_at_reward(name, one, config, tokenizer)
        if not evaluates:
            _look_at_algorithm(config, tokenizer)
        if config.rollout.environment is not None and Implied(config, evaluates_alone=evaluates).has_engine:
            first = first_prompt(config, tokenizer, held_out=False)
            environments.build(config.rollout.environment, tokenizer, first).close()
    except Refusal as refusal:
        yield refusal


def _look_at_checkpoints(config: RunConfig) -> None:
    """Raise `Refusal` where a checkpoint that the configuration names is none, or one of another model."""
    for setting, path in Implied(config).checkpoints.items():
        found = checkpoint_folder.require(path, setting)
        progress = checkpoint_folder.read_progress(found)
        checkpoint_folder.check_model(found, progress, read_model_shape(config.model.path))
        implied = Implied(config)
        checkpoint_folder.check_adapter(found, progress, implied.adapter, implied.base_is_frozen, resumes=False)
        if "adapter" in progress:
            for refusal in files.checkpoint_refusals(Path(config.model.path)):
                raise refusal
            if setting == "model.weights" and config.adapter.path is not None:
                raise Refusal(
                    f"adapter.path={config.adapter.path}",
                    f"contradicts model.weights={path}, which holds an adapter",
                    "remove one of the two",
                )


def _look_at_adapter(config: RunConfig) -> None:
    """Raise `Refusal` where an adapter to begin from is not one of the model and the settings."""
    adapter = Implied(config).adapter
    if adapter is not None and adapter.path is not None:
        peft.open_adapter(Path(adapter.path), adapter, read_model_shape(config.model.path))


def _look_at_vocabularies(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise `Refusal` where a checkpoint's own tokenizer, as far as it is known, has other tokens than the run's."""
    for one in Implied(config).parameter_sets:
        if one.checkpoint is None:
            continue
        try:
            other = load_tokenizer(checkpoint_folder.hf_folder(checkpoint_folder.require(one.checkpoint, one.setting)))
        except Refusal:
            continue
        ids = spread_tokens(tokenizer, COMPARED)
        differs = differing_token(tokenizer, {token_id: other.decode([token_id]) for token_id in ids})
        if differs is not None:
            token_id, own, text = differs
            raise Refusal(
                f"{one.setting}={one.checkpoint}",
                f"must have been trained with this run's tokenizer, but token {token_id} is {text!r} there and "
                f"{own!r} here",
                "use a checkpoint of the same vocabulary",
            )


def _look_at_replay(config: RunConfig) -> None:
    """Raise `Refusal` where rollouts to replay are not there for each of the run's steps."""
    source = config.rollout.replay
    if source is None or not config.algorithm.generates:
        return
    first = past.steps_saved(config) + 1
    # The number of steps that epochs take is not known yet.
    end = config.steps if config.epochs is None else first
    with _in_a_sentence(f"rollout.replay={source}", "save the rollouts again"):
        replay.require(source, range(first, end + 1))


def _usable_tokenizer(config: RunConfig) -> Tokenizer:
    folder = config.model.tokenizer or config.model.path
    with _in_a_sentence(f"tokenizer {folder}", "restore its files, or set model.tokenizer"):
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, read_model_shape(config.model.path).vocab_size)
        if Implied(config).marks_thinking:
            ThinkingEnd(tokenizer, config.rollout.thinking_end).require_token()
        return tokenizer


def _look_at_algorithm(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Build an algorithm that is kept elsewhere, and raise `Refusal` where it asks for more than its settings declare:
    those of megarl need no look, and importing them takes seconds."""
    if config.algorithm.name in ALGORITHM_SETTINGS:
        return
    # They import torch, and so has the algorithm when its settings were read.
    from megarl import algorithms
    from megarl.algorithms import declared
    from megarl.algorithms.base import AlgorithmContext

    with _in_a_sentence(f"algorithm.name={config.algorithm.name}", "correct its code"):
        context = AlgorithmContext.of(config, read_model_shape(config.model.path), tokenizer)
        algorithm = algorithms.build(config.algorithm, context)
        for refusal in declared.refusals(algorithm, config, first_prompt(config, tokenizer, held_out=False)):
            raise refusal


def _look_at_reward(section: str, settings: ScoreSettings, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Start what finds rewards, try it on the first row as the run will, and end it again; a judge is not asked."""
    if settings.kind in BUILTIN_KINDS and settings.kind != "judge":
        return
    with _in_a_sentence(f"{section}.kind={settings.kind}", "correct what it imports"):
        if settings.kind == "judge" and settings.judge is not None:
            key_of(settings.judge, f"{section}.judge", "judge")
            return
        first = first_prompt(config, tokenizer, held_out=section.startswith("evaluation."))
        build_scorer(settings.model_copy(update={"workers": 1}), section=section, first=first).close()


@contextlib.contextmanager
def _in_a_sentence(value: str, fix: str) -> Iterator[None]:
    """Turn whatever a library raises on a user's file or code into a `Refusal` that names it."""
    try:
        yield
    except MegarlError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Refusal(value, f"cannot be used ({said})", fix) from error
