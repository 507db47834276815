"""Adapters of linear layers in closed form: the merge, its gradients, what is kept for the backward pass, the draw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reshard_reference import make_shape
from torch.multiprocessing.reductions import StorageWeakRef

from megarl.config.adapters import is_target, linears
from megarl.config.grid import grid_of_rank
from megarl.config.model_shape import ModelShape
from megarl.config.sections import ParallelSettings
from megarl.policy.adapter import Factors, Merged, in_place
from megarl.reshard.adapter_map import LowRank, Piece, adapted_tensors, takes_adapter
from megarl.reshard.table import axis_sizes, rows_of
from megarl.reshard.weight_map import megatron_tensors

RANK, SCALE, INPUTS, ROWS = 3, 2.0, 7, 10
#: A fused tensor of rows of two layers and of one without an adapter, interleaved.
PIECES = (Piece(0, 0, 2), Piece(1, 0, 3), Piece(None, 0, 2), Piece(0, 2, 4), Piece(1, 3, 4))


def factors(name: str, outputs: int, filled: bool = True) -> Factors:
    place = LowRank(name, outputs, INPUTS, (0, outputs), (0, INPUTS), None, 1, 0, expert=False)
    found = Factors(place, RANK, 0, torch.zeros(()))
    if filled:
        torch.nn.init.normal_(found.lora_B, generator=torch.Generator().manual_seed(len(name)))
    return found


@pytest.fixture
def merged() -> Merged:
    linear = torch.nn.Linear(INPUTS, ROWS, bias=False)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(5))
    return Merged(linear, "weight", (factors("q", 4), factors("kk", 4)), PIECES, SCALE)


def base_of(merged: Merged) -> torch.Tensor:
    return merged.module.get_parameter("weight").detach()


def rows_of_factor(of: int) -> list[int]:
    """The fused tensor's rows that are those of one layer, in its order."""
    found, row = [], 0
    for piece in PIECES:
        found += [row + n for n in range(piece.stop - piece.start)] if piece.of == of else []
        row += piece.stop - piece.start
    return found


def run(merged: Merged, x: torch.Tensor) -> torch.Tensor:
    with in_place([merged]):
        return merged.module(x)


def test_a_layer_computes_its_weight_and_the_product_of_the_factors(merged: Merged):
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(1))
    expected = F.linear(x, base_of(merged))
    for number, one in enumerate(merged.factors):
        expected[:, rows_of_factor(number)] += SCALE * (x @ one.lora_A.T @ one.lora_B.T)
    torch.testing.assert_close(run(merged, x), expected, rtol=0, atol=1e-5)
    # Nothing of it stays behind.
    assert torch.equal(merged.module(x), F.linear(x, base_of(merged)))
    assert [name for name, _ in merged.module.named_parameters()] == ["weight"]


@pytest.mark.parametrize("trains", [True, False])
def test_gradients_are_those_of_the_merged_weight_through_the_factors(merged: Merged, trains: bool):
    """Identity B7: grad_B = s G Aᵀ, grad_A = s Bᵀ G, and G itself the weight's own where it trains."""
    merged.module.requires_grad_(trains)
    x, c = (torch.randn(5, n, generator=torch.Generator().manual_seed(n)) for n in (INPUTS, ROWS))
    (run(merged, x) * c).sum().backward()
    gradient = c.T @ x
    for number, one in enumerate(merged.factors):
        own = gradient[rows_of_factor(number)]
        torch.testing.assert_close(one.lora_B.grad, SCALE * own @ one.lora_A.detach().T)
        torch.testing.assert_close(one.lora_A.grad, SCALE * one.lora_B.detach().T @ own)
    if trains:
        torch.testing.assert_close(merged.module.weight.grad, gradient)
    else:
        assert merged.module.weight.grad is None


def test_a_fresh_adapter_changes_nothing_and_its_a_has_no_gradient(merged: Merged):
    fresh = merged._replace(factors=(factors("q", 4, filled=False), factors("kk", 4, filled=False)))
    assert torch.equal(fresh(), base_of(merged))
    run(fresh, torch.randn(3, INPUTS)).square().sum().backward()
    for one in fresh.factors:
        assert one.lora_A.grad is not None and not one.lora_A.grad.any()
        assert one.lora_B.grad is not None and one.lora_B.grad.all()


def test_a_merged_weight_is_rounded_once(merged: Merged):
    low = merged._replace(
        module=merged.module.to(torch.bfloat16), factors=tuple(one.to(torch.bfloat16) for one in merged.factors)
    )
    exact = base_of(low).double()
    for number, one in enumerate(low.factors):
        exact[rows_of_factor(number)] += SCALE * (one.lora_B.double() @ one.lora_A.double())
    assert torch.equal(low(), exact.to(torch.bfloat16))


def test_no_merged_weight_waits_for_the_backward_pass(merged: Merged, monkeypatch: pytest.MonkeyPatch):
    made: list[StorageWeakRef] = []

    def spied(one: Merged) -> torch.Tensor:
        found = merge(one)
        made.append(StorageWeakRef(found.untyped_storage()))
        return found

    merge = Merged.__call__
    monkeypatch.setattr(Merged, "__call__", spied)
    # A gradient of what goes in needs the merged weight.
    x = torch.randn(5, INPUTS, requires_grad=True)
    output = run(merged, x)
    assert len(made) == 1 and made[0].expired()
    output.sum().backward()
    assert len(made) == 2 and made[1].expired()
    torch.testing.assert_close(x.grad, merge(merged).detach().sum(0).expand(5, -1))


