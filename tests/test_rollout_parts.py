"""The rollout's parts that need no engine: seeds, work distribution, phases, arguments."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import preloaded
import pytest
from config_case import config_with
from torch._C._distributed_c10d import HashStore

from megarl.config.model_shape import FAMILIES, ModelShape, model_shape_from_hf
from megarl.errors import Interrupted, PhaseError, Refusal
from megarl.parallel.launch import deliver
from megarl.rollout import vllm_setup
from megarl.rollout.arguments import engine_arguments, register_model_class
from megarl.rollout.draw import FixedAssignment, SharedCounter
from megarl.rollout.phases import Memory, NoSleeper, Phase, Phases
from megarl.rollout.seeds import batch_seed, hash_seed, sample_seed


def test_seeds_are_stable_and_distinct():
    # A changed value would break the exact continuation of runs begun before the change.
    assert sample_seed(1234, 7, 42, 3) == 8789022837760256467
    assert sample_seed(1, 23, 4, 5) != sample_seed(12, 3, 4, 5)
    seeds = {sample_seed(s, t, p, i) for s in range(3) for t in range(3) for p in range(20) for i in range(20)}
    assert len(seeds) == 3 * 3 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert batch_seed(1, 2, 3) != hash_seed("sample", 1, 2, 3)


def drain(source: FixedAssignment | SharedCounter) -> list[int]:
    found: list[int] = []
    while (chunk := source.draw()) is not None:
        found.extend(chunk)
    assert source.draw() is None
    return found


@pytest.mark.parametrize(("total", "replicas"), [(0, 2), (1, 3), (7, 2), (12, 4)])
def test_fixed_assignment_is_round_robin(total: int, replicas: int):
    shares = [drain(FixedAssignment(total, r, replicas)) for r in range(replicas)]
    assert shares == [[i for i in range(total) if i % replicas == r] for r in range(replicas)]


def test_shared_counter_gives_every_request_once():
    store, shares = HashStore(), [[] for _ in range(4)]

    def replica(number: int) -> None:
        shares[number] = drain(SharedCounter(store, "call 1", total=103, chunk=8, group=None))

    threads = [threading.Thread(target=replica, args=(r,)) for r in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(index for share in shares for index in share) == list(range(103))
    # Another call's key starts from the beginning.
    assert drain(SharedCounter(store, "call 2", total=5, chunk=8, group=None)) == [0, 1, 2, 3, 4]


class Recorder(NoSleeper):
    """Writes down what a GPU would be asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self, tags: Sequence[str]) -> None:
        self.calls.extend(tags)


def test_phases_in_order():
    recorder = Recorder()
    phases = Phases(recorder)
    phases.weights_written()
    phases.require_ready()
    for _ in range(2):
        phases.sleep()
        phases.require(Memory.OPTIMIZER)
        phases.wake_weights()
        phases.require(Memory.POLICY)
        phases.weights_written()
        phases.wake_cache()
        phases.require_ready()
    assert recorder.calls == ["sleep", "weights", "kv_cache"] * 2
    assert phases.phase is Phase.GENERATE


def test_sleeping_parts_are_named():
    phases = Phases(NoSleeper())
    with pytest.raises(PhaseError, match="engine weights used in phase generate before a push"):
        phases.require_ready()
    with pytest.raises(PhaseError, match="optimizer state touched in phase generate"):
        phases.require(Memory.OPTIMIZER)
    with pytest.raises(PhaseError, match="cannot wake the engine's weights in phase generate"):
        phases.wake_weights()
    phases.sleep()
    with pytest.raises(PhaseError, match="engine KV cache touched in phase train"):
        phases.require_ready()
    with pytest.raises(PhaseError, match="engine weights touched in phase train"):
        phases.weights_written()
    with pytest.raises(PhaseError, match="cannot put the engine to sleep in phase train: possible only in phase gene"):
        phases.sleep()
    phases.wake_weights()
    # A sleeping engine has forgotten its weights: without a push it must not generate.
    with pytest.raises(PhaseError, match="engine weights used in phase push before a push"):
        phases.wake_cache()
    with pytest.raises(PhaseError, match="engine KV cache touched in phase push"):
        phases.require(Memory.ENGINE_CACHE)


#: A mixture of experts of a size that fits.
EXPERTS = {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
#: Its heads may have another size than the model's by their number.
FURTHER_EXPERTS = EXPERTS | {"model_type": "qwen3_moe", "shared_expert_intermediate_size": 0}


def shape_with(**changes: object) -> ModelShape:
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "vocab_size": 100,
        "max_position_embeddings": 128,
    }
    return model_shape_from_hf({"model_type": "qwen2"} | sizes | changes)


