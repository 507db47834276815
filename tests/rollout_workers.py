"""What the rollout tests run in worlds of processes of their own, since vLLM keeps one tensor-parallel layout for each.

A scenario is given a folder beside that of the checkpoints; see `parity.run_world`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FAMILIES = {
    # name: (transformers classes, tied embeddings, precision, sizes beside SIZES)
    "qwen2": ("Qwen2", True, "fp32"),
    "llama": ("Llama", False, "fp32"),
    "mistral": ("Mistral", False, "fp32", {"sliding_window": None}),
    "qwen3": ("Qwen3", True, "fp32"),
    "qwen2-untied-bf16": ("Qwen2", False, "bf16"),
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
#: Mixtures of experts. An expert's 48 columns are padded by vLLM's CPU kernels to 64 and, on one rank of two, from 24
#: to 32; Mixtral's 96 are not.
MOE_FAMILIES = {
    # name: (transformers classes, tied embeddings, precision, sizes beside SIZES)
    "qwen3_moe": ("Qwen3Moe", True, "fp32", EXPERTS | {"norm_topk_prob": True}),
    "qwen2_moe": (
        "Qwen2Moe",
        False,
        "fp32",
        EXPERTS | {"shared_expert_intermediate_size": 64, "norm_topk_prob": False, "mlp_only_layers": [0]},
    ),
    "mixtral": ("Mixtral", False, "fp32", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe-bf16": ("Qwen3Moe", False, "bf16", EXPERTS | {"norm_topk_prob": False}),
}
# 130 is no multiple of vLLM's padding (64): the last tensor-parallel rank holds padding rows.
SIZES = {
    "vocab_size": 130,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}


def write_checkpoint(folder: Path, family: str, seed: int) -> Path:
    """A tiny random Hugging Face checkpoint, written once: by transformers, then to Megatron's format and back."""
    import torch
    import transformers

    from megarl.config.sections import ParallelSettings
    from megarl.conversion import to_hf, to_megatron
    from megarl.conversion.ranks import Ranks

    path = folder / f"{family}-{seed}"
    if not path.exists():
        classes, tied, _, *sizes = (FAMILIES | MOE_FAMILIES)[family]
        config = getattr(transformers, f"{classes}Config")(**SIZES, tie_word_embeddings=tied, **dict(*sizes))
        torch.manual_seed(seed)
        model = getattr(transformers, f"{classes}ForCausalLM")(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / "original" / path.name)
        megatron = folder / "megatron" / path.name
        to_megatron.convert(folder / "original" / path.name, megatron, ParallelSettings(tensor=2), Ranks())
        to_hf.convert(megatron, path, Ranks())
    return path


#: Those of this process: an engine that is collected takes the world's process groups with it.
_ENGINES: list[Any] = []


def engine_for(path: Path, family: str, *, load_weights: bool, record_routing: bool = False, **rollout: Any) -> Any:
    """An engine of the world this process has joined."""
    import torch.distributed as dist

    from megarl.config.model_shape import read_model_shape
    from megarl.config.schema import RunConfig
    from megarl.rollout.engine import Engine

    config = RunConfig.model_validate(
        {
            "name": "test",
            "steps": 1,
            "precision": (FAMILIES | MOE_FAMILIES)[family][2],
            "model": {"path": str(path)},
            "algorithm": {"name": "grpo"},
            "data": {"path": "unused", "max_prompt_tokens": 160},
            "rollout": {"kv_cache_gib": 0.02, "max_tokens": 24, "chunk": 4} | rollout,
        }
    )
    engine = Engine(
        config,
        read_model_shape(path),
        eos_token_ids=[1],
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        load_weights=load_weights,
        record_routing=record_routing,
    )
    _ENGINES.append(engine)
    return engine


def requests(number: int, *, seeded: bool = True) -> list[Any]:
    """Prompts of 3 to 13 tokens, each with a seed."""
    from megarl.rollout.engine import Request
    from megarl.rollout.seeds import sample_seed

    return [
        Request(tuple(2 + (5 * i + j) % 120 for j in range(3 + i % 11)), i, sample_seed(7, 0, i, 0) if seeded else None)
        for i in range(number)
    ]


