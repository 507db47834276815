"""Plain vLLM in the same processes: its `LLM` class and nothing around it, to measure the rollout engine against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from vllm import LLM, SamplingParams

from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.rollout import vllm_setup
from megarl.rollout.arguments import engine_arguments
from megarl.rollout.engine import Sampling
from megarl.rollout.phases import NoSleeper, Phases

T = TypeVar("T")


class PlainEngine:
    """`vllm.LLM` with the engine arguments of a run. A push can fill it as it fills an `Engine`."""

    def __init__(self, config: RunConfig, shape: ModelShape) -> None:
        arguments: dict[str, Any] = engine_arguments(config, shape, load_weights=False)
        arguments["enable_sleep_mode"] = False
        with vllm_setup.quiet(), vllm_setup.own_randomness(None):
            self._llm = LLM(**arguments)
        self.phases = Phases(NoSleeper())
        self.phases.sleep()
        self.phases.wake_weights()

    def call_worker(self, function: Callable[..., T]) -> T:
        """`function(worker)` on this process's vLLM worker."""
        return self._llm.collective_rpc(function)[0]

    def weights_changed(self, version: int = 0) -> None:
        """After a push."""
        self.phases.weights_written()
        self._llm.reset_prefix_cache()

    def generate(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> int:
        """Answer all prompts with `LLM.generate`, log-probs of the chosen tokens included; returns tokens made."""
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            logprobs=0,
            detokenize=False,
        )
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with vllm_setup.own_randomness(sampling.seed), torch.inference_mode():
            outputs = self._llm.generate(requests, parameters, use_tqdm=False)  # type: ignore[arg-type]
        return sum(len(output.outputs[0].token_ids) for output in outputs)
