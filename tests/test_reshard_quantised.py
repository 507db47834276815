"""FP8 weights in the weight map: which tensors of a checkpoint are quantised, and the shapes of their scales."""

from reshard_reference import make_shape
from reshard_worlds import moe_shape

from megarl.config.quantisation import scale_name
from megarl.reshard.quantised import quantised_weights
from megarl.reshard.weight_map import hf_tensors


def test_linear_layers_of_decoder_layers_and_nothing_else():
    """Every matrix within the layers but routers and gates; blocks are counted in each tensor, the last may be less."""
    for shape in (make_shape("qwen2"), moe_shape("qwen2_moe", hidden_size=136), moe_shape("mixtral")):
        tensors = hf_tensors(shape)
        kept = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "shared_expert_gate.weight", "norm.weight")
        wanted = {
            name for name, dims in tensors.items() if len(dims) == 2 and ".layers." in name and not name.endswith(kept)
        }
        found = quantised_weights(shape)
        assert set(found) == wanted
        assert list(found) == [name for name in tensors if name in found]
        for name, scales in found.items():
            assert scales == tuple(-(-length // 128) for length in tensors[name]), name
    assert scale_name("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight_scale_inv"