def test_arguments_follow_the_configuration():
    config = config_with(
        precision="bf16", rollout={"tensor": 2, "max_tokens": 64, "max_concurrent": 12}, vllm={"block_size": 32}
    )
    arguments = engine_arguments(config, shape_with(), load_weights=False)
    expected = {
        "tensor_parallel_size": 2,
        "max_model_len": 128,
        "max_num_seqs": 12,
        "dtype": "bfloat16",
        "load_format": "dummy",
        "block_size": 32,
        "config_format": "hf",
        "runner": "generate",
    }
    assert expected.items() <= arguments.items()


@pytest.mark.parametrize(
    ("sections", "shape", "message"),
    [
        ({}, {"hidden_size": 64}, "attention heads of 16 elements: vLLM's CPU backend has kernels for 32, 64"),
        (
            {},
            FURTHER_EXPERTS | {"hidden_size": 144, "head_dim": 32},
            "hidden_size=144 of a mixture of experts: must be a multiple of 32 for vLLM's CPU kernels",
        ),
    ],
)
def test_refused_arguments(sections: dict, shape: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Refusal) as refusal:
        engine_arguments(config_with(**sections), shape_with(**shape), load_weights=False)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("sections", "shape", "message"),
    [
        ({}, {}, "recorded routing of a qwen2 model: needs a mixture of experts"),
        ({"vllm": {"enforce_eager": False}}, EXPERTS, "vllm.enforce_eager=false: must be left on where routing is"),
    ],
)
def test_routing_that_cannot_be_recorded_on_the_cpu(
    sections: dict, shape: dict, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Refusal) as refusal:
        engine_arguments(config_with(**sections), shape_with(**shape), load_weights=False, record_routing=True)
    assert message in str(refusal.value)


def test_routing_is_asked_of_vllm_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch):
    for gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        for recorded in (False, True):
            arguments = engine_arguments(
                config_with(), shape_with(**EXPERTS), load_weights=False, record_routing=recorded
            )
            assert arguments.get("enable_return_routed_experts", False) == (gpu and recorded)
            # With a step under way, the reset of the prefix cache would find it outdated.
            assert arguments.get("async_scheduling") == (False if gpu and recorded else None)


def test_a_gpus_batches_are_those_of_an_offline_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    def batch(**sections: object) -> int:
        arguments = engine_arguments(config_with(**sections), shape_with(), load_weights=False)
        return arguments["max_num_batched_tokens"]

    assert batch() == 16384
    assert batch(vllm={"max_num_batched_tokens": 4096}) == 4096
    many = {"max_tokens": 64, "max_concurrent": 20000}
    assert batch(rollout=many) == 20000
    assert batch(rollout={"max_tokens": 19936}, vllm={"enable_chunked_prefill": False}) == 20000


def test_an_engine_in_fp8_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """vLLM is given a checkpoint in blocks, and kernels that keep them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = config_with(rollout={"max_tokens": 64, "precision": "fp8"})
    shape = shape_with(**EXPERTS, hidden_size=128)
    arguments = engine_arguments(config, shape, load_weights=False)
    stated = arguments["hf_overrides"]["quantization_config"]
    assert stated["weight_block_size"] == [128, 128] and "model.layers.0.mlp.gate" in stated["modules_to_not_convert"]
    assert (arguments["moe_backend"], arguments["dtype"]) == ("triton", "bfloat16")
    plain = engine_arguments(config_with(), shape_with(), load_weights=False)
    assert plain["hf_overrides"] == {"quantization_config": None} and "moe_backend" not in plain


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_refused_by_either_name(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(Refusal) as refusal:
        engine_arguments(config_with(), shape_with(), load_weights=False)
    assert str(refusal.value) == (
        f"{name} with expandable_segments:True: vLLM's sleep mode cannot free memory held in expandable segments. "
        "Fix: unset it."
    )
    monkeypatch.setenv(name, "max_split_size_mb:64")
    engine_arguments(config_with(), shape_with(), load_weights=False)


def test_every_family_has_a_class_of_vllm():
    for family in FAMILIES:
        register_model_class(family)


def _end_while_quiet() -> None:
    with vllm_setup.quiet():
        print("noise of a library", flush=True)
        deliver(Interrupted("rank 1 is gone"))
        os._exit(75)


def _fail_while_quiet() -> None:
    with vllm_setup.quiet():
        print("what a library said", flush=True)
        raise Interrupted("failed")


@pytest.mark.processes
def test_last_words_are_heard_while_libraries_are_silenced():
    """A rank's watch may end the process while an engine is built."""
    ended = preloaded.Started(_end_while_quiet)
    output, _ = ended.communicate(60)
    assert (ended.returncode, output) == (75, "megarl: rank 1 is gone\n")
    failed = preloaded.Started(_fail_while_quiet)
    output, _ = failed.communicate(60)
    assert failed.returncode == 1 and "what a library said\n" in output
