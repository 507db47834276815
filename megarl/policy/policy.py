"""The policy: a Megatron model with the parameter sets that train or are kept, seen by the rest of megarl as verbs.

`measure` computes log-probs, `accumulate` adds gradients of objectives to the buffers of the sets that they train,
`step` applies them. Every method is called by all ranks together. Values per token exist on the last pipeline stage
only; the numbers returned for a whole mini-batch are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Sequences
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel

from megarl.algorithms.objective import BatchTotals, Objective
from megarl.config import gpu_rules
from megarl.config.grid import Grid
from megarl.config.model_shape import ModelShape
from megarl.config.parameter_sets import POLICY
from megarl.config.schema import RunConfig
from megarl.errors import MegarlError
from megarl.parallel.bootstrap import World
from megarl.parallel.cpu_platform import has_cuda
from megarl.policy.adapter import Merged
from megarl.policy.losses import LossStage, Pass, look_over
from megarl.policy.network import Network
from megarl.policy.passes import Passes
from megarl.policy.trained_set import StepResult, TrainedSet
from megarl.records import Sequence


class Policy:
    """A Megatron policy under one parallel layout.

    Parameter sets go by name. `trained` ones have gradients and an optimizer: the policy's own weights, or an adapter's
    alone beside frozen ones, and `trains` beside them. Others are kept as copies that stay as they are. `step_budget`
    is the number of optimizer steps in the whole run.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelShape,
        world: World,
        grid: Grid,
        step_budget: int,
        trains: Collection[str] = (),
    ) -> None:
        self.config, self.shape, self.world, self.grid = config, shape, world, grid
        if has_cuda():
            for refusal in gpu_rules.of_policy(config):
                raise refusal
        self.trained = {
            name: TrainedSet(config, Network(config, shape, world, grid), step_budget) for name in (POLICY, *trains)
        }
        self._by_name = dict(self.network.named_parameters())
        self._kept: dict[str, dict[torch.nn.Parameter, torch.Tensor]] = {}

    @property
    def network(self) -> Network:
        """The model of the policy's own weights, this rank's shard."""
        return self.trained[POLICY].network

    @property
    def chunks(self) -> list[GPTModel]:
        """That model's chunks."""
        return self.network.chunks

    @property
    def passes(self) -> Passes:
        """What runs that model."""
        return self.network.passes

    @property
    def params_dtype(self) -> torch.dtype:
        """What the weights are kept in."""
        return self.network.megatron_config.params_dtype

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's shard of the policy's own weights without an adapter, or of those that it is `using`; see
        `Network`."""
        return self.network.named_parameters()

    @property
    def adapted(self) -> Mapping[str, Merged]:
        """Which of these weights have an adapter, on this rank."""
        return {} if self.network.adapter is None else self.network.adapter.merged

    def weight(self, name: str) -> torch.Tensor:
        """One of these weights as the policy computes with it: where it has an adapter, merged."""
        if name not in self.adapted:
            return self._by_name[name].detach()
        with torch.no_grad():
            return self.adapted[name]()

    def weights_changed(self) -> None:
        """Tell the policy's optimizer that weights were written from outside (its fp32 copies follow)."""
        self.trained[POLICY].weights_changed()

    # --- parameter sets ---------------------------------------------------------------------------------------------

    def keep(self, name: str, *, base: bool = True) -> None:
        """Give the set `name` the policy's present weights: a copy in host memory, or where it trains, its start.

        Without `base` a set that is kept has the frozen weights that are there when it is used.
        """
        if name in self.trained:
            self.trained[name].copy([parameter.detach() for parameter in self.network.parameters()])
            return
        adapter = self.network.adapter
        parameters = self.network.parameters() if base or adapter is None else [*adapter.parameters()]
        self._kept[name] = {parameter: parameter.detach().to("cpu", copy=True) for parameter in parameters}

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run with a parameter set in place of the policy's own weights; these come back whatever happens."""
        if name == POLICY:
            yield
            return
        weights = self._weights_of(name)
        # Only the pointers change hands: the optimizer's buffers, of which parameters are views, stay as they are.
        own = {parameter: parameter.data for parameter in weights}
        try:
            for parameter, values in weights.items():
                parameter.data = values.to(parameter.device)
            yield
        finally:
            for parameter, data in own.items():
                parameter.data = data

    def _weights_of(self, name: str) -> dict[torch.nn.Parameter, torch.Tensor]:
        if name in self.trained:
            others = self.trained[name].network.parameters()
            return {own: one.data for own, one in zip(self.network.parameters(), others, strict=True)}
        if name not in self._kept:
            known = ", ".join([*self.trained, *self._kept])
            raise MegarlError(f"there is no parameter set named {name!r}; there are {known}")
        return self._kept[name]

    # --- training ---------------------------------------------------------------------------------------------------

    def measure(self, sequences: Sequences[Sequence], parameters: str = POLICY) -> list[np.ndarray] | None:
        """Log-probs of each sequence's trained tokens, float32 (T,) each, under the parameter set of that name.

        `sequences` are those of this data-parallel rank. None on all but the last pipeline stage.
        """
        if parameters in self.trained:
            found = self.trained[parameters].measure(sequences)
        else:
            with self.using(parameters):
                found = self.trained[POLICY].measure(sequences)
        return found if self.grid.is_last_stage else None

    def accumulate(
        self,
        sequences: Sequences[Sequence],
        objectives: Sequences[Objective],
        totals: BatchTotals,
        *,
        old_is_current: bool = False,
    ) -> dict[str, Pass]:
        """Add the objectives' gradients on a mini-batch to what the sets that they train have since their last step.

        One pass for each set, by its name, whose loss is the sum of the set's objectives. `sequences` are this
        data-parallel rank's share of the mini-batch, `totals` the counts of the whole, by kind. `old_is_current` says
        that nothing was learned in this step yet: the log-probs of the policy's own pass are the old ones.

        Raises:
            ValueError: a sequence lacks a value per token that an objective needs, or an objective's set does not
                train; nothing was accumulated for it then.
        """
        by_set: dict[str, list[Objective]] = {}
        for one in objectives:
            by_set.setdefault(one.parameters, []).append(one)
        for name in by_set.keys() - self.trained.keys():
            known = ", ".join(self.trained)
            raise ValueError(f"an objective trains {name!r}, which must be a parameter set that trains: {known}")
        return {
            name: self._pass(name, sequences, mine, totals, old_is_current and name == POLICY)
            for name, mine in by_set.items()
        }

    def _pass(
        self,
        name: str,
        sequences: Sequences[Sequence],
        objectives: Sequences[Objective],
        totals: BatchTotals,
        old_is_current: bool,
    ) -> Pass:
        if name != POLICY:
            # The policy's own pass goes through all, as its numbers are those of the step.
            sequences = [one for one in sequences if any(objective.trains(one.kind) for objective in objectives)]
        last = self.grid.is_last_stage
        facts = look_over(sequences, objectives, old_is_current=old_is_current, last_stage=last)
        stage = LossStage(objectives, totals, facts, old_is_current=old_is_current)
        together = any(objective.together for objective in objectives)
        return self.trained[name].accumulate(sequences, stage, by_group=together)

    def step(self, names: Collection[str] = (POLICY,)) -> dict[str, StepResult]:
        """Apply what the named sets have accumulated: see `TrainedSet.step`."""
        return {name: self.trained[name].step() for name in names}

    def discard(self) -> None:
        """Forget what was accumulated since the last steps."""
        for one in self.trained.values():
            one.discard()

    @property
    def skipped_in_a_row(self) -> int:
        """Steps in a row that were skipped because of numbers that are not finite, the most of any set."""
        return max(one.skipped_in_a_row for one in self.trained.values())

    # --- whose the memory is ----------------------------------------------------------------------------------------

    def offload_optimizers(self) -> None:
        """Optimizer states go to host memory and gradient buffers are freed; weights stay, as a push reads them."""
        for one in self.trained.values():
            one.offload_optimizer()

    def offload_weights(self) -> None:
        """The weights go too."""
        for one in self.trained.values():
            one.offload_weights()

    def onload_weights(self) -> None:
        """The weights come back, for a push."""
        for one in self.trained.values():
            one.onload_weights()

    def onload(self) -> None:
        """Everything comes back."""
        for one in self.trained.values():
            one.onload()
