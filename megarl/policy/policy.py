"""The policy: a Megatron model with the parameter sets that train or are kept, seen by the rest of megarl as verbs.

`measure` computes log-probs, `accumulate` adds gradients of objectives to the buffers of the sets that they train,
`step` applies them. Every method is called by all ranks together. Values per token exist on the last pipeline stage
only; the numbers returned for a whole mini-batch are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Sequence as Sequences
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel

from megarl.algorithms.objective import BatchTotals, Objective
from megarl.config.grid import Grid
from megarl.config.implied import Implied
from megarl.config.influence import InfluenceSettings
from megarl.config.model_shape import ModelShape
from megarl.config.parameter_sets import ADAPTER, POLICY, ParameterSet
from megarl.config.schema import RunConfig
from megarl.errors import MegarlError, PhaseError
from megarl.parallel.bootstrap import World
from megarl.policy.adapter import Merged
from megarl.policy.losses import LossStage, Pass, look_over
from megarl.policy.network import Network, Survey
from megarl.policy.passes import Passes
from megarl.policy.trained_set import StepResult, TrainedSet
from megarl.records import Sequence


class Policy:
    """A Megatron policy under one parallel layout.

    Parameter sets go by name. `trained` ones have gradients and an optimizer: the policy's own weights (or an adapter's
    alone beside frozen ones), an adapter's beside them, and `trains`: bases of models of their own, with the policy's
    adapter where it has one. Others are kept as copies that stay as they are. `step_budget` is the number of optimizer
    steps in the whole run.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelShape,
        world: World,
        grid: Grid,
        step_budget: int,
        trains: Collection[ParameterSet] = (),
    ) -> None:
        self.config, self.shape, self.world, self.grid = config, shape, world, grid
        network, implied = Network(config, shape, world, grid), Implied(config)
        alone = network.base_is_frozen
        self.trained = {POLICY: TrainedSet(config, network, step_budget, of_adapter=alone)}
        if implied.adapter_optimizer is not None:
            beside = config.model_copy(update={"optimizer": implied.adapter_optimizer})
            self.trained[ADAPTER] = TrainedSet(beside, network, step_budget, of_adapter=True)
        own = [*self.trained.values()]
        for one in own if trains else ():
            one.put_away()
        for one in trains:
            other = Network(config, shape, world, grid, network.adapter)
            self.trained[one.name] = TrainedSet(config, other, step_budget)
            self.trained[one.name].put_away()
        for one in own:
            one.onload()
        self._rebuilt = {one.name for one in trains if one.rebuilt}
        self._by_name = dict(self.network.named_parameters())
        self._given_away = False
        self._kept: dict[str, dict[torch.Tensor, torch.Tensor]] = {}

    @property
    def network(self) -> Network:
        """The model of the policy's own weights, this rank's shard."""
        return self.trained[POLICY].network

    @property
    def own_sets(self) -> list[str]:
        """The sets that train a part of what the policy computes with: its own, and that of an adapter beside."""
        return [name for name, one in self.trained.items() if one.network is self.network]

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
        return {} if self.network.attachment is None else self.network.attachment.merged

    def weight(self, name: str) -> torch.Tensor:
        """One of these weights as the policy computes with it: where it has an adapter, merged."""
        if name not in self.adapted:
            return self._by_name[name].detach()
        with torch.no_grad():
            return self.adapted[name]()

    def weights_changed(self) -> None:
        """Tell the policy's optimizers that its weights were written from outside (their fp32 copies follow)."""
        for name in self.own_sets:
            self.trained[name].weights_changed()

    # --- parameter sets ---------------------------------------------------------------------------------------------

    def keep(self, name: str, *, base: bool = True) -> None:
        """Give the set `name` the policy's present weights: a copy in host memory, or where it trains, its start.

        Without `base` a set that is kept has the frozen weights that are there when it is used.
        """
        if name in self.trained:
            self.trained[name].onload_state()
            self.trained[name].copy(self.trained[POLICY])
            self.trained[name].put_away()
            return
        adapter = self.network.adapter
        tensors = self.network.computes_with() if base or adapter is None else [*adapter.parameters()]
        self._kept[name] = {tensor: tensor.detach().to("cpu", copy=True) for tensor in tensors}

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run with a parameter set in place of the policy's own weights; these come back whatever happens."""
        if name == POLICY:
            yield
            return
        weights = self._weights_of(name)
        # Only the pointers change hands: the optimizer's buffers, of which parameters are views, stay as they are.
        own = {tensor: tensor.data for tensor in weights}
        try:
            for tensor, values in weights.items():
                tensor.data = values.to(tensor.device)
            yield
        finally:
            for tensor, data in own.items():
                tensor.data = data

    def _weights_of(self, name: str) -> dict[torch.Tensor, torch.Tensor]:
        if name in self.trained:
            self.trained[name].onload_weights()
            others = self.trained[name].network.computes_with()
            return {own: one.data for own, one in zip(self.network.computes_with(), others, strict=True)}
        if name not in self._kept:
            known = ", ".join([*self.trained, *self._kept])
            raise MegarlError(f"there is no parameter set named {name!r}; there are {known}")
        return self._kept[name]

    # --- training ---------------------------------------------------------------------------------------------------

    def measure(self, sequences: Sequences[Sequence], parameters: str = POLICY) -> list[np.ndarray] | None:
        """Log-probs of each sequence's trained tokens, float32 (T,) each, under the parameter set of that name.

        `sequences` are those of this data-parallel rank. None on all but the last pipeline stage.
        """
        trained = self.trained.get(parameters, self.trained[POLICY])
        self._bring(parameters if parameters in self.trained else POLICY, "compute log-probs")
        with nullcontext() if parameters in self.trained else self.using(parameters):
            found = trained.network.measure(sequences)
        return found if self.grid.is_last_stage else None

    def survey(
        self,
        sequences: Sequences[Sequence],
        steps: Sequences[np.ndarray] | None = None,
        influence: InfluenceSettings | None = None,
    ) -> Survey:
        """Log-probs, entropies and the influence of steps under the policy's own weights: `Network.survey`."""
        self._bring(POLICY, "compute log-probs")
        return self.network.survey(sequences, steps, influence)

    def accumulate(
        self,
        sequences: Sequences[Sequence],
        objectives: Sequences[Objective],
        totals: BatchTotals,
        *,
        old_is_current: bool = False,
        hands_on_old: bool = False,
    ) -> dict[str, Pass]:
        """Add the objectives' gradients on a mini-batch to what the sets that they train have since their last step.

        One pass for each of `Objective.in_pass`, by its name, whose loss is the sum of its objectives. `sequences` are
        this data-parallel rank's share of the mini-batch, `totals` the counts of the whole, by kind. `old_is_current`
        says that nothing was learned in this step yet: the log-probs of the policy's own passes are the old ones, and
        with `hands_on_old` the sequences then have them for later passes.

        Raises:
            ValueError: a sequence lacks a value per token that an objective needs, or an objective's set does not
                train; nothing was accumulated for it then.
        """
        by_pass: dict[str, list[Objective]] = {}
        for one in objectives:
            by_pass.setdefault(one.in_pass, []).append(one)
            for name in {one.parameters, *one.gradient_goes_to} - self.trained.keys():
                known = ", ".join(self.trained)
                raise ValueError(f"an objective trains {name!r}, which must be a parameter set that trains: {known}")
        found: dict[str, Pass] = {}
        for name, mine in by_pass.items():
            kinds = _kinds_of(name, by_pass)
            own = [one for one in sequences if kinds(one.kind)]
            counted = BatchTotals.of({kind: counts for kind, counts in totals.by_kind.items() if kinds(kind)})
            current = old_is_current and mine[0].parameters == POLICY
            found[name] = self._pass(own, mine, counted, current, hands_on_old)
        return found

    def _pass(
        self,
        sequences: Sequences[Sequence],
        objectives: Sequences[Objective],
        counted: BatchTotals,
        old_is_current: bool,
        hands_on_old: bool,
    ) -> Pass:
        network = self.trained[objectives[0].parameters].network
        goes_to = objectives[0].gradient_goes_to
        facts = look_over(sequences, objectives, old_is_current=old_is_current, last_stage=self.grid.is_last_stage)
        keeps_old = old_is_current and hands_on_old
        stage = LossStage(objectives, counted, facts, old_is_current=old_is_current, keeps_old=keeps_old)
        together = any(objective.together for objective in objectives)
        filled = {name: one for name, one in self.trained.items() if one.is_filled_by(network)}
        # A gradient that is one set's alone, as it is, stays in the buffers until the step.
        apart = any(one.goes_to is not None for one in objectives)
        backward = any(goes_to.values())
        self._bring(objectives[0].parameters, "update the policy")
        for one in filled.values() if backward else ():
            one.pass_begins(apart=apart)
        found = network.learn(sequences, stage, by_group=together, backward=backward)
        stage.hand_on(sequences)
        for one in filled.values() if backward else ():
            one.pass_ends(found.loss)
        return replace(found, grad_norms=self._give(filled, goes_to)) if backward and apart else found

    def _give(self, filled: Mapping[str, TrainedSet], goes_to: Mapping[str, float]) -> dict[str, float]:
        """Give a pass's gradients, times their factors, to the sets that they go to; their norms. Collective."""
        norms: dict[str, float] = {}
        for name, one in filled.items():
            gradient = one.take()
            norms[name] = gradient.norm
            for to, factor in goes_to.items():
                if self.trained[to].of_adapter == one.of_adapter and factor:
                    self._begin(to).add(gradient, factor)
        return norms

    def _begin(self, name: str) -> TrainedSet:
        """The set of that name, before it gets a gradient: where it is built anew for every step, with the policy's
        weights."""
        trained = self.trained[name]
        if name in self._rebuilt and not trained.has_gradient:
            trained.onload_state()
            trained.copy(self.trained[POLICY])
        return trained

    def step(self, names: Collection[str] = (POLICY,)) -> dict[str, StepResult]:
        """Apply what the named sets have accumulated: see `TrainedSet.step`."""
        found: dict[str, StepResult] = {}
        for name in names:
            self._bring(name, "update the policy")
            found[name] = self.trained[name].step()
        return found

    def discard(self) -> None:
        """Forget what was accumulated since the last steps."""
        for one in self.trained.values():
            one.discard()

    @property
    def skipped_in_a_row(self) -> int:
        """Steps in a row that were skipped because of numbers that are not finite, the most of any set."""
        return max(one.skipped_in_a_row for one in self.trained.values())

    # --- whose the memory is ----------------------------------------------------------------------------------------

    # One model at a time is on the device, with what trains it: the others' memory is away until they are used.

    def bring(self, name: str) -> None:
        """Have a set that trains on the device, and with a base its adapter."""
        self._bring(name, "look at the policy")

    def _bring(self, name: str, action: str) -> None:
        """Have a set that trains on the device, with a base its adapter, and other bases away, unless they wait for
        their step.

        Raises:
            PhaseError: the memory is given to the engine; `action` is what cannot be done.
        """
        if self._given_away:
            raise PhaseError(f"cannot {action} while the policy's memory is given to the engine: the phase is generate")
        wanted = self.trained[name]
        if wanted.of_adapter and not wanted.network.base_is_frozen:
            wanted.onload()
            return
        for one in self.trained.values():
            if not (one.is_filled_by(wanted.network) or one.has_gradient):
                one.put_away()
        for one in self.trained.values():
            if one.is_filled_by(wanted.network):
                one.onload()

    def bring_state(self) -> None:
        """Have the weights and optimizers of all that trains on the device at once, to be saved or loaded."""
        if len(self.own_sets) < len(self.trained):
            # Without the gradients of the one that was used last.
            for one in self.trained.values():
                one.put_away()
        for one in self.trained.values():
            one.onload_state()

    def offload_optimizers(self) -> None:
        """Optimizer states go to host memory and gradient buffers are freed; the policy's own weights stay, as a push
        reads them.

        Raises:
            PhaseError: gradients were accumulated, and would be lost.
        """
        for name, one in self.trained.items():
            if one.has_gradient:
                raise PhaseError("cannot give the policy's memory to the engine before its gradients are applied")
            if name in self.own_sets:
                one.onload_weights()
                one.offload_optimizer()
            else:
                one.put_away()
        self._given_away = True

    def offload_weights(self) -> None:
        """The weights go too."""
        for one in self.trained.values():
            one.offload_weights()

    def onload_weights(self) -> None:
        """The policy's own weights come back, for a push."""
        for name in self.own_sets:
            self.trained[name].onload_weights()

    def onload(self) -> None:
        """The policy's own sets come back; others do when they are used."""
        self._given_away = False
        for name in self.own_sets:
            self.trained[name].onload()


def _kinds_of(name: str, by_pass: Mapping[str, Sequences[Objective]]) -> Callable[[str], bool]:
    """Which kinds the pass of that name goes through: what its objectives train; the policy's own goes through all that
    no other of its passes does, as its numbers are those of the step."""
    mine = by_pass[name]
    if name != POLICY:
        return lambda kind: any(one.trains(kind) for one in mine)
    others = [one for some in by_pass.values() for one in some if one.parameters == POLICY and one.apart]
    return lambda kind: any(one.trains(kind) for one in mine) or not any(one.trains(kind) for one in others)
