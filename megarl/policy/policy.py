"""The policy: a Megatron model with the parameter sets that train or are kept, seen by the rest of megarl as verbs.

`measure` computes log-probs, `accumulate` adds gradients of objectives to the buffers of a parameter set, `step`
applies them. Every method is called by all ranks together. Values per token exist on the last pipeline stage only; the
numbers returned for a whole mini-batch are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from megarl.algorithms.objective import BatchTotals, Objective
from megarl.config import gpu_rules
from megarl.config.grid import Grid, chunks_of_stage
from megarl.config.model_shape import ModelShape
from megarl.config.parameter_sets import POLICY
from megarl.config.schema import RunConfig
from megarl.parallel.bootstrap import World
from megarl.parallel.cpu_platform import has_cuda
from megarl.policy.batch import MicroBatch
from megarl.policy.losses import LossStage, Pass, look_over
from megarl.policy.megatron_config import transformer_config
from megarl.policy.model import build_model
from megarl.policy.passes import Passes
from megarl.policy.trained_set import StepResult, TrainedSet
from megarl.policy.weight_sets import WeightSets
from megarl.records import Sequence
from megarl.reshard.weight_map import chunk_prefix


class Policy:
    """A Megatron policy under one parallel layout.

    Parameter sets go by name: `trained` ones have gradients and an optimizer, the policy's own weights among them;
    those in `weight_sets` are copies that stay as they are. `step_budget` is the number of optimizer steps in the whole
    run.
    """

    def __init__(self, config: RunConfig, shape: ModelShape, world: World, grid: Grid, step_budget: int) -> None:
        self.config, self.shape, self.world, self.grid = config, shape, world, grid
        if has_cuda():
            for refusal in gpu_rules.of_policy(config):
                raise refusal
        self.megatron_config = transformer_config(config, shape)
        stages = chunks_of_stage(shape.num_layers, config.parallel, grid.pipeline_rank)
        self.chunks = build_model(self.megatron_config, shape, stages)
        self.trained = {POLICY: TrainedSet(config, self.megatron_config, self.chunks, step_budget)}
        self.megatron_config.grad_scale_func = self.trained[POLICY].optimizer.scale_loss
        self.weight_sets = WeightSets(p for chunk in self.chunks for p in chunk.parameters())
        self.passes = Passes(config, self.megatron_config, shape, world, grid, self.chunks)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's shard, in the names of `megatron_tensors`: Megatron's, with a prefix where chunks are several."""
        for number, chunk in enumerate(self.chunks):
            prefix = chunk_prefix(number, len(self.chunks))
            yield from ((prefix + name, parameter) for name, parameter in chunk.named_parameters())

    def weights_changed(self) -> None:
        """Tell the optimizers that the weights were written from outside (their fp32 copies follow)."""
        for one in self.trained.values():
            one.weights_changed()

    @contextmanager
    def using(self, weights: str) -> Iterator[None]:
        """Run with the named parameter set in place of the policy's own weights."""
        if weights == POLICY:
            yield
            return
        with self.weight_sets.using(weights):
            yield

    # --- training ---------------------------------------------------------------------------------------------------

    def measure(self, sequences: Sequences[Sequence], parameters: str = POLICY) -> list[np.ndarray] | None:
        """Log-probs of each sequence's trained tokens, float32 (T,) each, under the parameter set of that name.

        `sequences` are those of this data-parallel rank. None on all but the last pipeline stage.
        """
        trains = parameters in self.trained
        own = self.trained[parameters if trains else POLICY]
        own.residence.require_ready("compute log-probs")
        collect = _Collect(sequences)
        with torch.no_grad(), self.using(POLICY if trains else parameters):
            for chunk in self.chunks:
                chunk.eval()
            self.passes.run(own.wrapped, sequences, collect, forward_only=True)
        return collect.found if self.grid.is_last_stage else None

    def accumulate(
        self,
        sequences: Sequences[Sequence],
        objectives: Sequences[Objective],
        totals: BatchTotals,
        *,
        old_is_current: bool = False,
    ) -> Pass:
        """Add the gradient of the objectives' sum on a mini-batch to what their parameter set has since its last step.

        `sequences` are this data-parallel rank's share of the mini-batch, `totals` the counts of the whole, by kind.
        `old_is_current` says that nothing was learned in this step yet: the pass's own log-probs are the old ones.

        Raises:
            ValueError: a sequence lacks a value per token that an objective needs; or the objectives are not of one
                parameter set that trains.
        """
        trained = self.trained[self._set_of(objectives)]
        trained.residence.require_ready("update the policy")
        last = self.grid.is_last_stage
        facts = look_over(sequences, objectives, old_is_current=old_is_current, last_stage=last)
        trained.begin_pass()
        stage = LossStage(objectives, totals, facts, old_is_current=old_is_current)
        together = any(objective.together for objective in objectives)
        work = self.passes.run(trained.wrapped, sequences, stage, forward_only=False, by_group=together)
        found = stage.gather(work, reports=self.grid.reports)
        if self.passes.experts is not None:
            found = replace(found, means=found.means | self.passes.experts.report(work.micro_batches))
        trained.end_pass(found.loss)
        return found

    def step(self, names: Sequences[str] = (POLICY,)) -> dict[str, StepResult]:
        """Apply what the named sets have accumulated: see `TrainedSet.step`."""
        for name in names:
            self.trained[name].residence.require_ready("update the policy")
        return {name: self.trained[name].step() for name in names}

    def discard(self) -> None:
        """Forget what was accumulated since the last steps."""
        for one in self.trained.values():
            one.discard()

    @property
    def skipped_in_a_row(self) -> int:
        """Steps in a row that were skipped because of numbers that are not finite, the most of any set."""
        return max(one.skipped_in_a_row for one in self.trained.values())

    def _set_of(self, objectives: Sequences[Objective]) -> str:
        """The parameter set that the objectives train: a pass runs one."""
        names = {objective.parameters for objective in objectives}
        if len(names) != 1 or not names <= self.trained.keys():
            known = ", ".join(self.trained)
            raise ValueError(f"objectives of {sorted(names)}: must train one parameter set, of those that do: {known}")
        return names.pop()

    # --- whose the memory is ----------------------------------------------------------------------------------------

    def offload_optimizers(self) -> None:
        """Optimizer states go to host memory and gradient buffers are freed; weights stay, as a push reads them."""
        for one in self.trained.values():
            one.residence.offload_optimizer()

    def offload_weights(self) -> None:
        """The weights go too."""
        for one in self.trained.values():
            one.residence.offload_weights()

    def onload_weights(self) -> None:
        """The weights come back, for a push."""
        for one in self.trained.values():
            one.residence.onload_weights()

    def onload(self) -> None:
        """Everything comes back."""
        for one in self.trained.values():
            one.residence.onload()


class _Collect:
    """Keeps each sequence's log-probs."""

    entropy_gradient = False

    def __init__(self, sequences: Sequences[Sequence]) -> None:
        self.found: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
        self._trained = [sequence.trained for sequence in sequences]

    def __call__(
        self, batch: MicroBatch, members: list[int], log_probs: torch.Tensor, entropy: torch.Tensor
    ) -> torch.Tensor:
        parts = log_probs.float().cpu().split([self._trained[i] for i in members])
        for index, part in zip(members, parts, strict=True):
            self.found[index] = part.numpy()
        return log_probs.new_zeros(())