def write_slots(weights: Any, path: Path, rank: int, size: int) -> dict[str, Any]:
    """Push a Hugging Face checkpoint's weights, cut for tensor-parallel rank `rank` of `size`, into the engine.

    Returns what was written to each slot, without padding.
    """
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")

    def rows(name: str) -> Any:
        tensor = tensors[name]
        count = tensor.shape[0] // size
        return tensor[rank * count : (rank + 1) * count]

    def columns(name: str) -> Any:
        return tensors[name].chunk(size, dim=1)[rank]

    weights.begin()
    written = {}
    for name, slot in weights.tensors().items():
        layer, _, kind = name.rpartition(".")
        parent, _, module = layer.rpartition(".")
        target = weights.buffer(name)
        if module == "routed_experts":
            value = _experts(parent, kind, slot.shape[0], rows, columns)
        elif module == "qkv_proj":
            value = _cat([rows(f"{parent}.{part}_proj.{kind}") for part in "qkv"])
        elif module == "gate_up_proj":
            value = _cat([rows(f"{parent}.{part}_proj.{kind}") for part in ("gate", "up")])
        elif module in ("o_proj", "down_proj"):
            value = columns(name)
        elif module in ("embed_tokens", "lm_head"):
            first = rank * slot.shape[0]
            value = tensors[name][first : first + slot.num_rows]
            target = target[: slot.num_rows]
        else:
            value = tensors[name]
        target.copy_(value)
        written[name] = value.to(slot.dtype)
        # Closing the layers without a bias one by one leaves the others to `end`.
        if module in ("o_proj", "down_proj", "lm_head", "routed_experts"):
            weights.finish([name])
    weights.end()
    return written


def _experts(parent: str, stack: str, experts: int, rows: Any, columns: Any) -> Any:
    """One of the two stacks of a layer's experts."""
    import torch

    gate, up, down = ("w1", "w3", "w2") if "block_sparse_moe" in parent else ("gate_proj", "up_proj", "down_proj")
    if stack == "w2_weight":
        return torch.stack([columns(f"{parent}.{i}.{down}.weight") for i in range(experts)])
    return torch.stack([_cat([rows(f"{parent}.{i}.{part}.weight") for part in (gate, up)]) for i in range(experts)])


def _cat(parts: list[Any]) -> Any:
    import torch

    return torch.cat(parts)


def weights_scenario(world: Any, folder: Path) -> Any:
    """For every family: engines that read checkpoints 1 and 2, and one engine that is written 1, 2 and 1."""
    import torch.distributed as dist

    from megarl.rollout.engine import Sampling
    from megarl.rollout.weights import EngineWeights

    rank, size = dist.get_rank(), dist.get_world_size()
    sampling = Sampling(max_tokens=24)
    results = {}
    # All stay alive: a vLLM engine that is collected takes the process's groups down with it.
    engines = []
    for family in FAMILIES:
        paths = [folder.parent / "checkpoints" / f"{family}-{seed}" for seed in (1, 2)]
        read = []
        for path in paths:
            engine = engine_for(path, family, load_weights=True, tensor=size)
            engines.append(engine)
            read.append((EngineWeights(engine).read_back(), engine.generate(requests(12), sampling)))
        engine = engine_for(paths[0], family, load_weights=False, tensor=size)
        engines.append(engine)
        weights = EngineWeights(engine)
        written = []
        for path in (paths[0], paths[1], paths[0]):
            write_slots(weights, path, rank, size)
            written.append((weights.read_back(), engine.generate(requests(12), sampling), weights.checksum()))
        results[family] = (read, written)
    return results


