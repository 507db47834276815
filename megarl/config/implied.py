"""What a run's settings imply, each fact derived once, for a start, the rehearsal and the rules. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megarl.config.adapters import AdapterSettings
from megarl.config.grid import padded_length
from megarl.config.parameter_sets import CONSUMER, REFERENCE, ParameterSet, ServedSet, united
from megarl.config.schema import RunConfig
from megarl.config.sections import OptimizerSettings

#: What vLLM takes for batches of prompts on an H100; to an engine that a process holds itself it would give 2,048.
BATCHED_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Implied:
    """Facts of a run that no setting states. `evaluates_alone`: nothing is trained, as in `megarl evaluate`."""

    config: RunConfig
    evaluates_alone: bool = False

    @property
    def evaluates(self) -> bool:
        """Whether the evaluation data is read and answered."""
        settings = self.config.evaluation
        return self.evaluates_alone or bool(settings.every) or settings.start or settings.end

    @property
    def makes_rollouts(self) -> bool:
        """Whether the engine makes what is trained on, which else is saved, or the data's own solutions."""
        return self.config.algorithm.generates and self.config.rollout.replay is None

    @property
    def has_engine(self) -> bool:
        """Whether engines are built."""
        return self.evaluates or self.makes_rollouts

    @property
    def adapter(self) -> AdapterSettings | None:
        """The adapter that the policy computes with, where it has one."""
        return self.config.adapter if self.base_is_frozen or self.adapter_optimizer is not None else None

    @property
    def base_is_frozen(self) -> bool:
        """Whether an adapter trains alone."""
        return self.config.parameters == "adapter"

    @property
    def adapter_optimizer(self) -> OptimizerSettings | None:
        """How an adapter trains beside the policy's own weights; None: there is none beside them."""
        return None if self.base_is_frozen else self.config.algorithm.adapter_optimizer(self.config)

    @property
    def needs_solutions(self) -> bool:
        """Whether rows of the training data must have worked solutions."""
        return self.config.algorithm.learns_solutions and not self.evaluates_alone

    @property
    def demonstrations(self) -> int:
        """Demonstrations that a step learns."""
        if self.evaluates_alone or not self.config.algorithm.learns_demonstrations:
            return 0
        return self.config.batch.demonstrations or self.config.batch.prompts

    @property
    def longest_demonstration(self) -> int:
        """Tokens of the longest response that is learned as a demonstration; 0 where none is."""
        settings = self.config.data.demonstrations
        if settings is None or not self.demonstrations:
            return 0
        return settings.max_tokens or self.config.rollout.max_tokens

    @property
    def marks_thinking(self) -> bool:
        """Whether generation stops where the thinking ends, so that its end must be one token."""
        return self.config.algorithm.answers_in_parts or self.config.evaluation.consumer is not None

    @property
    def records_routing(self) -> bool:
        """Whether the engine's experts of every token are kept."""
        return self.config.moe.routing_replay != "off"

    @property
    def batched_tokens(self) -> int:
        """Tokens that vLLM computes at a time at most, on a GPU: its max_num_batched_tokens."""
        asked = self.config.vllm.get("max_num_batched_tokens")
        if asked:
            return int(asked)
        # Without chunks a prompt must fit whole.
        whole = self.longest_engine_sequence if self.config.vllm.get("enable_chunked_prefill") is False else 0
        return max(BATCHED_TOKENS, self.config.rollout.max_concurrent, whole)

    @property
    def updates(self) -> int:
        """Optimizer updates in the whole run, which a decaying learning rate spans; `steps` must be known."""
        return self.config.steps * self.config.batch.updates

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that the engine is given."""
        return self.config.algorithm.longest_prompt(self.config)

    @property
    def longest_engine_sequence(self) -> int:
        """Tokens of the longest prompt with the longest response: vLLM's max_model_len."""
        return self.longest_prompt + max(self.config.rollout.max_tokens, self.config.evaluation.max_tokens or 0)

    @property
    def longest_trained_sequence(self) -> int:
        """Tokens that the longest trained sequence takes in a micro-batch, padding for context parallelism included."""
        responses = max(self.config.rollout.max_tokens, self.longest_demonstration)
        longest = self.config.data.max_prompt_tokens + responses
        return padded_length(longest, self.config.parallel.context)

    @property
    def smallest_microbatch(self) -> int:
        """The least that batch.tokens_per_microbatch may be, in tokens."""
        return self.longest_trained_sequence * self.config.algorithm.sequences_together

    @property
    def sequences_per_update(self) -> int:
        """The most sequences that an optimizer update trains on, over all replicas."""
        updates = self.config.batch.updates
        algorithm = self.config.algorithm
        made = -(-algorithm.most_prompts(self.config) // updates) * algorithm.sequences_per_prompt(self.config)
        return made + -(-self.demonstrations // updates)

    @property
    def consumer(self) -> str | None:
        """The parameter set that answers the policy's thinking in evaluations."""
        wanted = self.config.evaluation.consumer
        return None if wanted is None else REFERENCE if wanted == "initial" else CONSUMER

    @property
    def parameter_sets(self) -> tuple[ParameterSet, ...]:
        """The weights that are kept or trained beside the policy's own: each set once, whoever asks for it."""
        return united(self._wanted_sets())

    @property
    def trained_sets(self) -> tuple[str, ...]:
        """The names of those that train, each a model of its own."""
        return tuple(one.name for one in self.parameter_sets if one.trains)

    @property
    def kept_sets(self) -> tuple[ParameterSet, ...]:
        """Those that stay as they are."""
        return tuple(one for one in self.parameter_sets if not one.trains)

    def _wanted_sets(self) -> Iterator[ParameterSet]:
        if self.consumer == CONSUMER:
            checkpoint = self.config.evaluation.consumer
            yield ParameterSet(CONSUMER, checkpoint, "evaluation.consumer", generates=True)
        elif self.consumer is not None:
            yield ParameterSet(self.consumer, generates=True)
        if not self.evaluates_alone:
            yield from self.config.algorithm.parameter_sets(self.config)

    @property
    def served_sets(self) -> tuple[ServedSet, ...]:
        """The weights that others serve, under which log-probs are asked for."""
        return () if self.evaluates_alone else self.config.algorithm.served_sets(self.config)

    @property
    def patience(self) -> float:
        """How many seconds a rank may wait for a server while the others wait for the rank."""
        rewards = [reward for reward in (self.config.reward, self.config.evaluation.reward) if reward is not None]
        judges = [part.judge for reward in rewards for _, part in reward.named_parts() if part.judge is not None]
        servers = [*judges, *(one.server for one in self.served_sets)]
        return max((server.patience for server in servers), default=0.0)

    @property
    def keeps_start(self) -> bool:
        """Whether a parameter set has the weights that the run begins with."""
        return any(one.checkpoint is None for one in self.parameter_sets)

    @property
    def checkpoints(self) -> dict[str, str]:
        """The checkpoints that weights are read from, by the setting that names each."""
        weights = self.config.model.weights
        start = {} if weights is None else {"model.weights": weights}
        return start | {one.setting: one.checkpoint for one in self.parameter_sets if one.checkpoint is not None}
