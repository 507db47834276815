"""Weights of an engine that change in the midst of a step, and log-probs that are not the policy's: the run stops."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import arithmetic_run
import preloaded
import pytest
import torch

#: Of the rank whose engine is changed.
BAD = 1

Deed = Callable[[Any], None]


def model_of(engine: Any) -> Any:
    return engine.call_worker(lambda worker: worker.get_model()).model


def change_embedding(engine: Any) -> None:
    model_of(engine).embed_tokens.weight.data[3, 5] += 0.25


def change_norm(engine: Any) -> None:
    """A tensor of its own in the place of the one that was filled."""
    norm = model_of(engine).norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
    norm.weight.data[7] = 9.0


def change_packed(engine: Any) -> None:
    """One element of the keys' projection, which vLLM has packed with the queries' and the values' on the CPU."""
    from megarl.rollout import weights

    layer = model_of(engine).layers[1].self_attn.qkv_proj
    weight = weights._unpack(layer)
    weight[layer.output_sizes[0] // layer.tp_size + 2, 4] -= 0.5
    weights._replace(layer, "weight", weight)
    layer.quant_method.process_weights_after_loading(layer)


def stretch_norms(engine: Any) -> None:
    for layer in model_of(engine).layers:
        layer.input_layernorm.weight.data.mul_(-3.0)
    model_of(engine).norm.weight.data.mul_(-40.0)


def spoil_norm(engine: Any) -> None:
    model_of(engine).norm.weight.data[5] = torch.nan


def attempts(folder: Path) -> None:
    """Steps of one session whose engine is changed on one rank; writes what each says on every rank."""
    from megarl.config.load import load_config
    from megarl.parallel.launch import launch

    config = load_config(folder / "run.yaml")
    for rank, said in enumerate(launch(attempt_all, (config,), 2)):
        (folder / f"said-{rank}").write_text(repr(said))


def attempt_all(config: Any) -> Any:
    from megarl.errors import MegarlError
    from megarl.parallel import progress
    from megarl.parallel.exchange import gather_all
    from megarl.rollout.phases import Phase
    from megarl.train import generation, run
    from megarl.train.loop import run_step
    from megarl.train.session import unfinished_directory

    said: dict[str, str] = {}
    with run.session_of(config, writes=True) as session:
        progress.enter("step")

        def attempt(name: str, before: Deed | None = None, after: Deed | None = None) -> None:
            def generate(*arguments: Any, **named: Any) -> Any:
                if before is not None and session.world.rank == BAD:
                    before(session.inference.engine)
                found = made(*arguments, **named)
                if after is not None and session.world.rank == BAD:
                    after(session.inference.engine)
                return found

            made, step = generation.generate, session.progress.step
            weights = [parameter.detach().clone() for _, parameter in session.policy.named_parameters()]
            with mock.patch.object(generation, "generate", generate):
                try:
                    run_step(session, step + 1)
                    said[name] = "learned"
                except MegarlError as error:
                    said[name] = f"{type(error).__name__} {error.exit_code} {error}"
            now = [parameter for _, parameter in session.policy.named_parameters()]
            same = all(torch.equal(old, new) for old, new in zip(weights, now, strict=True))
            learned = said[name] == "learned"
            assert learned != same and session.progress.step == step + learned
            if session.world.is_first:
                # What a changed engine made is not taken up again.
                assert any(unfinished_directory(config).glob(f"step_{step + 1:06d}*")) == learned
            assert session.inference.engine is not None
            if session.inference.engine.phases.phase is Phase.GENERATE:
                session.inference.engine.sleep()
                session.policy.onload()

        def change(**sections: dict[str, Any]) -> None:
            """Go on with other settings."""
            changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
            session.config = session.policy.config = config.model_copy(update=changed)

        attempt("sound")
        attempt("embedding", before=change_embedding)
        attempt("norm", after=change_norm)
        attempt("packed", after=change_packed)
        attempt("sound again")
        change(weights={"checksum": "never"})
        attempt("gap", before=stretch_norms)
        attempt("no numbers", before=spoil_norm)
        change(weights={"checksum": "never"}, batch={"updates": 2})
        attempt("gap of two updates", before=stretch_norms)
        change(weights={"checksum": "never"}, health={"gap_limit": None})
        attempt("no limit", before=stretch_norms)
        change(health={"gap_limit": 1e-12})
        attempt("kernels")
        change()
        attempt("sound at last")
        return gather_all(said)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What all attempts say, by rank."""
    folder = tmp_path_factory.mktemp("trust")
    arithmetic_run.write_inputs(folder)
    arithmetic_run.write_run(
        folder,
        steps=100,
        parallel={"processes": 2, "tensor": 2},
        rollout={"tensor": 2, "group_size": 4, "max_tokens": 8, "kv_cache_gib": 0.02},
        batch={"prompts": 4, "tokens_per_microbatch": 192},
    )
    started = preloaded.Started(attempts, folder, folder=folder)
    output, _ = started.communicate(400)
    assert started.returncode == 0, output[-6000:]
    return [eval((folder / f"said-{rank}").read_text()) for rank in range(2)]


def test_a_changed_weight_ends_its_step_and_is_named(said: list[dict[str, str]]):
    """On all ranks alike, before anything is learned; also where it is a part of a packed tensor."""
    changed = {
        "embedding": "model.embed_tokens.weight (by up to 0.25)",
        "norm": r"model.norm.weight (by up to 8",
        "packed": "model.layers.1.self_attn.k_proj.weight (by up to 0.5)",
    }
    for rank in said:
        assert {name for name in rank if rank[name] == "learned"} == {
            "sound",
            "sound again",
            "no limit",
            "sound at last",
        }
        for name, parameter in changed.items():
            start = (
                f"EngineChanged 75 the engine of rank {BAD} does not hold any more what was pushed into it: {parameter}"
            )
            assert rank[name].startswith(start), rank[name]
            assert rank[name].count("weight (by") == 1 and "resume" not in rank[name].split("Fix:")[0]


def test_a_gap_of_log_probs_stops_the_run_and_names_what_differs(said: list[dict[str, str]]):
    """Over all of the step, before the first of its updates; where weights agree, that is said."""
    for rank in said:
        for name in ("gap", "gap of two updates"):
            found = re.search(
                r"TrainingStopped 2 step 3: the log-probs .* by (\S+) nats per token in the mean", rank[name]
            )
            assert found and float(found[1]) > 0.2, rank[name]
            assert "more than health.gap_limit=0.2, so nothing is learned" in rank[name]
            groups = r"weights are not the policy's in model\.norm\.weight \(by up to (4\d\.?\d*)\), "
            groups += r"model\.layers\.\*\.input_layernorm\.weight \(2 of them, by up to (4\.?\d*)\)\. Fix"
            assert re.search(groups, rank[name]), rank[name]
        said_of_nan = "the engine's log-probs of the sampled tokens are not finite, though the policy's are, so nothing"
        assert rank["no numbers"].startswith(f"TrainingStopped 2 step 3: {said_of_nan} is learned from them; ")
        assert "weights are not the policy's in model.norm.weight (by up to inf). Fix" in rank["no numbers"]
        assert "the weights of both are the same. Fix: look for what only one of the two obeys" in rank["kernels"]