def experts_scenario(world: Any, folder: Path) -> Any:
    """For every mixture of experts: an engine that reads checkpoint 1, and one that is written 2 and then 1 and records
    its routing. Prompts are shared, and the KV cache is too small for all requests at a time."""
    import torch
    import torch.distributed as dist

    from megarl.rollout.engine import Sampling
    from megarl.rollout.weights import EngineWeights

    rank, size = dist.get_rank(), dist.get_world_size()
    sampling = Sampling(max_tokens=24, temperature=0.0)
    results = {}
    for family in MOE_FAMILIES:
        first, second = (folder.parent / "checkpoints" / f"{family}-{seed}" for seed in (1, 2))
        # 16 blocks of 32 tokens; 8 requests hold up to 32.
        rollout = {"tensor": size, "max_concurrent": 8, "kv_cache_gib": 16 * 32 * 1024 / size / 2**30}
        reader = engine_for(first, family, load_weights=True, **rollout)
        writer = engine_for(first, family, load_weights=False, record_routing=True, **rollout)
        _ENGINES.extend((reader, writer))
        read = EngineWeights(reader).read_back(), reader.generate(shared_prompts(), sampling)
        weights, written = EngineWeights(writer), []
        for path in (second, first):
            writer.sleep()
            writer.wake_weights()
            with largest_staging(weights) as staging:
                values = write_slots(weights, path, rank, size)
            writer.wake_cache()
            with pressure(writer) as counts:
                completions = writer.generate(shared_prompts(), sampling)
            written.append((values, weights.read_back(), completions, counts | staging))
        results[family] = read, written, planned(first, rank, size)
    # As Megatron's expert dispatcher does in the same process; vLLM's own stand-in for a stream has no event.
    torch.cuda.Stream().record_event().synchronize()
    return results


def planned(path: Path, rank: int, size: int) -> dict[str, Any]:
    """What the weight map puts into each parameter of this rank's engine, from a checkpoint."""
    from reshard_reference import slice_reader
    from safetensors.torch import load_file

    from megarl.config.model_shape import read_model_shape
    from megarl.reshard.copying import read_local
    from megarl.reshard.weight_map import vllm_tensors

    reader = slice_reader(load_file(path / "model.safetensors"))
    layout = vllm_tensors(read_model_shape(path), tensor=size, tensor_rank=rank)
    return {name: read_local(tensor, reader) for name, tensor in layout.items()}


@contextmanager
def largest_staging(weights: Any) -> Iterator[dict[str, int]]:
    """Counts, after every `finish`, the experts' staging tensors that are still alive; keeps the largest number."""
    found, alive = {"staged": 0}, []
    buffer, finish = weights.buffer, weights.finish

    def buffered(name: str) -> Any:
        tensor = buffer(name)
        if "routed_experts" in name:
            alive.append(weakref.ref(tensor))
        return tensor

    def finished(names: list[str]) -> None:
        finish(names)
        found["staged"] = max(found["staged"], sum(reference() is not None for reference in alive))

    weights.buffer, weights.finish = buffered, finished
    yield found
    weights.buffer, weights.finish = buffer, finish


@contextmanager
def pressure(engine: Any) -> Iterator[dict[str, int]]:
    """Counts prompt tokens found in the prefix cache, and requests thrown out to make room and computed again."""
    found = {"cached": 0, "thrown out": 0}
    scheduler = engine._engine.engine_core.engine_core.scheduler
    complete, preempt = engine._completion, scheduler._preempt_request

    def completed(output: Any) -> Any:
        found["cached"] += output.num_cached_tokens
        return complete(output)

    def preempted(*arguments: Any, **options: Any) -> Any:
        found["thrown out"] += 1
        return preempt(*arguments, **options)

    engine._completion, scheduler._preempt_request = completed, preempted
    yield found
    engine._completion, scheduler._preempt_request = complete, preempt


#: All stay alive: a vLLM engine that is collected takes the process's groups down with it.
_ENGINES: list[Any] = []


def shared_prompts() -> list[Any]:
    """Four prompts of 70 to 100 tokens, six times each, so that later ones are found in the prefix cache."""
    from megarl.rollout.engine import Request

    return [Request(tuple(2 + (7 * (i % 4) + j) % 120 for j in range(70 + 10 * (i % 4))), i) for i in range(24)]


def replicas_scenario(world: Any, folder: Path) -> Any:
    """Completions of this rank under fixed assignment, the shared counter, and without seeds."""
    import torch
    import torch.distributed as dist

    from megarl.rollout.engine import Sampling

    tensor = 2 if dist.get_world_size() > 2 else 1
    path = folder.parent / "checkpoints" / "qwen2-1"
    engine = engine_for(path, "qwen2", load_weights=True, tensor=tensor, max_concurrent=8)
    # As in training, the ranks' own random states differ.
    torch.manual_seed(dist.get_rank())
    sampling, work = Sampling(max_tokens=24, seed=5), requests(41)
    return {
        "replica": engine.replica,
        "speaks": engine.speaks,
        "fixed": engine.generate(work, sampling, engine.fixed_assignment(len(work))),
        "shared": engine.generate(work, sampling, engine.shared_counter(len(work))),
        "shared again": engine.generate(work, sampling, engine.shared_counter(len(work))),
        "unseeded": engine.generate(requests(41, seeded=False), sampling, engine.fixed_assignment(len(work))),
        **continued(engine, sampling),
        "turns": turns(engine, folder),
    }