def test_a_is_drawn_as_peft_draws_it_and_alike_however_it_is_cut():
    place = LowRank("o_proj", 8, 4000, (0, 8), (0, 4000), None, 1, 0, expert=False)
    like = torch.zeros((), dtype=torch.float32)
    whole = Factors(place, 16, 7, like)
    bound, drawn = 4000**-0.5, whole.lora_A.detach()
    assert drawn.abs().max() <= bound and float(drawn.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    halves = [
        Factors(replace(place, columns=(2000 * n, 2000 * n + 2000), cut="columns", shards=2, shard=n), 16, 7, like)
        for n in range(2)
    ]
    assert torch.equal(torch.cat([one.lora_A for one in halves], 1), whole.lora_A)
    for other in (Factors(replace(place, name="k"), 16, 7, like), Factors(place, 16, 8, like)):
        assert not torch.equal(other.lora_A, whole.lora_A)
    assert not whole.lora_B.any()


EXPERTS = {"num_experts": 4, "expert_ffn_size": 16}
#: Two key-value heads; all layers of the last two are mixtures.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"tied_embeddings": True},
    "qwen3_moe": EXPERTS | {"sparse_layers": (True, False)},
    "qwen2_moe": EXPERTS | {"shared_expert_ffn_size": 8, "sparse_layers": (True, True)},
    "mixtral": EXPERTS | {"sparse_layers": (True, True)},
}


def shape_of(family: str) -> ModelShape:
    return replace(make_shape(), family=family, **FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_that_settings_name_are_those_of_the_weight_map(family: str):
    shape = shape_of(family)
    sizes = axis_sizes(shape)
    wanted = {
        (name.removesuffix(".weight"), *(sizes[axis] for axis in axes))
        for row in rows_of(shape, pipelined=False)
        if takes_adapter(row) and any(row.is_in(layer, shape) for layer in range(shape.num_layers))
        for name, axes in row.parts
    }
    assert {tuple(one) for one in linears(shape)} == wanted


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_of_every_adapter_is_on_a_rank_and_in_its_place(family: str, tensor: int):
    """Each local row of W is the row of B that its checkpoint tensor says; two key-value heads are fewer than four
    ranks."""
    shape = shape_of(family)
    moe = shape.is_moe
    parallel = ParallelSettings(tensor=tensor, sequence=moe and tensor > 1, expert_tensor=tensor if moe else None)
    seen: dict[str, set[int]] = {}
    for rank in range(tensor):
        grid = grid_of_rank(rank, tensor, parallel)
        local = megatron_tensors(shape, parallel, grid)
        for one in adapted_tensors(shape, parallel, grid, ("all-linear", "lm_head")):
            found = [-1] * local[one.name].shape[0]
            for region in local[one.name].regions:
                for row in range(*region.local_box[0]):
                    found[row] = region.hf_box[0][0] + row - region.local_box[0][0]
            by_pieces: list[int] = []
            for of, start, stop in one.pieces:
                first = 0 if of is None else one.adapters[of].rows[0]
                by_pieces += [-1] * (stop - start) if of is None else list(range(first + start, first + stop))
            assert by_pieces == found
            for adapter in one.adapters:
                columns = {r.hf_box[1] for r in local[one.name].regions}
                assert columns <= {adapter.columns}
                seen.setdefault(adapter.name, set()).update(
                    range(adapter.rows[0], min(adapter.rows[1], adapter.outputs))
                )
    outputs = {
        one.name.format(layer=layer, expert=expert): one.outputs
        for one in linears(shape)
        for layer in range(shape.num_layers)
        for expert in range(shape.num_experts or 1)
        if "layers" not in one.name or _has(shape, one.name, layer)
    }
    assert {name: len(rows) for name, rows in seen.items()} == outputs


def _has(shape: ModelShape, name: str, layer: int) -> bool:
    of_mixture = ".experts." in name or ".shared_expert." in name
    return ".self_attn." in name or of_mixture == shape.is_sparse(layer)


def test_targets_are_whole_parts_of_names_from_the_end():
    assert is_target("model.layers.3.self_attn.q_proj", ["q_proj"])
    assert is_target("model.layers.3.self_attn.q_proj", ["self_attn.q_proj"])
    assert not is_target("model.layers.3.self_attn.q_proj", ["proj", "k_proj"])
    assert is_target("model.layers.3.mlp.up_proj", ["all-linear"]) and not is_target("lm_head", ["all-linear"])
    assert is_target("lm_head", ["all-linear", "lm_head"])
    expert = "model.layers.3.mlp.experts.12.up_proj"
    assert is_target(expert, ["up_proj"]) and is_target(expert, ["experts.up_proj"])
    assert not is_target(expert, ["mlp.up_proj"]) and not is_target("model.layers.3.mlp.up_proj", ["experts.up_proj"])
