"""Every refused configuration with its exact message, and the configurations beside them that must pass."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from config_case import MODEL

from megarl.algorithms import ALGORITHMS, build
from megarl.algorithms.base import AlgorithmContext
from megarl.config.algorithms import ALGORITHM_SETTINGS
from megarl.config.load import load_config
from megarl.config.model_shape import model_shape_from_hf
from megarl.config.rules import broken_rules, check
from megarl.errors import Refusal

#: (overrides, the message). The model has 6 layers, 12 heads, 4 key-value heads, MLP 96, vocabulary 300, 256 positions.
REFUSED: list[tuple[str, str]] = [
    (
        "logging.wandb=project",
        "logging.wandb=project: needs the package wandb, which is not installed. "
        "Fix: install it (pip install wandb), or leave logging.wandb out.",
    ),
    (
        "rollout.environment.kind=calculate",
        "rollout.environment.kind=calculate: must be calculator, retry, package.module:Class or folder/file.py:Class. "
        "Fix: correct rollout.environment.kind.",
    ),
    (
        "rollout.environment.kind=retry rollout.environment.max_turn_tokens=65",
        "rollout.environment.max_turn_tokens=65: must not exceed rollout.max_tokens=64, which bounds all turns and "
        "observations together. Fix: lower it, or leave it out.",
    ),
    (
        "rollout.environment.kind=retry algorithm=start reward.graded=response",
        "rollout.environment.kind=retry: answers between turns, and algorithm.name=start needs one thinking and one "
        "response. Fix: use another algorithm, or remove rollout.environment.",
    ),
    (
        "rollout.environment.kind=retry evaluation.consumer=initial reward.graded=response",
        "rollout.environment.kind=retry: does not answer evaluation.consumer, which continues the policy's thinking. "
        "Fix: remove one of the two.",
    ),
    (
        "parallel.sequence=true",
        "parallel.sequence=true: needs parallel.tensor > 1. Fix: set parallel.tensor to 2 or more, or leave it off.",
    ),
    (
        "parallel.tensor=2",
        "parallel.processes=1: must be a multiple of parallel.tensor x parallel.pipeline x parallel.context = 2. "
        "Fix: use 2 processes or a multiple of it.",
    ),
    (
        "parallel.processes=6 parallel.tensor=2 parallel.pipeline=2",
        "parallel.processes=6: must be a multiple of parallel.tensor x parallel.pipeline x parallel.context = 4. "
        "Fix: use 4 processes or a multiple of it.",
    ),
    (
        "parallel.processes=6 rollout.tensor=4",
        "rollout.tensor=4: must divide the 6 processes evenly into engine replicas. Fix: use 1, 2, 3 or 6.",
    ),
    (
        "parallel.processes=8 parallel.tensor=8",
        "parallel.tensor=8: must divide the model's 12 attention heads. Fix: use 1, 2, 3, 4, 6 or 12.",
    ),
    (
        "parallel.processes=6 parallel.tensor=6",
        "parallel.tensor=6: must divide the model's 4 key-value heads or be a multiple of them. "
        "Fix: use 1, 2, 4 or 12.",
    ),
    (
        "parallel.processes=4 parallel.pipeline=4",
        "parallel.pipeline=4: must divide the model's 6 layers. "
        "Fix: use 1, 2, 3 or 6, or write the layers of each stage as parallel.stage_layers.",
    ),
    (
        "parallel.processes=8 rollout.tensor=8",
        "rollout.tensor=8: must divide the model's 12 attention heads. Fix: use 1, 2, 3, 4, 6 or 12.",
    ),
    (
        "parallel.processes=3 rollout.tensor=3",
        "rollout.tensor=3: must divide the model's 4 key-value heads or be a multiple of them. Fix: use 1, 2, 4 or 12.",
    ),
    (
        "parallel.processes=12 rollout.tensor=12",
        "rollout.tensor=12: must divide the model's vocabulary of 300, padded by vLLM to 320. Fix: use a power of two.",
    ),
    (
        "data.max_prompt_tokens=200",
        "data.max_prompt_tokens=200 + rollout.max_tokens=64: must fit the model's 256 positions. "
        "Fix: make them 8 tokens shorter.",
    ),
    (
        "evaluation.max_tokens=193",
        "data.max_prompt_tokens=64 + evaluation.max_tokens=193: must fit the model's 256 positions. "
        "Fix: make them 1 tokens shorter.",
    ),
    (
        "batch.tokens_per_microbatch=127",
        "batch.tokens_per_microbatch=127: must hold the longest sequence, "
        "data.max_prompt_tokens + rollout.max_tokens = 128. Fix: use 128 or more.",
    ),
    (
        "batch.updates=5",
        "batch.updates=5: must divide batch.prompts=12, so that every update gets an equal share. "
        "Fix: use 1, 2, 3, 4, 6 or 12.",
    ),
    (
        "batch.generation_prompts=11",
        "batch.generation_prompts=11: must be at least batch.prompts=12. Fix: raise it, or remove it.",
    ),
    (
        "batch.updates=12 rollout.group_size=2 parallel.processes=4",
        "batch.prompts=12: gives an update 2 sequence(s), fewer than the 4 data-parallel ranks. "
        "Fix: use more prompts, fewer updates or fewer processes.",
    ),
    (
        "algorithm=sft data.solution_column=solution batch.updates=6 parallel.processes=4",
        "batch.prompts=12: gives an update 2 sequence(s), fewer than the 4 data-parallel ranks. "
        "Fix: use more prompts, fewer updates or fewer processes.",
    ),
    (
        "algorithm=sft",
        "data.solution_column=null: must name the column of the worked solutions that algorithm.name=sft learns. "
        "Fix: set data.solution_column.",
    ),
    (
        "algorithm.aggregation_constant=64",
        "algorithm.aggregation_constant=64: has no effect with algorithm.aggregation=token_mean. "
        "Fix: set algorithm.aggregation=constant or remove it.",
    ),
    (
        "algorithm.overlong_buffer=64",
        "algorithm.overlong_buffer=64: must be below rollout.max_tokens=64. "
        "Fix: shorten the buffer or allow longer responses.",
    ),
    (
        "rollout.group_size=1 algorithm.dynamic_sampling=true algorithm.singleton_advantage=reward",
        "algorithm.dynamic_sampling=true: drops every group of rollout.group_size=1, whose rewards are always "
        "all equal. "
        "Fix: set rollout.group_size to 2 or more.",
    ),
    (
        "rollout.group_size=1",
        "rollout.group_size=1: gives every answer the advantage 0, from which nothing is learned. "
        "Fix: set rollout.group_size to 2 or more, or algorithm.singleton_advantage=reward.",
    ),
    (
        "algorithm.advantage=rloo algorithm.normalize_std=true",
        "algorithm.normalize_std=true: has no effect with algorithm.advantage=rloo. Fix: remove it.",
    ),
    (
        "algorithm.advantage=opo algorithm.std_estimator=sample",
        "algorithm.std_estimator=sample: has no effect with algorithm.advantage=opo. Fix: remove it.",
    ),
    (
        "algorithm.advantage=reinforce_pp algorithm.singleton_advantage=reward",
        "algorithm.singleton_advantage=reward: has no effect with algorithm.advantage=reinforce_pp. Fix: remove it.",
    ),
    (
        "algorithm.advantage=reinforce_pp_baseline algorithm.normalize_std=false",
        "algorithm.normalize_std=false: has no effect with algorithm.advantage=reinforce_pp_baseline. Fix: remove it.",
    ),
    (
        "algorithm.normalize_std=false algorithm.std_estimator=sample",
        "algorithm.std_estimator=sample: has no effect with algorithm.normalize_std=false. Fix: remove it.",
    ),
    (
        "algorithm.normalize_std=false algorithm.std_epsilon=1e-4",
        "algorithm.std_epsilon=0.0001: has no effect with algorithm.normalize_std=false. Fix: remove it.",
    ),
    (
        "algorithm.advantage=pass_at_k_loo algorithm.pass_k=2 algorithm.std_epsilon=0",
        "algorithm.std_epsilon=0: has no effect with algorithm.advantage=pass_at_k_loo. Fix: remove it.",
    ),
    (
        "algorithm=start reward.graded=response algorithm.normalize_std=false algorithm.std_estimator=sample",
        "algorithm.std_estimator=sample: has no effect with algorithm.normalize_std=false. Fix: remove it.",
    ),
    (
        "algorithm.kl_kind=k1",
        "algorithm.kl_kind=k1: has no effect with algorithm.kl_coefficient=0. Fix: set "
        "algorithm.kl_coefficient or remove it.",
    ),
    (
        "algorithm.kl_cap=10",
        "algorithm.kl_cap=10: has no effect with algorithm.kl_coefficient=0. Fix: set "
        "algorithm.kl_coefficient or remove it.",
    ),
    (
        "algorithm.overlong_penalty=0.5",
        "algorithm.overlong_penalty=0.5: has no effect without algorithm.overlong_buffer. Fix: set "
        "algorithm.overlong_buffer or remove it.",
    ),
    (
        "algorithm.max_generation_batches=3",
        "algorithm.max_generation_batches=3: has no effect with algorithm.dynamic_sampling=false. Fix: set "
        "algorithm.dynamic_sampling=true or remove it.",
    ),
    (
        "batch.generation_prompts=24",
        "batch.generation_prompts=24: has no effect with algorithm.dynamic_sampling=false. Fix: set "
        "algorithm.dynamic_sampling=true or remove it.",
    ),
    (
        "algorithm=nft algorithm.dynamic_sampling=false algorithm.max_generation_batches=3",
        "algorithm.max_generation_batches=3: has no effect with algorithm.dynamic_sampling=false. Fix: set "
        "algorithm.dynamic_sampling=true or remove it.",
    ),
    (
        "algorithm=nft algorithm.aggregation=token_mean algorithm.aggregation_constant=64",
        "algorithm.aggregation_constant=64: has no effect with algorithm.aggregation=token_mean. Fix: set "
        "algorithm.aggregation=constant or remove it.",
    ),
    (
        "optimizer.lr=1e-3 optimizer.min_lr=1e-4",
        "optimizer.min_lr=0.0001: has no effect with optimizer.decay=constant. Fix: set "
        "optimizer.decay=linear or cosine, or remove it.",
    ),
    (
        "recompute.modules=[mlp]",
        "recompute.modules=[mlp]: has no effect with recompute.kind=none. Fix: set recompute.kind=selective "
        "or remove it.",
    ),
    (
        "recompute.kind=selective recompute.layers=2",
        "recompute.layers=2: has no effect with recompute.kind=selective. Fix: set recompute.kind=full or remove it.",
    ),
    (
        "moe.router_dtype=fp64",
        "moe.router_dtype=fp64: is for mixtures of experts, and a qwen2 model is dense. Fix: remove moe.router_dtype.",
    ),
    (
        "algorithm.pass_k=4",
        "algorithm.pass_k=4: has no effect with algorithm.advantage=grpo. "
        "Fix: set algorithm.advantage=pass_at_k or pass_at_k_loo, or remove it.",
    ),
    (
        "algorithm.advantage=pass_at_k",
        "algorithm.advantage=pass_at_k: needs algorithm.pass_k, the k of pass@k. Fix: set algorithm.pass_k.",
    ),
    (
        "algorithm.advantage=pass_at_k algorithm.pass_k=8 rollout.group_size=8",
        "algorithm.pass_k=8: must be 1 to 7 with algorithm.advantage=pass_at_k and rollout.group_size=8. "
        "Fix: choose it so, or change rollout.group_size.",
    ),
    (
        "algorithm.advantage=pass_at_k_loo algorithm.pass_k=1 rollout.group_size=8",
        "algorithm.pass_k=1: must be 2 to 8 with algorithm.advantage=pass_at_k_loo and rollout.group_size=8. "
        "Fix: choose it so, or change rollout.group_size.",
    ),
    (
        "algorithm.advantage=pass_at_k algorithm.pass_k=2 rollout.group_size=1",
        "rollout.group_size=1: gives every answer the advantage 0, from which nothing is learned. "
        "Fix: set rollout.group_size to 2 or more, or algorithm.singleton_advantage=reward.",
    ),
    (
        "algorithm.importance_mode=mask",
        "algorithm.importance_mode=mask: has no effect without algorithm.importance_cap. "
        "Fix: set algorithm.importance_cap or remove it.",
    ),
    (
        "algorithm.importance_level=sequence",
        "algorithm.importance_level=sequence: has no effect without algorithm.importance_cap. "
        "Fix: set algorithm.importance_cap or remove it.",
    ),
    (
        "algorithm.importance_floor=0.5",
        "algorithm.importance_floor=0.5: has no effect without algorithm.importance_cap. "
        "Fix: set algorithm.importance_cap or remove it.",
    ),
    (
        "algorithm.importance_floor=3 algorithm.importance_cap=2",
        "algorithm.importance_floor=3: must not exceed algorithm.importance_cap=2. "
        "Fix: lower it, or raise algorithm.importance_cap.",
    ),
    (
        "algorithm.importance_mode=mask algorithm.importance_cap=0.9",
        "algorithm.importance_mode=mask: needs bounds with 1 between them, else it leaves out every token on which "
        "policy and engine agree. "
        "Fix: set algorithm.importance_cap to 1 or more and algorithm.importance_floor to 1 or less.",
    ),
    (
        "algorithm.rejection_level=sequence",
        "algorithm.rejection_level=sequence: has no effect without algorithm.rejection_bounds. "
        "Fix: set algorithm.rejection_bounds or remove it.",
    ),
    (
        "algorithm.rejection_bounds=[1.5,2]",
        "algorithm.rejection_bounds=[1.5, 2]: must be a lower and an upper bound with 1 between them, the ratio where "
        "policy and engine agree. Fix: choose them so, as in [0.5, 2].",
    ),
    (
        "algorithm.rejection_bounds=[0.5,2] algorithm.ratio_level=sequence",
        "algorithm.rejection_level=token with algorithm.ratio_level=sequence: would leave tokens out of an answer "
        "whose ratio is one for all its tokens. "
        "Fix: use another algorithm.rejection_level, or algorithm.ratio_level=token.",
    ),
    ("data.path=null", "data.path=null: names no data, and data.sources neither. Fix: give a file or a hub name."),
    (
        "data.sources=[{path: o/n}]",
        "data.path=rows.jsonl: contradicts data.sources. Fix: give one: data.path=null.",
    ),
    (
        "data.path=[a.csv,b.csv]",
        "data.path=[a.csv,b.csv]: is one path in an argument, not a list. "
        "Fix: give data.sources='[{path: FILE}, {path: FILE}]'.",
    ),
    (
        "data.path=null data.sources=[{path: a/b, weight: 2}, {path: c/d}]",
        "data.sources.1.weight: must be given, since other sources have one. Fix: give all sources a weight, or none.",
    ),
    (
        "data.path=null data.sources=[{path: a/b, name: x}, {path: c/d, name: x}]",
        "data.sources: name=x: names several sources. Fix: give each a name of its own.",
    ),
    (
        "evaluation.sources=[{path: a/b, weight: 2}]",
        "evaluation.sources.0.weight=2: means nothing in an evaluation, which answers every row. "
        "Fix: remove it, or use fewer rows with max_rows.",
    ),
    (
        "data.system=Short. data.template={prompt}",
        "data.system='Short.': is never said, since data.template takes the place of the chat. "
        "Fix: write it into data.template, or remove one of the two.",
    ),
    ("epochs=2", "epochs=2: contradicts steps=3. Fix: give one: steps=null."),
    ("reward.low=1", "reward.low=1: must be below reward.high=1. Fix: widen the range."),
    (
        "reward.kind=maths",
        "reward.kind=maths: must be math, boxed, deepscaler, f1, judge, sum, package.module:function or "
        "folder/file.py:function. "
        "Fix: correct reward.kind.",
    ),
    (
        "algorithm={name: opd}",
        "algorithm.teacher: names nobody to learn from. Fix: set algorithm.teacher.checkpoint, or "
        "algorithm.teacher.server.url and algorithm.teacher.server.model.",
    ),
    (
        "algorithm={name: opd, teacher: {checkpoint: there, server: {url: http://host/v1, model: m}}}",
        "algorithm.teacher.checkpoint=there: contradicts algorithm.teacher.server: there is one teacher. "
        "Fix: remove one of the two.",
    ),
    (
        "algorithm={name: opd, teacher: {server: {url: http://host/v1, model: m}}} rollout.temperature=0.7",
        "rollout.temperature=0.7: must be 1 with algorithm.teacher.server, since a server gives the log-probs of the "
        "plain distribution. Fix: remove it.",
    ),
    (
        "algorithm={name: opd, teacher: {checkpoint: nowhere}}",
        "algorithm.teacher.checkpoint=nowhere: is not a directory. Fix: give a megarl checkpoint, or a run's "
        "checkpoints/ folder.",
    ),
    ("optimizer.min_lr=1e-3", "optimizer.min_lr=0.001: must not exceed optimizer.lr=1e-06. Fix: lower min_lr."),
    (
        "resume=auto checkpoint.optimizer=false",
        "resume=auto: needs the optimizer's state, which checkpoint.optimizer=false leaves out. "
        "Fix: set checkpoint.optimizer=true, or load weights alone with model.weights.",
    ),
    (
        "resume=auto checkpoint.end=false",
        "resume=auto: needs checkpoints, which checkpoint.every=0 with checkpoint.end=false never saves. "
        "Fix: set checkpoint.every.",
    ),
    (
        "resume=must",
        "resume=must: needs a checkpoint in runs/case/checkpoints. "
        "Fix: use resume=auto to start a new run where there is none.",
    ),
    (
        "rollout.top_p=0.5 algorithm.importance_cap=2",
        "rollout.top_p=0.5: samples from another distribution than the policy's, whose log-probs algorithm.name=grpo "
        "trains on: gradients and importance weights would be biased. Fix: remove it; evaluation.top_p is free.",
    ),
    (
        "algorithm=nft rollout.top_k=50",
        "rollout.top_k=50: samples from another distribution than the policy's, whose log-probs algorithm.name=nft "
        "trains on: gradients and importance weights would be biased. Fix: remove it.",
    ),
    (
        "vllm.logits_processors=[m:C]",
        "vllm.logits_processors: is set by megarl. Fix: remove it; training depends on megarl's value.",
    ),
    (
        "vllm.override_generation_config={top_p: 0.5}",
        "vllm.override_generation_config: is set by megarl. "
        "Fix: set temperature, top_p and max_tokens of rollout and evaluation.",
    ),
    (
        "rollout.stop_token_ids=[299,300,-1]",
        "rollout.stop_token_ids=[299, 300, -1]: must be tokens of the model's vocabulary, 0 to 299. "
        "Fix: remove 300 or -1.",
    ),
    ("rollout.top_k=0", "rollout.top_k=0: must be -1 or at least 1. Fix: use -1 to sample from all tokens."),
    (
        "evaluation.samples=4",
        "evaluation.samples=4: needs evaluation.temperature > 0, since greedy answers are all the same. "
        "Fix: set evaluation.temperature, or samples to 1.",
    ),
    (
        "evaluation.consumer=initial",
        "reward.graded=whole: must be response with evaluation.consumer: only the response is the consumer's. "
        "Fix: set reward.graded=response.",
    ),
    (
        "evaluation.consumer=initial reward.graded=response evaluation.reward.kind=f1",
        "evaluation.reward.graded=whole: must be response with evaluation.consumer: only the response is the "
        "consumer's. Fix: set evaluation.reward.graded=response.",
    ),
    (
        "data.template=Question",
        "data.template='Question': must contain {prompt}. Fix: put {prompt} where the question belongs.",
    ),
    (
        "data.answer_pattern=.+",
        "data.answer_pattern='.+': must have exactly one group and has 0. "
        "Fix: write one pair of brackets around the answer.",
    ),
    (
        "data.answer_pattern=(",
        "data.answer_pattern='(': must be a regular expression (missing ), unterminated subpattern at position 0). "
        "Fix: write one pair of brackets around the answer.",
    ),
    (
        "adapter.rank=8 adapter.targets=[q_proj]",
        "adapter.rank=8: has no effect with parameters=policy. Fix: set parameters=adapter, or remove it.",
    ),
    (
        "parameters=adapter adapter.targets=[q_proj,qproj]",
        "adapter.targets=qproj: matches no linear layer of a qwen2 model with this config.json. Fix: name some of "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head, or all-linear.",
    ),
    (
        "parameters=adapter adapter.targets=[embed_tokens]",
        "adapter.targets=embed_tokens: takes no adapter: norms, embeddings, routers and gates have none. Fix: name "
        "some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head, or all-linear.",
    ),
    (
        "parameters=adapter adapter.rank=21",
        "adapter.rank=21: must not exceed the sizes of the matrices that it is for: k_proj is 20 x 64. Fix: use at "
        "most 20, or leave it out of adapter.targets.",
    ),
    (
        "parameters=adapter adapter.rank=65 adapter.targets=[mlp.up_proj]",
        "adapter.rank=65: must not exceed the sizes of the matrices that it is for: up_proj is 96 x 64. Fix: use at "
        "most 64, or leave it out of adapter.targets.",
    ),
    (
        "megatron.gradient_accumulation_fusion=true",
        "megatron.gradient_accumulation_fusion: is set by megarl. Fix: remove it; training depends on megarl's value.",
    ),
    ("vllm.dtype=auto", "vllm.dtype: is set by megarl. Fix: set precision."),
    ("megatron.fp16=true", "megatron.fp16: is set by megarl. Fix: set precision."),
    (
        "model.path=nowhere",
        "model.path=nowhere: must be a Hugging Face checkpoint directory with a config.json. "
        "Fix: give an existing directory.",
    ),
    (
        "model.tokenizer=nowhere.model",
        "model.tokenizer=nowhere.model: does not exist. "
        "Fix: give a tokenizer directory or a sentencepiece .model file.",
    ),
    (
        "model.weights=nowhere",
        "model.weights=nowhere: is not a directory. Fix: give a megarl checkpoint, or a run's checkpoints/ folder.",
    ),
    (
        "evaluation.consumer=nowhere reward.graded=response",
        "evaluation.consumer=nowhere: is not a directory. "
        "Fix: give a megarl checkpoint, or a run's checkpoints/ folder.",
    ),
    (
        "model.weights=model model.random_init=true",
        "model.weights=model: contradicts model.random_init=true. Fix: remove one of the two.",
    ),
    (
        "data.path=nowhere.jsonl",
        "data.path=nowhere.jsonl: no such file. Fix: give a path relative to the working directory, or a hub name.",
    ),
    (
        "evaluation.path=nowhere.parquet",
        "evaluation.path=nowhere.parquet: no such file. "
        "Fix: give a path relative to the working directory, or a hub name.",
    ),
    (
        "rollout.replay=nowhere",
        "rollout.replay=nowhere: does not exist. "
        "Fix: give a file or a rollouts/ folder that a run with rollout.save=true wrote.",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_refused(run_file: Path, overrides: str, message: str) -> None:
    config = load_config(run_file, re.split(r" (?=[a-z_.]+=)", overrides))
    with pytest.raises(Refusal) as caught:
        check(config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "parallel.processes=2 parallel.tensor=2 parallel.sequence=true rollout.tensor=2",
        "parallel.processes=4 parallel.tensor=2 parallel.pipeline=2 rollout.tensor=4",
        "parallel.processes=6 parallel.pipeline=6 rollout.tensor=2",
        "parallel.virtual_pipeline=1 parallel.expert_tensor=1",
        "parameters=adapter adapter.rank=20 adapter.alpha=0.5",
        "parameters=adapter adapter.rank=64 adapter.targets=[mlp.up_proj,lm_head]",
        "data.max_prompt_tokens=192",
        "batch.tokens_per_microbatch=128",
        "batch.generation_prompts=12",
        "batch.updates=12 rollout.group_size=4 parallel.processes=4",
        "algorithm=sft data.solution_column=solution rollout.group_size=1",
        "algorithm.aggregation=constant algorithm.aggregation_constant=64 algorithm.overlong_buffer=63",
        "rollout.group_size=1 algorithm.singleton_advantage=reward",
        "algorithm=exp_dpo data.max_prompt_tokens=8 algorithm.explanation.max_prompt_tokens=64 rollout.top_p=0.9",
        "algorithm=sft data.solution_column=solution rollout.top_p=0.9",
        "evaluation.top_p=0.7 evaluation.temperature=1",
        "rollout.group_size=1 algorithm.advantage=reinforce_pp algorithm.std_estimator=sample",
        "algorithm.advantage=rloo",
        "algorithm.advantage=opo algorithm.normalize_std=null",
        "algorithm.advantage=reinforce_pp_baseline algorithm.aggregation=token_sum",
        "algorithm.advantage=pass_at_k algorithm.pass_k=4 rollout.group_size=8",
        "algorithm.advantage=pass_at_k_loo algorithm.pass_k=8 rollout.group_size=8 algorithm.normalize_std=true",
        "algorithm.importance_cap=5 algorithm.importance_floor=0.5 algorithm.importance_mode=mask",
        "algorithm.importance_cap=0.5 algorithm.importance_level=sequence",
        "algorithm.kl_kind=k3+ algorithm.kl_cap=10 algorithm.kl_coefficient=0.1",
        "algorithm.rejection_bounds=[0.9,1.1] algorithm.rejection_level=sequence_mean algorithm.ratio_level=sequence",
        "reward.low=-1 reward.kind=mine.rewards:grade",
        "optimizer.lr=1e-3 optimizer.min_lr=1e-3",
        "resume=auto",
        "rollout.stop_token_ids=[0,299]",
        "evaluation.samples=4 evaluation.temperature=0.6",
        "evaluation.consumer=initial reward.graded=response",
        "evaluation.consumer=model evaluation.reward.kind=f1 evaluation.reward.graded=response",
        "data.path=org/name data.answer_pattern=####(.+)",
        "model.weights=model",
        "megatron.moe_permute_fusion=false vllm.enforce_eager=true",
    ],
)
def test_allowed(run_file: Path, overrides: str) -> None:
    assert list(broken_rules(load_config(run_file, overrides.split()))) == []


def test_the_launchers_world_counts(run_file: Path) -> None:
    config = load_config(run_file, ["parallel.tensor=4", "rollout.tensor=2"])
    assert list(broken_rules(config, processes=8)) == []
    config = load_config(run_file, ["parallel.processes=2"])
    assert [str(each) for each in broken_rules(config, processes=8)] == [
        "parallel.processes=2: differs from the 8 processes that the launcher started. "
        "Fix: leave parallel.processes out under a launcher, or start that many."
    ]


def test_all_broken_rules_are_listed_in_order(run_file: Path) -> None:
    config = load_config(run_file, ["rollout.top_k=0", "batch.updates=5", "reward.low=2"])
    assert [each.value for each in broken_rules(config)] == ["batch.updates=5", "reward.low=2", "rollout.top_k=0"]


def test_the_mlp_must_be_divisible_too(run_file: Path) -> None:
    shape = model_shape_from_hf(MODEL | {"intermediate_size": 98})
    config = load_config(run_file, ["parallel.processes=4", "parallel.tensor=4"])
    assert [str(each) for each in broken_rules(config, shape)] == [
        "parallel.tensor=4: must divide the model's MLP size of 98. Fix: use 1 or 2."
    ]


def test_tied_embeddings_are_no_output_layer_to_adapt(run_file: Path) -> None:
    shape = model_shape_from_hf(MODEL | {"tie_word_embeddings": True})
    config = load_config(run_file, ["parameters=adapter", "adapter.targets=[lm_head]"])
    assert [str(each) for each in broken_rules(config, shape)] == [
        "adapter.targets=lm_head: takes no adapter: the output layer of this model is its embedding "
        "(tie_word_embeddings). Fix: name some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or "
        "all-linear."
    ]


def test_gate_and_up_of_experts_are_adapted_together(run_file: Path) -> None:
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    shape = model_shape_from_hf({key: value for key, value in MODEL.items() if key != "model_type"} | mixture)

    def broken(targets: str) -> list[str]:
        config = load_config(run_file, ["parameters=adapter", f"adapter.targets={targets}"])
        return [str(each) for each in broken_rules(config, shape)]

    assert broken("[q_proj,w1,w2]") == [
        "adapter.targets=q_proj,w1,w2: has the experts' w1 without their w3: PEFT's files have both as one. "
        "Fix: add w3, or remove w1."
    ]
    assert broken("[experts.w1,w3]") == broken("[w2]") == broken("[all-linear]") == []
    (said,) = broken("[gate]")
    assert said.startswith("adapter.targets=gate: takes no adapter: norms, embeddings, routers and gates have none.")


def test_broken_checkpoints(run_file: Path) -> None:
    config, weights = load_config(run_file), Path("model/model.safetensors")
    whole = weights.read_bytes()

    def message() -> str:
        with pytest.raises(Refusal) as caught:
            check(config)
        return str(caught.value)

    for broken in (whole[:-1], whole[:40], whole[:3], b"", b"\x08" + b"\0" * 7 + b"no json!"):
        weights.write_bytes(broken)
        assert message() == (
            "model/model.safetensors: is cut short or not a safetensors file. Fix: copy the checkpoint again."
        ), broken
    weights.unlink()
    assert message() == (
        "model.path=model: must hold weights as *.safetensors. "
        "Fix: give a complete checkpoint, or set model.random_init=true or model.weights."
    )
    assert list(broken_rules(load_config(run_file, ["model.random_init=true"]))) == []

    index = Path("model/model.safetensors.index.json")
    Path("model/part-1.safetensors").write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}))
    assert message() == (
        "model/part-2.safetensors: is named in model.safetensors.index.json and missing. "
        "Fix: copy the checkpoint again."
    )
    Path("model/part-2.safetensors").write_bytes(whole)
    assert list(broken_rules(config)) == []
    index.write_text('{"weight_map": ')
    assert message() == (
        "model/model.safetensors.index.json: must be JSON with a weight_map. Fix: copy the checkpoint again."
    )


def test_an_adapter_is_no_model(run_file: Path) -> None:
    folder = Path("adapter")
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(Path("model/model.safetensors").read_bytes())
    config = load_config(run_file, ["model.path=adapter"])
    said = (
        "model.path=adapter: is an adapter (adapter_config.json), not a whole model. Fix: merge it into its base model"
    )
    for beside in (None, "config.json"):
        if beside is not None:
            (folder / beside).write_bytes((Path("model") / beside).read_bytes())
        with pytest.raises(Refusal) as caught:
            check(config)
        assert str(caught.value).startswith(said)
    # A whole model that was trained with one keeps its notes.
    (folder / "model.safetensors").write_bytes(Path("model/model.safetensors").read_bytes())
    check(config)


def test_a_folder_is_no_package(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that wandb writes to, beside the run, and a module that hides an installed package."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    # As in a process that has not imported it.
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    Path("wandb").mkdir()
    config = load_config(run_file, ["logging.wandb=project", "logging.tensorboard=false"])
    assert [str(each) for each in broken_rules(config)] == [REFUSED[0][1]]
    Path("tensorboard.py").write_text("")
    importlib.invalidate_caches()
    assert [str(each) for each in broken_rules(load_config(run_file))] == [
        f"logging.tensorboard=true: needs the package tensorboard, which {Path.cwd()}/tensorboard.py hides. "
        "Fix: rename that file, or set logging.tensorboard=false."
    ]


def test_empty_data_file(run_file: Path) -> None:
    Path("rows.jsonl").write_text("")
    assert [str(each) for each in broken_rules(load_config(run_file))] == [
        "data.path=rows.jsonl: is empty. Fix: give a file with at least one row."
    ]


def test_resume_must_finds_a_checkpoint(run_file: Path) -> None:
    Path("runs/case/checkpoints/step_2").mkdir(parents=True)
    assert list(broken_rules(load_config(run_file, ["resume=must"]))) == []


def test_settings_and_algorithms_agree() -> None:
    context = AlgorithmContext(max_tokens=64, group_size=8)
    assert ALGORITHM_SETTINGS.keys() == ALGORITHMS.keys()
    for name, settings in ALGORITHM_SETTINGS.items():
        algorithm = build(settings.model_validate({"name": name}), context)
        assert type(algorithm) is ALGORITHMS[name]