def continued(engine: Any, sampling: Any) -> dict[str, Any]:
    """Answers, each followed by one to prompt, answer and a further token: in two calls; in one, where a request is
    submitted as soon as the answer before it is whole; and pumped by hand, as the replica's first rank says."""
    from megarl.rollout.engine import Request

    first = requests(12)

    def second(completion: Any, further: int = 5) -> Any:
        prompt = first[completion.index].prompt_token_ids
        return Request(
            (*prompt, *completion.token_ids, further), 100 + completion.index, completion.index, max_tokens=9
        )

    answers = engine.generate(first, sampling)
    two_calls = answers + engine.generate([second(one) for one in answers], sampling)
    one_call = engine.generate(
        first, sampling, None, lambda one: engine.submit(second(one)) if one.index < 100 else None
    )
    by_hand, counts = [], []
    with engine.generating(sampling):
        for request in first[:6]:
            engine.submit(request)
        while engine.running:
            finished = engine.pump()
            counts.append(engine.running)
            by_hand += finished
            # Known on the first rank alone.
            wanted = engine.told([(one.index, 5) for one in finished if one.index < 100] if engine.speaks else None)
            for index, further in wanted:
                engine.submit(second(next(one for one in finished if one.index == index), further))
        for request in first[6:]:
            engine.submit(request)
        collected = sorted(engine.collect(), key=lambda one: one.index)
        engine.submit(first[0])
    left = engine.running
    return {
        "two calls": two_calls,
        "one call": one_call,
        "by hand": by_hand,
        "collected": collected,
        "counts": counts,
        "left": left,
    }


def word_tokenizer(folder: Path) -> Any:
    """A tokenizer of the models' 130 tokens: w0 to w129, with blanks between them."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers

    from megarl.data.tokenizer import load_tokenizer

    inner = Tokenizer(models.WordLevel({f"w{number}": number for number in range(130)}, "w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1"}))
    return load_tokenizer(folder)


#: What the environments of ten samples do; of three tokens, they end with the token 129.
DEEDS = ("nothing", "raises", "dies", "sleeps", "dict", "start raises", "start dict", "beyond", "long", "nothing")


def turns(engine: Any, folder: Path) -> dict[str, Any]:
    """Samples of several turns, by environments good and bad."""
    import dataclasses
    import math

    import torch.distributed as dist

    from megarl.config.environments import EnvironmentSettings
    from megarl.environments import host as hosts
    from megarl.environments.base import Verdict
    from megarl.records import Prompt
    from megarl.rollout.engine import Request, Sampling
    from megarl.rollout.play import Bounds, Task, play

    tokenizer = word_tokenizer(folder / f"tokenizer-{dist.get_rank()}")
    asked = requests(24)
    tasks = [Task(one.index, Prompt(0, one.prompt_token_ids, "", "nothing"), one.index, one.seed) for one in asked]
    sampling, made = Sampling(max_tokens=40), []
    complete = engine._completion

    def completed(output: Any) -> Any:
        made.append((len(output.outputs[0].token_ids), output.num_cached_tokens))
        return complete(output)

    def played(settings: dict[str, Any], bounds: Any, tasks: Any = tasks, grade: Any = None) -> list[dict[str, Any]]:
        host = hosts.build(EnvironmentSettings(**settings), tokenizer, None, grade) if engine.speaks else None
        made.clear()
        engine._completion = completed
        found = play(engine, tasks, sampling, bounds, host, engine.fixed_assignment(len(tasks)))
        engine._completion = complete
        if host is not None:
            host.close()
        as_numbers = [dataclasses.asdict(one) for one in found]
        for one, numbers in zip(found, as_numbers, strict=True):
            numbers["turns"] = len(one.turns)
            numbers["log_probs"] = [None if math.isnan(value) else value for value in one.log_probs]
        return as_numbers

    tokens = {"kind": "environment_cases:Tokens", "arguments": {"turns": 3, "sleep": 0.05}}
    bounds = Bounds(turns=4, tokens=60, prompt_tokens=40, turn_tokens=12, samples=9)
    exact = dataclasses.replace(bounds, in_order=True)
    results: dict[str, Any] = {"played": played(tokens, bounds), "made": list(made)}
    results["in order"], results["again"] = played(tokens, exact), played(tokens, exact)
    first = [Request((*one.prompt_token_ids, 4), one.index, one.seed, 12) for one in asked]
    results["first turns"] = engine.generate(first, sampling, engine.fixed_assignment(len(first)))
    results["few turns"] = played(tokens, dataclasses.replace(bounds, turns=2))
    results["little room"] = played(tokens, dataclasses.replace(bounds, tokens=15))
    results["short prompts"] = played(tokens, dataclasses.replace(bounds, prompt_tokens=8))
    unseeded = [dataclasses.replace(one, seed=None) for one in tasks]
    results["unseeded"] = played({"kind": "environment_cases:Draws"}, bounds, unseeded)
    deeds = [
        dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, answer=DEEDS[one.index % 10])) for one in tasks
    ]
    results["deeds"] = played({"kind": "environment_cases:Misbehaves", "time_limit": 1.0}, bounds, deeds)

    def grade(said: Any) -> list[Verdict]:
        """Whether the last turn is of an odd length; of none that is a second one of two tokens or more."""
        odd = [float(len(one.turns[-1]) % 2) for one in said]
        known = [len(one.turns) == 1 or len(one.turns[-1]) < 2 for one in said]
        return [Verdict(one if there else None, {"graded": 1}) for one, there in zip(odd, known, strict=True)]

    retry = {"kind": "retry", "arguments": {"message": "w50 w51"}}
    results["retry"] = played(retry, dataclasses.replace(bounds, in_order=True), grade=grade)
    if engine.speaks:

        def grade_no_more(said: Any) -> list[Verdict]:
            from megarl.errors import ScoringStopped

            raise ScoringStopped("the judge is away")

        grade = grade_no_more
    try:
        played(retry, bounds, grade=grade)
    except Exception as error:
        engine._completion = complete
        results["stopped"] = f"{type(error).__name__}: {error}"
    results["running"] = engine.running
    return results


def generate_scenario(world: Any, folder: Path) -> Any:
    """One engine in one process, called in many ways."""
    import random

    import numpy as np
    import torch

    from megarl.rollout.engine import Request, Sampling

    path = folder.parent / "checkpoints" / "qwen2-1"
    states = (torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())
    engine = engine_for(path, "qwen2", load_weights=True, max_concurrent=16)
    work, sampling = requests(40), Sampling(max_tokens=24)
    engine.weights_changed(7)
    results = {
        "plain": engine.generate(work, sampling),
        "again": engine.generate(work, sampling),
        "unseeded": engine.generate(requests(40, seeded=False), Sampling(max_tokens=24, seed=1)),
        "unseeded again": engine.generate(requests(40, seeded=False), Sampling(max_tokens=24, seed=1)),
        "unseeded other": engine.generate(requests(40, seeded=False), Sampling(max_tokens=24, seed=2)),
        "greedy": engine.generate(work, Sampling(max_tokens=24, temperature=0.0)),
        "shaped": engine.generate(work, Sampling(max_tokens=24, temperature=0.7, top_p=0.8, top_k=20)),
        "stop": engine.generate(work, Sampling(max_tokens=24, stop_token_ids=(5, 9, 17, 33))),
        # Long prompts fill the token budget of one step several times over.
        "long": engine.generate([Request(tuple(2 + i % 100 for i in range(150)), k, k) for k in range(80)], sampling),
    }
    results["states kept"] = (
        torch.equal(states[0], torch.get_rng_state())
        and repr(states[1]) == repr(np.random.get_state(legacy=False))
        and states[2] == random.getstate()
    )
    # The replica's first rank is asked before the first step and after every 32.
    answers = iter([False, False, True])
    engine.stop = lambda: next(answers)
    results["stopped"] = engine.generate(requests(200), sampling), engine.running, engine.generate(work, sampling)
    return results
